"""A site's profile: what of a submission script is the cluster's, not the run's. YAML, strict, examples in
examples/slurm/sites/. What the command line says goes before it."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.base.parsing import load_yaml

OPTION = re.compile(r"[a-z][a-z0-9-]*$")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")
# options of sbatch that are of the run and its supervisor, not of the cluster
NOT_OF_A_SITE = (
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "array", "dependency"),
    *("output", "chdir", "signal", "open-mode", "requeue", "no-requeue"),
)


@dataclass(frozen=True)
class Profile:
    """`{container}`, `{folder}` (of the run) and `{cwd}` are filled in in `srun`, `container_srun` and
    `container_prefix`."""

    sbatch: dict[str, Any] = field(default_factory=dict)  # sbatch's long options without dashes: {partition: gpu}
    setup: str = ""  # shell lines on the first node, before srun: module load ...
    environment: dict[str, str] = field(default_factory=dict)  # exported to every rank
    path: str = ""  # put before PATH on every node: a virtual environment's bin; default: where this ettin is
    srun: list[str] = field(default_factory=lambda: ["--cpu-bind=cores", "--distribution=block:block"])
    container: str = ""  # the image where --container does not name one
    container_srun: list[str] = field(default_factory=list)  # srun's options with a container (pyxis)
    container_prefix: list[str] = field(default_factory=list)  # before the command in each task (apptainer exec ...)
    python: str = "python3"  # of the first node, outside of any container, 3.6 or later: runs the supervisor
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    check_paths: list[str] = field(default_factory=list)  # to be writable on every node: /tmp, a local disk
    min_free_gib: float = 1.0  # on each of them and on the run's


def read_profile(path: Path | None) -> Profile:
    """The profile in a file, or the one for any cluster. Raises UserError naming the key."""
    if path is None:
        return Profile()
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--profile {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--profile {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"--profile {path}: holds no keys; allowed: {', '.join(f.name for f in fields(Profile))}")
    return Profile(**{key: _checked(path, key, value) for key, value in content.items()})


def _checked(path: Path, key: str, value: Any) -> Any:
    """The value of a key, if it is what the key takes."""
    hints = get_type_hints(Profile)
    if key not in hints:
        raise UserError(f"--profile {path}: no key {key!r}{nearest(str(key), hints)}; allowed: {', '.join(hints)}")
    wanted = hints[key]
    if wanted == list[str]:
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if fits:
            _check_places(path, key, value)
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
        kind = {str: "text", float: "a number"}.get(wanted, str(wanted).replace("typing.", ""))
        raise UserError(f"--profile {path}: {key} must be {kind}, is {value!r}")
    return value


def _variables(path: Path, values: dict[Any, Any]) -> dict[str, str]:
    """Of the environment. Raises UserError for a name that no shell takes."""
    for name in values:
        if not VARIABLE.match(str(name)):
            raise UserError(f"--profile {path}: environment: {name!r} is no variable's name")
    return {str(name): _as_text(value) for name, value in values.items()}


def _sbatch_options(path: Path, values: dict[Any, Any]) -> dict[str, Any]:
    """Long options of sbatch; YAML's true is an option without a value, false none. Raises UserError."""
    for name in values:
        if not OPTION.match(str(name)):
            raise UserError(f"--profile {path}: sbatch: {name!r}: write a long option without its dashes")
        if name in NOT_OF_A_SITE:
            raise UserError(f"--profile {path}: sbatch: {name!r} is of the run; `ettin launch` itself says it")
    return {name: "" if value is True else value for name, value in values.items() if value is not False}


def _as_text(value: object) -> str:
    """As a shell writes it: YAML's true is 1."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _check_places(path: Path, key: str, items: list[str]) -> None:
    for item in items:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(item) if name is not None]
        except ValueError as error:
            raise UserError(f"--profile {path}: {key}: {item!r}: {error}") from None
        for name in names:
            if name not in ("container", "folder", "cwd"):
                raise UserError(f"--profile {path}: {key}: {item!r}: only {{container}}, {{folder}}, {{cwd}} are known")


def filled(items: list[str], places: Mapping[str, str]) -> list[str]:
    """The items with `{container}` and the like put in."""
    return [item.format(**places) for item in items]
