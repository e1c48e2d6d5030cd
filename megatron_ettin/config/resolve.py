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

from megatron_ettin.config.checks import check
from megatron_ettin.config.counts import parse_count
from megatron_ettin.config.errors import UserError, nearest
from megatron_ettin.config.objectives import OBJECTIVES
from megatron_ettin.config.phases import ORIGINAL_LOCAL_THETA, ORIGINAL_MEAN_TOKENS, PHASES, WEIGHT_DECAY
from megatron_ettin.config.schema import (
    CHOICES,
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunSettings,
    ScheduleConfig,
)
from megatron_ettin.config.sizes import SIZES

# keys whose value in the tables follows another one's: (leader, follower)
FOLLOWERS = (
    ("optim.lr", "optim.max_lr"),
    ("data.seq_len", "model.max_position_embeddings"),
    ("batch.global_batch_rows", "batch.micro_batch_rows"),
    ("batch.global_batch_rows", "batch.warmup_min_rows"),
)
ORIGINAL_DECODER_KEYS = 65
CLM_FRACTION = 0.5  # of a hybrid run's rows, unless told otherwise


def choose(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise UserError(f"{kind} {name!r} does not exist{nearest(name, table)}; it is one of {', '.join(table)}")
    return table[name]


def recipe(size: str, objective: str, phase: str, batching: str | None = None, name: str = "paired") -> Config:
    """The published run of these three names: `paired`, as a pair that transformers computes as it was trained, or
    `original`, with the choices of the original trainer (docs/recipe.md). batching: `packed` rows, or `padded`
    sequences as the original has them."""
    choose("recipe", name, dict.fromkeys(CHOICES["run.recipe"]))
    if name == "original":
        return original(paired(size, objective, phase, batching or "padded"))
    return paired(size, objective, phase, batching or "packed")


def original(config: Config) -> Config:
    """A run of the tables with what the original trainer did otherwise."""
    run, model, data, batch = config.run, config.model, config.data, config.batch
    objective = "mntp" if (run.phase, run.objective) == ("cross", "mlm") else run.objective
    theta = ORIGINAL_LOCAL_THETA[run.phase, OBJECTIVES[objective].exports[0]][run.size]
    mean = ORIGINAL_MEAN_TOKENS if run.phase == "pretrain" and data.batching == "padded" else None
    return dataclasses.replace(
        config,
        run=dataclasses.replace(run, recipe="original", objective=objective),
        model=dataclasses.replace(
            model, local_rope_theta=theta, decoder_window_keys=ORIGINAL_DECODER_KEYS, output_bias_init="uniform"
        ),
        data=dataclasses.replace(data, mean_tokens_per_row=mean),
        batch=dataclasses.replace(batch, warmup_tokens=0, loss_normalization="microbatch"),
    )


def paired(size: str, objective: str, phase: str, batching: str) -> Config:
    shape, chosen = choose("size", size, SIZES), choose("phase", phase, PHASES)
    choose("objective", objective, OBJECTIVES)
    rows = chosen.padded if batching == "padded" else chosen.packed
    return Config(
        run=RunSettings(size, objective, phase, chosen.tokens[size], chosen.seed),
        model=ModelConfig(
            **dataclasses.asdict(shape),
            global_rope_theta=chosen.global_rope_theta,
            local_rope_theta=chosen.local_rope_theta[size],
            max_position_embeddings=rows.seq_len,
        ),
        parallel=ParallelConfig(),
        precision=PrecisionConfig(),
        optim=OptimConfig(chosen.lr[size], chosen.max_lr[size], WEIGHT_DECAY[size]),
        schedule=ScheduleConfig(
            chosen.schedule, chosen.warmup_tokens[size], chosen.decay_tokens[size], chosen.final_lr_fraction
        ),
        data=DataConfig(
            rows.seq_len,
            chosen.mlm_probability if OBJECTIVES[objective].needs_mask_token else 0.0,
            clm_fraction=CLM_FRACTION if OBJECTIVES[objective].is_hybrid else None,
            batching=batching,
        ),
        batch=BatchConfig(
            rows.global_rows,
            rows.micro_rows[size],
            warmup_tokens=chosen.batch_warmup_tokens[size],
            warmup_min_rows=PHASES["pretrain"].packed.micro_rows[size]
            if batching == "packed"
            else rows.micro_rows[size],
        ),
        checkpoint=CheckpointConfig(every_tokens=chosen.save_every_tokens[size]),
    )


def parse(
    size: str,
    objective: str,
    phase: str,
    site: Path | None = None,
    words: Sequence[str] = (),
    weights: Mapping[str, Any] | None = None,
) -> Config:
    """Resolve and check a run. `site`: YAML of groups; `words`: `group.key=value`; `weights`: keys of `model` that come
    with the weights it begins from (inherit.py), stronger than the tables only. Raises UserError, one line."""
    layers = [read_yaml(site) if site else {}, from_words(words)]
    for layer in layers:
        check_keys(layer)
    base = recipe(size, objective, phase, given(layers, "data", "batching"), given(layers, "run", "recipe") or "paired")
    config = merge(base, [{"model": dict(weights or {})}, *layers])
    follow_the_rows(base, config, layers)
    resolved = to_config(config)
    check(resolved)
    return resolved


def given(layers: Sequence[dict[str, Any]], group: str, key: str) -> str | None:
    """What the strongest of the layers says of a key that decides which tables are taken."""
    values = [value for layer in layers if (value := (layer.get(group) or {}).get(key)) is not None]
    return str(values[-1]) if values else None


def origins(site: Path | None, words: Sequence[str], weights: Mapping[str, Any]) -> dict[str, str]:
    """Who set each key that is not the tables': the strongest of the layers of `parse`."""
    layers = [({"model": dict(weights)}, "the weights it begins from")]
    if site is not None:
        layers.append((read_yaml(site), str(site)))
    layers += [(from_words([word]), f"`{word}`") for word in words]
    found = {f"{group}.{key}": who for layer, who in layers for group, keys in layer.items() for key in keys or {}}
    for leader, follower in FOLLOWERS:
        if leader in found:
            found.setdefault(follower, f"{leader}, which it follows ({found[leader]})")
    return found


def follow_the_rows(base: Config, merged: Any, layers: Sequence[dict]) -> None:
    """Values that the recipe ties to another key follow it where only the other one was given."""
    given = {f"{group}.{key}" for layer in layers for group, keys in layer.items() for key in keys or {}}
    if "optim.lr" in given and "optim.max_lr" not in given:
        merged.optim.max_lr = merged.optim.lr * base.optim.max_lr / base.optim.lr
    if "data.seq_len" in given and "model.max_position_embeddings" not in given:
        merged.model.max_position_embeddings = merged.data.seq_len
    if "batch.global_batch_rows" in given and "batch.micro_batch_rows" not in given:
        merged.batch.micro_batch_rows = min(merged.batch.micro_batch_rows, merged.batch.global_batch_rows)
    if "batch.global_batch_rows" in given and "batch.warmup_min_rows" not in given:
        merged.batch.warmup_min_rows = min(merged.batch.warmup_min_rows, merged.batch.global_batch_rows)


def read_yaml(path: Path) -> dict[str, Any]:
    """Groups of a site file. Raises UserError for a missing or broken file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise UserError(f"config {path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config {path}: a mapping of groups was expected, found {type(content).__name__}")
    return content


def from_words(words: Sequence[str]) -> dict[str, Any]:
    """`["optim.lr=1e-3", ...]` as nested groups; values are YAML."""
    layer: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not key=value; write for example optim.lr=1e-3")
        group, _, name = key.partition(".")
        try:
            parsed = yaml.safe_load(value) if value else None
        except yaml.YAMLError:
            raise UserError(f"{key}: {value!r} is not a YAML value") from None
        if not name:
            raise UserError(f"unknown key {key!r}{nearest(key, key_types())}; keys are group.name")
        layer.setdefault(group, {})[name] = parsed
    return layer


def key_types() -> dict[str, Any]:
    """Every `group.key` with its annotation."""
    return {
        f"{group}.{key}": hint
        for group, kind in get_type_hints(Config).items()
        for key, hint in get_type_hints(kind).items()
    }


def check_keys(layer: dict[str, Any]) -> None:
    """Refuse unknown groups and keys; turn counts such as 1.7T into whole numbers, in place."""
    types = key_types()
    groups = {key.partition(".")[0] for key in types}
    for group, keys in layer.items():
        if group not in groups:
            raise UserError(
                f"unknown key {str(group)!r}{nearest(str(group), groups)}; groups: {', '.join(sorted(groups))}"
            )
        if keys is None:
            continue
        if not isinstance(keys, dict):
            raise UserError(f"{group}: a mapping was expected, found {keys!r}")
        for key, value in list(keys.items()):
            name = f"{group}.{key}"
            if name not in types:
                raise UserError(f"unknown key {name!r}{nearest(name, types)}")
            wants_count = types[name] is int or int in getattr(types[name], "__args__", ())
            if wants_count and isinstance(value, (str, float)):
                keys[key] = parse_count(value, name)
            elif _wants_float(types[name]) and isinstance(value, str):
                keys[key] = _as_float(value, name)


def _wants_float(hint: Any) -> bool:
    return hint is float or float in getattr(hint, "__args__", ())


def _as_float(value: str, name: str) -> float:
    """YAML 1.1 reads `3e-3` as text; a number is meant."""
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{name}: {value!r} is not a number") from None


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
    return Config(**{group: kind(**values[group]) for group, kind in get_type_hints(Config).items()})


def to_yaml(config: Config) -> str:
    """The resolved run as text, groups in the order of the schema; `from_yaml` reads it back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def from_yaml(path: Path) -> Config:
    """A resolved config.yaml. Raises UserError for one that is damaged or of another version."""
    content = read_yaml(path)
    try:
        return to_config(content)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a resolved config of this version ({error})") from None
