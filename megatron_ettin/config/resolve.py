"""Resolve size, objective, phase, a user config and overrides to one checked Config; write and read config.yaml.

Precedence: recipe tables < weights that a run begins from < user config < overrides. OmegaConf merges and types.

Linked defaults: if the user changes a key, the keys that the recipe ties to it follow, unless the user sets them too. A
run that has begun keeps its recorded values of these keys, and of keys whose defaults have changed since: it goes on as
it began, whatever the tables say now.

Inherited settings: weights have a shape and were trained under windows, an epsilon and rotary bases, which the tables
have for the published sizes only. So the weights' settings are stronger than the tables and weaker than the user's: a
ModernBERT's local base of 10,000 must not become the recipe's 160,000 because nobody set it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import counted
from megatron_ettin.config.checks import check, check_weight_decay
from megatron_ettin.config.key_names import REMOVED
from megatron_ettin.config.overrides import Layer, given, keys_of, read_layers, read_yaml, upgrade_keys
from megatron_ettin.config.recipe import PHASES, recipe
from megatron_ettin.config.schema import Config, ModelConfig, groups, key_types
from megatron_ettin.config.tables import SIZES


class Start(NamedTuple):
    """State that a run begins from."""

    weights: Mapping[str, Any] = {}
    """Keys of `model` that come with its weights (`inherited`); stronger than the tables only."""
    begun: Config | None = None
    """Recorded configuration of a run that is resumed; linked defaults that nothing sets are taken from it."""

    @property
    def layer(self) -> Layer:
        """Return the keys that come with the weights."""
        return Layer({"model": dict(self.weights)}, "the weights it begins from")


NEW_RUN = Start()


def parse(
    size: str,
    objective: str,
    phase: str,
    user_config: Path | None = None,
    overrides: Sequence[str] = (),
    start: Start = NEW_RUN,
) -> Config:
    """Resolve and check a run. Raises UserError.

    Args:
        size: published size.
        objective: training objective.
        phase: phase of the recipe.
        user_config: YAML file of groups, or of the original trainer.
        overrides: `[phase.]group.key=value`.
        start: the settings of the weights, and the recorded configuration, that the run begins from.
    """
    begun, below = start.begun, [start.layer]
    layers = read_layers(user_config, overrides, phase)
    base = recipe(size, objective, phase, given(layers, "data", "batching"), given(layers, "run", "recipe") or "paired")
    of_file = frozenset[str]()
    if layers and layers[0].is_whole_run:
        # the file describes a whole run, as the tables do: overrides and linked defaults start from its values
        of_file = keys_of(layers[:1])
        base = to_config(apply_linked_defaults(base, merge(base, [*below, layers[0]]), of_file))
        below, layers = [], layers[1:]
    config = apply_linked_defaults(base, merge(base, [*below, *layers]), keys_of(layers), begun, of_file)
    resolved = to_config(config)
    check(resolved)
    # a run that has begun with such a coefficient goes on with it
    if begun is None or begun.optim.weight_decay != resolved.optim.weight_decay:
        check_weight_decay(resolved)
    return resolved


def origins(user_config: Path | None, overrides: Sequence[str], phase: str, start: Start) -> dict[str, str]:
    """Return `group.key` -> description of who set it, for keys set by other than the tables. Args: see `parse`."""
    layers = [start.layer, *read_layers(user_config, overrides, phase)]
    who = {key: layer.origin for layer in layers for key in keys_of([layer])}
    for key in kept_by(start.begun, who):
        who[key] = "the run itself, which has begun with it"
    for leader, follower in FOLLOWERS:
        if leader in who:
            who.setdefault(follower, f"{leader}, which it follows ({who[leader]})")
    return who


def merge(base: Config, layers: Sequence[Layer]) -> Any:
    """Return `base` as an OmegaConf tree with the layers, weakest first, applied. Raises UserError for a wrong type."""
    tree = OmegaConf.structured(base)
    OmegaConf.set_readonly(tree, False)
    for group in tree:
        OmegaConf.set_readonly(tree[group], False)
    for layer in layers:
        for group, keys in layer.groups.items():
            for key, value in (keys or {}).items():
                try:
                    OmegaConf.update(tree, f"{group}.{key}", value, merge=False)
                except OmegaConfBaseException:
                    hint = key_types()[f"{group}.{key}"]
                    wanted = getattr(hint, "__name__", str(hint)).replace("typing.", "")
                    raise UserError(
                        f"{group}.{key}: {value!r} is not {'an' if wanted[0] in 'aeiou' else 'a'} {wanted}"
                    ) from None
    return tree


def to_config(tree: Any) -> Config:
    """Return an OmegaConf tree, or a dict of groups, as a `Config`. Nothing is checked."""
    values: Any = OmegaConf.to_container(tree) if OmegaConf.is_config(tree) else tree
    return Config(**{group: cls(**values[group]) for group, cls in groups().items() if group in values})


def to_yaml(config: Config) -> str:
    """Return the resolved run as text, groups in the order of the schema; `from_yaml` reads it back."""
    text: str = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    return text


def from_yaml(path: Path) -> Config:
    """Read a resolved config.yaml, of earlier versions too. Raises UserError for one that is damaged or newer."""
    content = read_yaml(path)
    for name in REMOVED:
        group, _, key = name.partition(".")
        if isinstance(content.get(group), dict):
            content[group].pop(key, None)
    keep_early_decay(content)
    upgrade_keys(content)
    try:
        return to_config(content)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a resolved config of this version ({error})") from None


def keep_early_decay(content: dict[str, Any]) -> None:
    """Give the stored groups of an earlier version's run the schedule that it was trained with, in place.

    `one_minus_sqrt` then decayed over the first `decay_tokens`, which is the same if they are the whole run.
    """
    schedule, run = content.get("schedule"), content.get("run")
    if not isinstance(schedule, dict) or not isinstance(run, dict) or "end_tokens" in schedule:
        return
    if schedule.get("name") == "one_minus_sqrt" and schedule.get("decay_tokens") != run.get("tokens"):
        schedule["end_tokens"] = schedule.get("decay_tokens")


# keys rescaled with the run's length: `run.tokens`, or `run.steps` if they end earlier (plan/schedule_end.py)
SPAN = ("schedule.warmup_tokens", "schedule.decay_tokens", "batch.warmup_tokens", "schedule.end_tokens")
ROWS = ("batch.global_batch_rows", "batch.micro_batch_rows")
# (leader, follower): if the user changes the leader, the follower changes too
FOLLOWERS = (
    ("optim.lr", "optim.weight_decay_reference_lr"),
    ("data.seq_len", "model.max_position_embeddings"),
    *(("data.seq_len", follower) for follower in ROWS),
    ("batch.global_batch_rows", "batch.micro_batch_rows"),
    ("batch.global_batch_rows", "batch.warmup_min_rows"),
    *(("schedule.end_tokens", follower) for follower in SPAN[:-1]),
    *(("run.tokens", follower) for follower in SPAN[:-1]),
    *(("run.steps", follower) for follower in SPAN),
)
KEPT = (*SPAN, "batch.warmup_min_rows", "optim.weight_decay_reference_lr")
# warn of a learning rate that is more than this many times the recipe's
MOST_RATE = 10
# warn of rows with more tokens
LONGEST_USUAL_ROW = 131_072
# rows that divide by it suit most numbers of data-parallel ranks
MOST_ROUND = 32


def kept_by(begun: Config | None, given: Collection[str]) -> frozenset[str]:
    """Return the keys that a resumed run keeps at their recorded values, because nothing sets them now.

    Args:
        begun: the run's recorded configuration; None for a new run, which keeps nothing.
        given: `group.key` of everything that the user sets.
    """
    if begun is None:
        return frozenset()
    rows = ROWS if "data.seq_len" in given and ROWS[0] not in given else ()
    return frozenset({*KEPT, *rows}) - frozenset(given)


def apply_linked_defaults(
    base: Config, merged: Any, given: Collection[str], begun: Config | None = None, of_file: Collection[str] = ()
) -> Any:
    """Change the keys that follow a given key, in place.

    Args:
        base: the tables, from which the user's layers start.
        merged: the same with the user's layers applied, as an OmegaConf tree.
        given: `group.key` of everything that the user sets.
        begun: the recorded configuration of a run that is resumed.
        of_file: keys of `base` that an original trainer's file sets; a resumed run does not keep other values of them.

    Returns:
        `merged`.
    """
    kept = kept_by(begun, {*given, *of_file})
    if begun is not None:
        for key in kept:
            group, name = key.split(".")
            merged[group][name] = begun.value(key)
    fixed = {*given, *kept}
    if "optim.lr" in given and "optim.weight_decay_reference_lr" not in fixed:
        ratio = base.optim.weight_decay_reference_lr / base.optim.lr
        merged.optim.weight_decay_reference_lr = merged.optim.lr * ratio
    if "data.seq_len" in given and "model.max_position_embeddings" not in fixed:
        merged.model.max_position_embeddings = merged.data.seq_len
    if "data.seq_len" in given and merged.data.batching == "packed" and ROWS[0] not in fixed:
        keep_tokens_a_step(base, merged, fixed)
    if {"batch.global_batch_rows", "data.seq_len"} & set(given) and "batch.warmup_min_rows" not in fixed:
        merged.batch.warmup_min_rows = min(merged.batch.warmup_min_rows, merged.batch.global_batch_rows)
    if "batch.global_batch_rows" in given and "batch.micro_batch_rows" not in fixed:
        merged.batch.micro_batch_rows = min(merged.batch.micro_batch_rows, merged.batch.global_batch_rows)
    keep_shares(base, merged, fixed, begun)
    return merged


def keep_tokens_a_step(base: Config, merged: Any, fixed: Collection[str]) -> None:
    """Set the rows of a batch and a micro-batch, in place, so that rows of another length keep the tables' tokens."""
    ratio = base.data.seq_len / max(merged.data.seq_len, 1)
    wanted, micro = base.batch.global_batch_rows * ratio, base.batch.micro_batch_rows * ratio
    if "batch.micro_batch_rows" in fixed:
        unit = max(merged.batch.micro_batch_rows, 1)
    else:
        unit = next(
            2**power for power in range(MOST_ROUND.bit_length() - 1, -1, -1) if 64 * 2**power <= max(wanted, 64)
        )
    rows = unit * max(round(wanted / unit), 1)
    merged.batch.global_batch_rows = rows
    if "batch.micro_batch_rows" not in fixed:
        merged.batch.micro_batch_rows = next(size for size in range(max(int(micro), 1), 0, -1) if rows % size == 0)


def keep_shares(base: Config, merged: Any, fixed: Collection[str], begun: Config | None = None) -> None:
    """Scale warm-up, decay and batch warm-up, in place, to be the same shares of the run as in the tables.

    A run that has begun, under an earlier version, with unscaled values goes on with them.
    """
    end = max(merged.schedule.end_tokens or merged.run.tokens, 0)
    for key in SPAN[:-1]:
        group, name = key.split(".")
        whole = base.value(key)
        if key not in fixed and (begun is None or begun.value(key) != whole):
            merged[group][name] = whole * end // base.run.tokens


def rows_line(base: Config, config: Config) -> str | None:
    """Return a line about the tokens of a step if rows have another length than in the tables, else None.

    Args:
        base: the tables.
        config: the run, resolved.
    """
    length, rows = config.data.seq_len, config.batch.global_batch_rows
    if length == base.data.seq_len:
        return None
    ours, theirs = length * rows, base.data.seq_len * base.batch.global_batch_rows
    warning = "warning: " if length > LONGEST_USUAL_ROW else ""
    return (
        f"{warning}data.seq_len {length:,}: {counted(rows, 'row')} a step {'has' if rows == 1 else 'have'} up to"
        f" {ours:,} tokens,"
        f" {ours / theirs:.3g} x the recipe's {theirs:,}"
        f" ({counted(base.batch.global_batch_rows, 'row')} of {base.data.seq_len:,})"
    )


def rate_line(base: Config, config: Config) -> str | None:
    """Return a warning of a learning rate far above the tables'; None for any other.

    Args:
        base: the tables.
        config: the run, resolved.
    """
    times = config.optim.lr / base.optim.lr
    if times <= MOST_RATE:
        return None
    return f"warning: optim.lr {config.optim.lr:g} is {times:,.0f} x the recipe's {base.optim.lr:g}"


SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
FIXED = ("vocab_size", "global_attention_every", "encoder_window", "decoder_window_keys", "norm_eps")
BASES = ("global_rope_theta", "local_rope_theta")


def inherited(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `model` that come with weights whose config.yaml has the groups `source`.

    A published shape is not among them: --size sets it, so that weights of another shape are refused. The rotary bases
    of a run that followed the recipe are not either, because the recipe changes them from phase to phase.
    """
    model, run = source.get("model") or {}, source.get("run") or {}
    keys = [*FIXED]
    if not any(all(model.get(key) == getattr(shape, key) for key in SHAPE) for shape in SIZES.values()):
        keys += SHAPE
    if not _follows_the_recipe(model, run):
        keys += BASES
    return {key: model[key] for key in keys if model.get(key) is not None}


def _follows_the_recipe(model: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Return whether the rotary bases are those that the tables have for the phase and size in `run`."""
    phase, size = PHASES.get(str(run.get("phase"))), str(run.get("size"))
    if phase is None or size not in SIZES:
        return False
    bases = (phase.global_rope_theta, phase.local_rope_theta[size])
    return tuple(model.get(key) for key in BASES) == bases


def inherited_lines(kept: Mapping[str, Any], recipe: ModelConfig, final: ModelConfig) -> list[str]:
    """Return a line for each inherited key that the run uses and that has another value in the recipe.

    Args:
        kept: as `inherited` returned it.
        recipe: the tables' model.
        final: the run's model.
    """
    return [
        f"model.{key}={value} comes with the weights (the recipe has {getattr(recipe, key)})"
        for key, value in kept.items()
        if key not in SHAPE and getattr(final, key) == value != getattr(recipe, key)
    ]
