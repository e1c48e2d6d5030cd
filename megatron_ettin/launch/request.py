"""Describe a submission: the allocation of each job, and the runs in it."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from megatron_ettin.base.errors import UserError
from megatron_ettin.launch.profile import Profile

TIME = re.compile(r"^(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2}|UNLIMITED|INFINITE)$")
# a quarter of the time where that is less
MARGIN_SECONDS = 300
SBATCH_OPTIONS = ("account", "partition", "qos", "constraint", "reservation", "mem", "exclude")

T = TypeVar("T")


@dataclass(frozen=True)
class Allocation:
    """Request to SLURM for each job."""

    nodes: int
    tasks_per_node: int
    """Ranks of a node."""
    gpus_per_node: int
    cpus_per_task: int | None
    """Cores of a rank."""
    time: str | None
    options: dict[str, str] = field(default_factory=dict)
    """Further long options of sbatch: account, partition, ..."""
    extra_options: tuple[str, ...] = ()
    """Further options of sbatch, as written."""

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Submission:
    """Settings that all jobs of one submission share."""

    folder: Path
    """Absolute; takes scripts, logs and events."""
    allocation: Allocation
    profile: Profile
    launcher: str
    """srun (a task for each rank) or torchrun (a task for each node)."""
    container: str
    env_file: Path | None
    restarts: int
    requeues: int
    margin_seconds: int
    grace_seconds: int
    command_line: str
    """Command that wrote it."""
    cwd: Path


@dataclass(frozen=True)
class JobRun:
    """One run of a job."""

    run_dir: Path
    arguments: tuple[str, ...] = ()
    """Command-line arguments that this run alone has."""


@dataclass(frozen=True)
class BatchJob:
    """One submission script. More than one run makes an array."""

    name: str
    command: str
    """train or bench."""
    arguments: tuple[str, ...]
    """Command-line arguments that all runs share."""
    runs: tuple[JobRun, ...]
    snapshots: dict[str, str] = field(default_factory=dict)
    """File name -> resolved configuration."""
    after: str | None = None
    """Name of the job that must be done first, run by run."""
    max_parallel: int | None = None
    """Most runs of an array at the same time."""

    @property
    def is_array(self) -> bool:
        """Return whether it has more than one run."""
        return len(self.runs) > 1


def build_allocation(args: argparse.Namespace, profile: Profile) -> Allocation:
    """Build the allocation from the command line, then the profile. Raises UserError."""
    gpus = first_given(args.gpus_per_node, profile.gpus_per_node)
    tasks = first_given(args.tasks_per_node, gpus)
    if tasks is None:
        raise UserError("--gpus-per-node: say how many, or 0 with --tasks-per-node N for ranks without a GPU")
    cpus = first_given(args.cpus_per_task, profile.cpus_per_task)
    counts = {"nodes": args.nodes, "gpus-per-node": gpus, "tasks-per-node": tasks, "cpus-per-task": cpus}
    for name, value in counts.items():
        least = 0 if name == "gpus-per-node" else 1
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    options = {name: str(value) for name, value in profile.sbatch.items()}
    options |= {name: getattr(args, name) for name in SBATCH_OPTIONS if getattr(args, name) is not None}
    if gpus and cpus is None:
        raise UserError(
            "--cpus-per-task: say how many cores each rank gets, a node's cores divided by its GPUs;"
            " without it SLURM binds each rank, its data loader and its transfers to one core"
        )
    is_exclusive = options.get("exclusive") == "" or "--exclusive" in args.sbatch_arg
    # per node, core or GPU
    limits_memory = any(name.lstrip("-").startswith("mem") for name in [*options, *args.sbatch_arg])
    if is_exclusive and not limits_memory:
        # else clusters with a default per core or node give the job a part of the memory of its own nodes
        options["mem"] = "0"
    time = first_given(args.time, options.pop("time", None))
    if time is not None and not TIME.match(time):
        raise UserError(f"--time {time}: write minutes, HH:MM:SS or DAYS-HH:MM:SS, as for sbatch")
    return Allocation(args.nodes, tasks, gpus or 0, cpus, time, options, tuple(args.sbatch_arg))


def resolve_margin(margin_seconds: int | None, time: str | None) -> int:
    """Return the seconds before the time limit at which a job saves.

    Raises:
        UserError: where the job would save before it has begun.
    """
    limit = parse_time_limit(time) if time is not None else math.inf
    margin = min(MARGIN_SECONDS, max(1, limit / 4)) if margin_seconds is None else margin_seconds
    if margin < 1:
        raise UserError(f"--margin-seconds {margin}: must be at least 1")
    if margin >= limit:
        raise UserError(f"--margin-seconds {margin}: must be less than --time {time}, because it is its last part")
    return int(margin)


def parse_time_limit(time: str) -> float:
    """Return the seconds of a time limit of sbatch: minutes, MIN:SEC, HH:MM:SS, DAYS-HH, DAYS-HH:MM, DAYS-HH:MM:SS."""
    if time in ("0", "UNLIMITED", "INFINITE"):
        return math.inf
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def first_given(*values: T | None) -> T | None:
    """Return the first value that is not None; None where all are."""
    return next((value for value in values if value is not None), None)
