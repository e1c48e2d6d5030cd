"""Describe a submission: the cluster's settings (a profile), the allocation of each job, and its runs.

A profile is a YAML file without unknown keys; examples are in examples/slurm/sites/. The command line overrides it.
"""

from __future__ import annotations

import argparse
import math
import re
import string
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.base.parsing import read_yaml

OPTION = re.compile(r"[a-z][a-z0-9-]*$")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")
PLACEHOLDERS = ("container", "folder", "cwd")
# options of sbatch that `ettin launch` sets itself
RUN_OPTIONS = (
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "array", "dependency"),
    *("output", "chdir", "signal", "open-mode", "requeue", "no-requeue"),
)
TIME = re.compile(r"^(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2}|UNLIMITED|INFINITE)$")
# seconds before the time limit at which a job saves, unless a quarter of the limit is less
MARGIN_SECONDS = 300
# options of sbatch that `ettin launch` also has
SBATCH_OPTIONS = ("account", "partition", "qos", "constraint", "reservation", "mem", "exclude")


@dataclass(frozen=True)
class Profile:
    """Settings of a cluster.

    `{container}`, `{folder}` (of the run) and `{cwd}` are replaced in `srun`, `container_srun` and `container_prefix`.
    """

    sbatch: dict[str, Any] = field(default_factory=dict)
    """Long options of sbatch without dashes, such as {partition: gpu}."""
    setup: str = ""
    """Shell lines to run on the first node before srun, such as `module load ...`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables exported to every rank."""
    path: str = ""
    """Folder to put before PATH on every node, such as a virtual environment's bin. Empty: the folder of `ettin`."""
    srun: list[str] = field(default_factory=lambda: ["--cpu-bind=cores", "--distribution=block:block"])
    """Options of srun."""
    container: str = ""
    """Container image without --container; empty: no container."""
    container_srun: list[str] = field(default_factory=list)
    """Further options of srun if there is a container (pyxis)."""
    container_prefix: list[str] = field(default_factory=list)
    """Words before the command in each task if there is a container (apptainer exec ...)."""
    python: str = "python3"
    """Python 3.6 or later on the first node, outside of any container; it runs the supervisor."""
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    check_paths: list[str] = field(default_factory=list)
    """Folders that must be writable on every node, such as /tmp or a local disk."""
    min_free_gib: float = 1.0
    """Free space in GiB that each of `check_paths` and the run's folder must have."""


def read_profile(path: Path | None) -> Profile:
    """Return the profile in a file, or the default profile for None. Raises UserError for a wrong key or value."""
    if path is None:
        return Profile()
    content = read_yaml(path, f"--profile {path}")
    if not isinstance(content, dict):
        raise UserError(f"--profile {path}: holds no keys; allowed: {', '.join(f.name for f in fields(Profile))}")
    return Profile(**{key: _checked(path, key, value) for key, value in content.items()})


def _checked(path: Path, key: str, value: Any) -> Any:
    """Return the value of a profile's key as Profile stores it. Raises UserError for an unknown key or wrong type."""
    hints = get_type_hints(Profile)
    if key not in hints:
        raise UserError(f"--profile {path}: no key {key!r}{nearest(str(key), hints)}; allowed: {', '.join(hints)}")
    wanted = hints[key]
    if wanted == list[str]:
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if fits:
            _check_placeholders(path, key, value)
    elif wanted in (dict[str, str], dict[str, Any]):
        fits = isinstance(value, dict) and all(isinstance(item, (str, int, float, bool)) for item in value.values())
        if fits:
            value = _variables(path, value) if wanted == dict[str, str] else _sbatch_options(path, value)
    elif wanted is str:
        fits = isinstance(value, str)
    else:
        fits = isinstance(value, (int, float) if wanted is float else int) and not isinstance(value, bool)
        if fits and value < 0:
            raise UserError(f"--profile {path}: {key} {value}: must be at least 0")
    if not fits:
        expected = {str: "text", float: "a number"}.get(wanted, str(wanted).replace("typing.", ""))
        raise UserError(f"--profile {path}: {key} must be {expected}, is {value!r}")
    return value


def _variables(path: Path, values: dict[Any, Any]) -> dict[str, str]:
    """Return the environment with values as strings. Raises UserError for a name that a shell does not allow."""
    for name in values:
        if not VARIABLE.match(str(name)):
            raise UserError(f"--profile {path}: environment: {name!r} is not the name of a variable")
    # true in YAML becomes 1
    return {str(name): str(int(value) if isinstance(value, bool) else value) for name, value in values.items()}


def _sbatch_options(path: Path, values: dict[Any, Any]) -> dict[str, Any]:
    """Return option -> value for sbatch: true gives an option without a value, false drops it. Raises UserError."""
    for name in values:
        if not OPTION.match(str(name)):
            raise UserError(f"--profile {path}: sbatch: {name!r}: write a long option without its dashes")
        if name in RUN_OPTIONS:
            raise UserError(f"--profile {path}: sbatch: {name!r} is set by `ettin launch`; remove it")
    return {name: "" if value is True else value for name, value in values.items() if value is not False}


def _check_placeholders(path: Path, key: str, items: list[str]) -> None:
    for item in items:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(item) if name is not None]
        except ValueError as error:
            raise UserError(f"--profile {path}: {key}: {item!r}: {error}") from None
        if any(name not in PLACEHOLDERS for name in names):
            raise UserError(f"--profile {path}: {key}: {item!r}: only {{container}}, {{folder}}, {{cwd}} are known")


@dataclass(frozen=True)
class Allocation:
    """Request to SLURM for each job."""

    nodes: int
    tasks_per_node: int
    """Ranks on each node."""
    gpus_per_node: int
    cpus_per_task: int | None
    """Cores for each rank; None: SLURM's default."""
    time: str | None
    """Time limit as sbatch reads it; None: the partition's default."""
    options: dict[str, str] = field(default_factory=dict)
    """Further long options of sbatch -> values, such as account and partition."""
    extra_options: tuple[str, ...] = ()
    """Further options of sbatch as given with --sbatch-arg."""

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Submission:
    """Settings that all jobs of one submission share."""

    folder: Path
    """Absolute path of the folder for scripts, logs and events."""
    allocation: Allocation
    profile: Profile
    launcher: str
    """srun (a task for each rank) or torchrun (a task for each node)."""
    container: str
    """Container image; empty: no container."""
    env_file: Path | None
    """Shell file of variables that the job reads when it runs."""
    restarts: int
    """Most failures in a row without a new checkpoint."""
    requeues: int
    """Most requeues of a job."""
    margin_seconds: int
    """Time before the time limit at which a job saves."""
    grace_seconds: int
    """Time for the command to end, once a rank has ended."""
    command_line: str
    """Command that made the submission, for the head of the scripts."""
    cwd: Path


@dataclass(frozen=True)
class JobRun:
    """One run of a job."""

    run_dir: Path
    arguments: tuple[str, ...] = ()
    """Command-line arguments of this run only."""


@dataclass(frozen=True)
class BatchJob:
    """Job with one submission script. Several runs make it an array."""

    name: str
    command: str
    """Command of ettin: train or bench."""
    arguments: tuple[str, ...]
    """Command-line arguments that all runs share."""
    runs: tuple[JobRun, ...]
    snapshots: dict[str, str] = field(default_factory=dict)
    """File name -> resolved configuration to write into the submission's folder."""
    after: str | None = None
    """Name of the job that must end first; in arrays, each run waits for the run with its index."""
    max_parallel: int | None = None
    """Most runs of an array at the same time."""

    @property
    def is_array(self) -> bool:
        """Return whether it has more than one run."""
        return len(self.runs) > 1


def build_allocation(args: argparse.Namespace, profile: Profile) -> Allocation:
    """Build the allocation from the command line, which overrides the profile. Raises UserError."""
    gpus = profile.gpus_per_node if args.gpus_per_node is None else args.gpus_per_node
    tasks = gpus if args.tasks_per_node is None else args.tasks_per_node
    if tasks is None:
        raise UserError("--gpus-per-node: say how many, or 0 with --tasks-per-node N for ranks without a GPU")
    cpus = profile.cpus_per_task if args.cpus_per_task is None else args.cpus_per_task
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
    # --mem, --mem-per-cpu or --mem-per-gpu
    limits_memory = any(name.lstrip("-").startswith("mem") for name in [*options, *args.sbatch_arg])
    if is_exclusive and not limits_memory:
        # without it, a cluster's default per core or node gives the job only a part of the memory of its nodes
        options["mem"] = "0"
    profile_time = options.pop("time", None)
    time = profile_time if args.time is None else args.time
    if time is not None and not TIME.match(time):
        raise UserError(f"--time {time}: write minutes, HH:MM:SS or DAYS-HH:MM:SS, as for sbatch")
    return Allocation(args.nodes, tasks, gpus or 0, cpus, time, options, tuple(args.sbatch_arg))


def resolve_margin(margin_seconds: int | None, time: str | None) -> int:
    """Return the seconds before the time limit at which a job saves.

    Args:
        margin_seconds: value of --margin-seconds; None: MARGIN_SECONDS, or a quarter of the limit if that is less.
        time: time limit as sbatch reads it; None: no limit.

    Raises:
        UserError: the margin is less than 1, or not less than the limit.
    """
    limit = parse_time_limit(time) if time is not None else math.inf
    margin = min(MARGIN_SECONDS, max(1, limit / 4)) if margin_seconds is None else margin_seconds
    if margin < 1:
        raise UserError(f"--margin-seconds {margin}: must be at least 1")
    if margin >= limit:
        raise UserError(f"--margin-seconds {margin}: must be less than --time {time}, because it is its last part")
    return int(margin)


def parse_time_limit(time: str) -> float:
    """Return the seconds of a time limit: minutes, MIN:SEC, HH:MM:SS, DAYS-HH[:MM[:SS]]; inf for no limit."""
    if time in ("0", "UNLIMITED", "INFINITE"):
        return math.inf
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
