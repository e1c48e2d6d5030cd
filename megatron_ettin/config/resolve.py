"""From (size, objective, phase), a site YAML and `key=value` words to one validated Config.

Precedence: recipe tables < the weights a run begins from < YAML < words. OmegaConf merges and types; what it refuses is
told in one line with the nearest valid name. `parse` is the whole road; `recipe` alone gives the published run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.checks import check, check_weight_decay
from megatron_ettin.config.layers import given, key_types, keys_of, layers_of, read_site, read_yaml
from megatron_ettin.config.linked import FOLLOWERS, follow, kept_by
from megatron_ettin.config.recipe import recipe
from megatron_ettin.config.schema import Config

REMOVED = (("resilience", "stop_on_nonfinite"),)  # keys of earlier versions, whose runs go on all the same


def parse(
    size: str,
    objective: str,
    phase: str,
    site: Path | None = None,
    words: Sequence[str] = (),
    weights: Mapping[str, Any] | None = None,
    begun: Config | None = None,
) -> Config:
    """Resolve and check a run. `site`: YAML of groups; `words`: `[phase.]group.key=value`; `weights`: keys of `model`
    that come with the weights it begins from (inherit.py), stronger than the tables only; `begun`: the recorded
    configuration of a run that goes on, from which linked defaults are taken that nothing sets. Raises UserError."""
    read = read_site(site) if site else None
    layers = [layer.groups for layer in layers_of(read, site, words, phase)]
    base = recipe(size, objective, phase, given(layers, "data", "batching"), given(layers, "run", "recipe") or "paired")
    below, of_file = [{"model": dict(weights or {})}], frozenset[str]()
    if read is not None and read.is_original:
        # a whole run, as the tables are: words change it, and what follows them does so from its values
        of_file = keys_of(layers[:1])
        base = to_config(follow(base, merge(base, [*below, layers[0]]), of_file))
        below, layers = [], layers[1:]
    config = follow(base, merge(base, [*below, *layers]), keys_of(layers), begun, of_file)
    resolved = to_config(config)
    check(resolved)
    # a run that has begun with such a coefficient goes on as it is
    if begun is None or begun.optim.weight_decay != resolved.optim.weight_decay:
        check_weight_decay(resolved)
    return resolved


def given_by_user(site: Path | None, words: Sequence[str], phase: str) -> frozenset[str]:
    """Return the `group.key` that the user sets. A YAML of the original trainer is a run, as the tables are."""
    read = read_site(site) if site else None
    layers = [layer.groups for layer in layers_of(read, site, words, phase)]
    return keys_of(layers[1:] if read is not None and read.is_original else layers)


def origins(
    site: Path | None, words: Sequence[str], weights: Mapping[str, Any], phase: str, begun: Config | None = None
) -> dict[str, str]:
    """Who set each key that is not the tables': the strongest of the layers of `parse`."""
    layers = layers_of(read_site(site) if site else None, site, words, phase)
    all_layers = [({"model": dict(weights)}, "the weights it begins from"), *layers]
    found = {f"{group}.{key}": who for layer, who in all_layers for group, keys in layer.items() for key in keys or {}}
    for key in kept_by(begun, found):
        found[key] = "the run itself, which has begun with it"
    for leader, follower in FOLLOWERS:
        if leader in found:
            found.setdefault(follower, f"{leader}, which it follows ({found[leader]})")
    return found


def merge(base: Config, layers: Sequence[dict[str, Any]]) -> Any:
    tree = OmegaConf.structured(base)
    OmegaConf.set_readonly(tree, False)
    for group in tree:
        OmegaConf.set_readonly(tree[group], False)
    for layer in layers:
        for group, keys in layer.items():
            for key, value in (keys or {}).items():
                try:
                    OmegaConf.update(tree, f"{group}.{key}", value, merge=False)
                except OmegaConfBaseException:
                    hint = key_types()[f"{group}.{key}"]
                    kind = getattr(hint, "__name__", str(hint)).replace("typing.", "")
                    raise UserError(
                        f"{group}.{key}: {value!r} is not {'an' if kind[0] in 'aeiou' else 'a'} {kind}"
                    ) from None
    return tree


def to_config(tree: Any) -> Config:
    """Groups of plain values as the frozen dataclasses."""
    values: Any = OmegaConf.to_container(tree) if OmegaConf.is_config(tree) else tree
    return Config(**{group: kind(**values[group]) for group, kind in get_type_hints(Config).items() if group in values})


def to_yaml(config: Config) -> str:
    """The resolved run as text, groups in the order of the schema; `from_yaml` reads it back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def from_yaml(path: Path) -> Config:
    """A resolved config.yaml. Raises UserError for one that is damaged or of another version."""
    content = read_yaml(path)
    for group, key in REMOVED:
        if isinstance(content.get(group), dict):
            content[group].pop(key, None)
    keep_early_decay(content)
    try:
        return to_config(content)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a resolved config of this version ({error})") from None


def keep_early_decay(content: dict[str, Any]) -> None:
    """Give a run of an earlier version the schedule that it was trained with: `one_minus_sqrt` decayed over its first
    `decay_tokens` then, which is the same where they are the whole run."""
    schedule, run = content.get("schedule"), content.get("run")
    if not isinstance(schedule, dict) or not isinstance(run, dict) or "end_tokens" in schedule:
        return
    if schedule.get("name") == "one_minus_sqrt" and schedule.get("decay_tokens") != run.get("tokens"):
        schedule["end_tokens"] = schedule.get("decay_tokens")
