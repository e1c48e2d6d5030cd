"""What a submission is made of: the allocation, and the runs in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ettin.config.errors import UserError
from megatron_ettin.launch.profile import Profile

TIME = re.compile(r"^(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2}|UNLIMITED|INFINITE)$")


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
        raise UserError("launch: --gpus-per-node N, or 0 with --tasks-per-node N for ranks without a GPU")
    tasks = first_given(args.tasks_per_node, gpus)
    for name, value, least in (("nodes", args.nodes, 1), ("gpus-per-node", gpus or 0, 0), ("tasks-per-node", tasks, 1)):
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if args.time is not None and not TIME.match(args.time):
        raise UserError(f"--time {args.time}: write minutes, HH:MM:SS or DAYS-HH:MM:SS, as sbatch has it")
    names = ("account", "partition", "qos", "constraint", "reservation", "mem", "exclude")
    options = {str(name): str(value) for name, value in profile.sbatch.items()}
    options |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    time = first_given(args.time, options.pop("time", None))
    cpus = first_given(args.cpus_per_task, profile.cpus_per_task)
    return Allocation(args.nodes, tasks, gpus or 0, cpus, time, options, tuple(args.sbatch_arg))


def first_given(*values: Any) -> Any:
    """The first that is not None; None where all are."""
    return next((value for value in values if value is not None), None)
