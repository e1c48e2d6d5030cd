"""What a submission is made of: the allocation, and the runs in it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.launch.profile import Profile

TIME = re.compile(r"^(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2}|UNLIMITED|INFINITE)$")
MARGIN_SECONDS = 300  # a quarter of the time where that is less


@dataclass(frozen=True)
class Allocation:
    """What is asked of SLURM for each job. `more`: further options of sbatch, as written."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int | None
    time: str | None
    options: dict[str, str] = field(default_factory=dict)  # account, partition, ...
    more: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Work:
    """What every job of a submission has in common."""

    folder: Path  # absolute: scripts, logs, events
    allocation: Allocation
    profile: Profile
    launcher: str  # srun (a task for each rank) or torchrun (a task for each node)
    container: str
    env_file: Path | None
    restarts: int
    requeues: int
    margin_seconds: int
    grace_seconds: int
    written_by: str  # the command line that wrote it
    cwd: Path


@dataclass(frozen=True)
class Member:
    """One run of a job: its directory and the words that it alone has."""

    run_dir: Path
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One submission script. More than one member makes an array. `after`: the job, by its name, that must be done
    first, member by member."""

    name: str
    command: str  # train or bench
    words: tuple[str, ...]
    members: tuple[Member, ...]
    snapshots: dict[str, str] = field(default_factory=dict)  # file name -> resolved configuration
    after: str | None = None
    at_once: int | None = None  # members of an array that may run at the same time

    @property
    def is_array(self) -> bool:
        return len(self.members) > 1


def allocation_of(args: Any, profile: Profile) -> Allocation:
    """From the command line, then the profile. Raises UserError."""
    gpus = first_given(args.gpus_per_node, profile.gpus_per_node)
    if gpus is None and args.tasks_per_node is None:
        raise UserError("--gpus-per-node: say how many, or 0 with --tasks-per-node N for ranks without a GPU")
    tasks = first_given(args.tasks_per_node, gpus)
    cpus = first_given(args.cpus_per_task, profile.cpus_per_task)
    asked = {"nodes": args.nodes, "gpus-per-node": gpus, "tasks-per-node": tasks, "cpus-per-task": cpus}
    for name, value in asked.items():
        least = 0 if name == "gpus-per-node" else 1
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    names = ("account", "partition", "qos", "constraint", "reservation", "mem", "exclude")
    options = {name: str(value) for name, value in profile.sbatch.items()}
    options |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if gpus and cpus is None:
        raise UserError(
            "--cpus-per-task: say how many cores each rank gets, a node's cores divided by its GPUs;"
            " without it SLURM binds each rank, its data loader and its transfers to one core"
        )
    if is_exclusive(options, args.sbatch_arg) and not limits_memory(options, args.sbatch_arg):
        # else clusters with a default per core or node give the job a part of the memory of its own nodes
        options["mem"] = "0"
    time = first_given(args.time, options.pop("time", None))
    if time is not None and not TIME.match(time):
        raise UserError(f"--time {time}: write minutes, HH:MM:SS or DAYS-HH:MM:SS, as sbatch has it")
    return Allocation(args.nodes, tasks, gpus or 0, cpus, time, options, tuple(args.sbatch_arg))


def is_exclusive(options: Mapping[str, str], more: Sequence[str]) -> bool:
    """Return whether the job gets whole nodes."""
    return options.get("exclusive") == "" or "--exclusive" in more


def limits_memory(options: Mapping[str, str], more: Sequence[str]) -> bool:
    """Return whether the memory is asked for already, per node, core or GPU."""
    return any(name.startswith("mem") for name in options) or any(word.startswith("--mem") for word in more)


def margin_of(asked: int | None, time: str | None) -> int:
    """Seconds before the time limit at which a job saves. Raises UserError where it would save before it has begun."""
    seconds = seconds_of(time) if time is not None else math.inf
    margin = min(MARGIN_SECONDS, max(1, seconds / 4)) if asked is None else asked
    if margin < 1:
        raise UserError(f"--margin-seconds {margin}: must be at least 1")
    if margin >= seconds:
        raise UserError(f"--margin-seconds {margin}: must be less than --time {time}, of which it is the last part")
    return int(margin)


def seconds_of(time: str) -> float:
    """A time limit as sbatch reads it: minutes, MIN:SEC, HH:MM:SS, DAYS-HH, DAYS-HH:MM or DAYS-HH:MM:SS."""
    if time in ("0", "UNLIMITED", "INFINITE"):
        return math.inf
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def first_given(*values: Any) -> Any:
    """The first that is not None; None where all are."""
    return next((value for value in values if value is not None), None)
