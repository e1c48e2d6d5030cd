"""Read a user config (`--config`), `key=value` overrides and sweeps, which override the recipe's tables.

A user config is a YAML mapping of groups. Its `phases:` holds groups for single phases; the override
`extend.data.mixture=...` is for a single phase too. A YAML of the original trainer is read too (config/original/). Each
layer is checked as it is read: unknown keys are refused with the nearest valid name, counts such as 1.7T become whole
numbers, older names and forms of keys become the current ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from megatron_ettin.base import parsing
from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.base.text import parse_count
from megatron_ettin.config.key_names import REMOVED, current_name, nearest_key, rename_keys, unknown_group
from megatron_ettin.config.original.importing import import_yaml
from megatron_ettin.config.recipe import PHASES
from megatron_ettin.config.schema import all_keys, key_types

# group -> key -> value
Groups = dict[str, Any]


class Layer(NamedTuple):
    """Groups of keys, and who set them (for messages)."""

    groups: Groups
    origin: str
    is_whole_run: bool = False
    """True for a YAML of the original trainer, which describes a whole run, as the tables do."""


@dataclass(frozen=True)
class UserConfig:
    """The content of a `--config` file."""

    common: Groups
    """Groups for every phase."""
    phases: dict[str, Groups] = field(default_factory=dict)
    """Groups for one phase, by phase."""
    names: dict[str, str] = field(default_factory=dict)
    """Size, objective and phase. Only a YAML of the original trainer has them."""
    notes: tuple[str, ...] = ()
    """Lines about keys of an original trainer's file that were left aside or assumed."""


def read_user_config(path: Path) -> UserConfig:
    """Read a user config, or a YAML of the original trainer. Raises UserError."""
    content = read_yaml(path)
    if is_original(content):
        groups, names, notes = import_yaml(content, path)
        return UserConfig(groups, {}, names, tuple(notes))
    phases = content.pop("phases", None) or {}
    if not isinstance(phases, dict):
        raise UserError(f"config {path}: phases: a mapping of phases was expected, found {phases!r}")
    for phase in phases:
        if phase not in PHASES:
            raise UserError(
                f"config {path}: phases: {phase!r}{nearest(str(phase), PHASES)}; allowed: {', '.join(PHASES)}"
            )
        if not isinstance(phases[phase] or {}, dict):
            raise UserError(
                f"config {path}: phases: {phase}: a mapping of groups was expected, found {phases[phase]!r:.60}"
            )
    if "recipe" in content:
        recipe = content.pop("recipe")
        content["run"] = {**(content.get("run") or {}), "recipe": recipe}
    return UserConfig(content, {phase: groups or {} for phase, groups in phases.items()})


def is_original(content: Groups) -> bool:
    """Return whether this is a YAML of the original trainer (Composer's keys)."""
    model = content.get("model")
    return (isinstance(model, dict) and "model_config" in model) or {"train_loader", "max_duration"} <= content.keys()


def run_names(config: UserConfig | None, path: Path | None, given: Mapping[str, str | None]) -> dict[str, str]:
    """Return size, objective and phase of a run: the given ones, else those of an original trainer's file.

    Args:
        config: the user config, or None.
        path: its file, for messages.
        given: the values of --size, --objective and --phase by name; None if not given.

    Raises:
        UserError: one is missing, or the given size or objective is not the file's. A given phase overrides the file's.
    """
    in_file = config.names if config is not None else {}
    for name, value in given.items():
        if value is None and name not in in_file:
            hint = " (its shape is not one of the published ones)" if in_file and name == "size" else ""
            raise UserError(f"--{name}: is missing{hint}")
        if name != "phase" and value is not None and in_file.get(name, value) != value:
            raise UserError(f"--{name} {value}: {path} has {in_file[name]}; leave the option out, or use another file")
    return {name: value or in_file[name] for name, value in given.items()}


def read_layers(path: Path | None, overrides: Sequence[str], phase: str) -> list[Layer]:
    """Return every layer of a phase, weakest first: file, its part for the phase, overrides, overrides for the phase.

    All are checked, those for other phases too. Raises UserError.
    """
    config = read_user_config(path) if path else None
    common, of_phase = split_overrides(overrides)
    layers = []
    if config is not None:
        layers = [Layer(config.common, str(path), bool(config.names))]
        layers.append(Layer(config.phases.get(phase, {}), f"{path} (phases.{phase})"))
    layers += [Layer(from_overrides([one]), f"`{one}`") for one in common]
    layers += [Layer(from_overrides([one]), f"`{phase}.{one}`") for one in of_phase.get(phase, [])]
    for layer in layers:
        check_keys(layer.groups)
    for groups in (*(config.phases.values() if config else ()), *map(from_overrides, of_phase.values())):
        check_keys(groups)
    return layers


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the overrides for every phase, and by phase those for one: `extend.data.mixture=x` is for extend."""
    common: list[str] = []
    of_phase: dict[str, list[str]] = {}
    for override in overrides:
        phase, dot, rest = override.partition(".")
        if dot and phase in PHASES:
            of_phase.setdefault(phase, []).append(rest)
        else:
            common.append(override)
    return common, of_phase


def given_keys(user_config: Path | None, overrides: Sequence[str], phase: str) -> frozenset[str]:
    """Return the `group.key` of everything that a user config or overrides set, to the recipe's value or another."""
    return keys_of(read_layers(user_config, overrides, phase))


def given_by_user(user_config: Path | None, overrides: Sequence[str], phase: str) -> frozenset[str]:
    """Return the `group.key` that the user sets.

    Keys of an original trainer's YAML do not count: it replaces the tables.
    """
    return keys_of(layer for layer in read_layers(user_config, overrides, phase) if not layer.is_whole_run)


def given(layers: Sequence[Layer], group: str, key: str) -> str | None:
    """Return the value of a key in the strongest layer that sets it, as text; None if no layer sets it."""
    values = [value for layer in layers if (value := (layer.groups.get(group) or {}).get(key)) is not None]
    return str(values[-1]) if values else None


def keys_of(layers: Iterable[Layer]) -> frozenset[str]:
    """Return the `group.key` of everything that the layers set."""
    return frozenset(f"{group}.{key}" for layer in layers for group, keys in layer.groups.items() for key in keys or {})


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the groups of a user config. Raises UserError for a missing or broken file."""
    content = parsing.read_yaml(path, f"config {path}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config {path}: a mapping of groups was expected, found {type(content).__name__}")
    return content


def from_overrides(overrides: Sequence[str]) -> Groups:
    """Return overrides, such as `["optim.lr=1e-3"]`, as groups of YAML values. Raises UserError."""
    layer: Groups = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is not key=value; write for example optim.lr=1e-3")
        group, _, name = key.partition(".")
        try:
            parsed = parsing.load_yaml(value) if value else None
        except yaml.YAMLError:
            raise UserError(f"{key}: {value!r} is not a YAML value") from None
        if not name:
            raise UserError(f"unknown key {key!r}{nearest_key(key, key_types())}; keys are group.name")
        layer.setdefault(group, {})[name] = parsed
    return layer


def check_keys(groups: Groups) -> None:
    """Refuse unknown groups and keys, and convert values to the types of their keys, in place.

    Raises:
        UserError: a group or key is unknown, or a value cannot be converted.
    """
    rename_keys(groups)
    types = key_types()
    allowed = {key.partition(".")[0] for key in types}
    for group, keys in groups.items():
        if group not in allowed:
            raise UserError(f"{unknown_group(str(group), keys, types)}; groups: {', '.join(sorted(allowed))}")
        if keys is None:
            continue
        if not isinstance(keys, dict):
            raise UserError(f"{group}: a mapping was expected, found {keys!r}")
        for key, value in list(keys.items()):
            name = f"{group}.{key}"
            if name in REMOVED:
                raise UserError(f"{name}: this key is gone ({REMOVED[name]}); remove it")
            if name not in types:
                raise UserError(f"unknown key {name!r}{nearest_key(name, types)}")
            hints = (types[name], *get_args(types[name]))
            if (parse := all_keys()[name].parse) is not None and value is not None:
                keys[key] = parse(value, name)
            elif int in hints and isinstance(value, (str, float)):
                keys[key] = parse_count(value, name)
            elif float in hints and isinstance(value, str):
                keys[key] = _as_float(value, name)


def upgrade_keys(groups: Groups) -> None:
    """Convert the groups of a stored config.yaml to the current format, in place: names, and lists that were text.

    Raises:
        UserError: a key is given by both names, or a value cannot be parsed.
    """
    rename_keys(groups)
    for name, key in all_keys().items():
        group, _, short = name.partition(".")
        keys = groups.get(group)
        if key.parse is not None and isinstance(keys, dict) and keys.get(short) is not None:
            keys[short] = key.parse(keys[short], name)


def _as_float(value: str, name: str) -> float:
    """Return a number such as `3e-3`, which YAML 1.1 reads as text. Raises UserError."""
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{name}: {value!r} is not a number") from None


# options that may be swept besides keys
NAMES = ("size", "objective")
MOST_MEMBERS = 1000


class Member(NamedTuple):
    """One run of a sweep: its folder's name, and the values of the swept keys as they were written."""

    name: str
    values: dict[str, str]

    @property
    def overrides(self) -> list[str]:
        """Return the swept values as `key=value`, without those of `--size` and `--objective`."""
        return [f"{key}={value}" for key, value in self.values.items() if key not in NAMES]


def members(sweeps: Sequence[str]) -> list[Member]:
    """Return a run for each combination of the swept values; the last key changes fastest. Raises UserError.

    Args:
        sweeps: `KEY=VALUE,VALUE,...` as `--sweep` has them.
    """
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        key = current_name(key)
        values = [value.strip() for value in text.split(",")]
        if not equals or not all(values):
            raise UserError(f"--sweep {sweep!r}: write KEY=VALUE,VALUE,... such as optim.lr=1e-3,2e-3")
        if key not in NAMES and key not in key_types():
            raise UserError(f"--sweep {sweep!r}: no such key{nearest(key, NAMES) or nearest_key(key, key_types())}")
        if key in axes:
            raise UserError(f"--sweep {sweep!r}: {key} is swept twice")
        if len(set(values)) < len(values) or any("/" in value for value in values):
            raise UserError(f"--sweep {sweep!r}: values must differ and have no slash, because they name folders")
        axes[key] = values
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(combinations) > MOST_MEMBERS:
        raise UserError(f"--sweep: {len(combinations)} combinations are too many; at most {MOST_MEMBERS}")
    return [
        Member(" ".join(f"{key}={value}" for key, value in values.items()).replace(" ", "_"), values)
        for values in combinations
    ]
