"""Read a site's profile: the part of a submission script that belongs to the cluster and not to the run.

A profile is YAML and strict; examples are in examples/slurm/sites/. The command line overrides it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
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


@dataclass(frozen=True)
class Profile:
    """Settings of a cluster.

    `{container}`, `{folder}` (of the run) and `{cwd}` are replaced in `srun`, `container_srun` and `container_prefix`.
    """

    sbatch: dict[str, Any] = field(default_factory=dict)
    """Long options of sbatch without dashes: {partition: gpu}."""
    setup: str = ""
    """Shell lines on the first node, before srun: module load ..."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables exported to every rank."""
    path: str = ""
    """Put before PATH on every node: a virtual environment's bin. Default: where this ettin is."""
    srun: list[str] = field(default_factory=lambda: ["--cpu-bind=cores", "--distribution=block:block"])
    container: str = ""
    """Image used where --container names none."""
    container_srun: list[str] = field(default_factory=list)
    """Options of srun with a container (pyxis)."""
    container_prefix: list[str] = field(default_factory=list)
    """Words before the command in each task (apptainer exec ...)."""
    python: str = "python3"
    """Python of the first node, outside of any container, 3.6 or later: it runs the supervisor."""
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    check_paths: list[str] = field(default_factory=list)
    """Folders that must be writable on every node: /tmp, a local disk."""
    min_free_gib: float = 1.0
    """Room that each of them and the run's folder must have."""


def read_profile(path: Path | None) -> Profile:
    """Return the profile in a file, or the default one. Raises UserError that names the key."""
    if path is None:
        return Profile()
    content = read_yaml(path, f"--profile {path}")
    if not isinstance(content, dict):
        raise UserError(f"--profile {path}: holds no keys; allowed: {', '.join(f.name for f in fields(Profile))}")
    return Profile(**{key: _checked(path, key, value) for key, value in content.items()})


def _checked(path: Path, key: str, value: Any) -> Any:
    """Return the value of a key if it has the key's type."""
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
    """Return the environment as a shell writes it. Raises UserError for a name that no shell takes."""
    for name in values:
        if not VARIABLE.match(str(name)):
            raise UserError(f"--profile {path}: environment: {name!r} is not the name of a variable")
    # YAML's true is 1
    return {str(name): str(int(value) if isinstance(value, bool) else value) for name, value in values.items()}


def _sbatch_options(path: Path, values: dict[Any, Any]) -> dict[str, Any]:
    """Return long options of sbatch; YAML's true is an option without a value, false none. Raises UserError."""
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


def fill_placeholders(items: list[str], values: Mapping[str, str]) -> list[str]:
    """Return the items with `{container}`, `{folder}` and `{cwd}` replaced."""
    return [item.format(**values) for item in items]
