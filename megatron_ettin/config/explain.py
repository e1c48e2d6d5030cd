"""Explain how a run differs from the original trainer's (`ettin train --explain`), and name unused overrides.

`differences` lists the keys of the resolved run that have another value than under `recipe: original`, each with its
reason or with who set it. `facts` lists what no key can reproduce. The tests require a reason for every combination of
the recipe. `unused_keys` names keys that a user set and the run does not read, because another run may have been meant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_ettin.base.text import format_count
from megatron_ettin.config.overrides import split_overrides
from megatron_ettin.config.recipe import PHASES, recipe
from megatron_ettin.config.schema import Config, science_keys
from megatron_ettin.config.tables import OBJECTIVES, ROW_OBJECTIVES

REASONS = {
    "data.batching": "packed rows hold no padding: the same tokens a step in fewer, full rows; chunks do not see each"
    " other",
    "data.seq_len": "8,192 packs whole chunks and divides by every layout; 7,999 was the longest padded sequence",
    "data.mean_tokens_per_row": "the datasets' own figure; 615.36 is that of the published data, by which 1.7T tokens"
    " are 599,525 steps",
    "model.max_position_embeddings": "follows data.seq_len",
    "model.decoder_window_keys": "64 keys is what transformers computes from the exported config, so that what is"
    " released is what was trained; the original's attention saw 65",
    "model.local_rope_theta": "one base for both objectives, so that a pair differs in mask and objective only; some"
    " original decoders went back to 10,000 in their last decay",
    "model.output_bias_init": "zero predicts no token before training; the original skipped this tensor's"
    " initialisation, and torch's default stayed",
    "batch.global_batch_rows": "2,816 packed rows of 1,024 hold the tokens of 4,608 padded pre-training sequences,"
    " about 2.84M; the later phases have 1,024 rows of 8,192, and the lengths of the original sequences are not known",
    "batch.warmup_min_rows": "only a batch warm-up reads it",
    "batch.loss_normalization": "every predicted token of a step counts the same on any layout; the original averaged"
    " the means of its micro-batches",
    "batch.micro_batch_rows": "follows the rows of a batch; under loss_normalization=microbatch it decides the loss",
    "run.objective": "a masked token is predicted at its own position, as released encoders are used; the original"
    " trained decoders on as encoders that predict it from the position before (--objective mntp)",
    "resilience.on_nonfinite": "an update that is not finite ends a model; the original made every update",
    "resilience.on_spike": "a gradient norm far above the latest ones is reported and its update made; the original"
    " looked for none",
    "run.phase": "another phase",
}


class Fact(NamedTuple):
    """A property of the original trainer's runs that no key reproduces: what it is here and there, and why."""

    what: str
    here: str
    original: str
    why: str


ALWAYS = (
    Fact(
        "masks", "a hash of seed, phase, order index and token position", "random numbers of the loader's processes",
        "the original's cannot be repeated, not even by itself; the rates are the same (80 % [MASK], 10 % random)",
    ),
    Fact(
        "data order", "a keyed permutation of each dataset, in fixed shares", "one shuffle of all samples, in memory",
        "constant memory at any size; data.order=FILE trains in a published order",
    ),
    Fact(
        "ends of chunks", "[SEP] ends every chunk, of both objectives (ettin prepare --end-token every)",
        "[SEP] is forced on encoders only; a decoder's chunk ends as its data does",
        "encoder and decoder read the same tokens, so that a pair is a pair",
    ),
    Fact(
        "precision", "bf16 weights with fp32 masters, bf16 residual stream", "fp32 weights under bf16 autocast",
        "Megatron's way; precision.name=fp32 computes all in fp32",
    ),
    Fact(
        "embedding row 0", "trained like the others", "no gradient as an input (it was taken for padding)",
        "an oversight: padding was token 50,283; token 0 is rare",
    ),
    Fact(
        "attention dropout mask", "a hash of seed, step, layer, slot, token, channel", "a generator's history",
        "the same on every layout and after every resume; the rate is the same",
    ),
    Fact(
        "resumed epochs", "the position in the order", "the sampler's state",
        "an order defined everywhere needs no state",
    ),
)  # fmt: skip


class Difference(NamedTuple):
    """A key whose value differs from the original trainer's run."""

    key: str
    here: Any
    original: Any
    why: str


def differences(config: Config, origins: Mapping[str, str]) -> list[Difference]:
    """Return the keys in which the run differs from the original's.

    Args:
        config: the run, resolved.
        origins: who set each key whose value is not from the tables, as `resolve.origins` returns it.

    Returns:
        One entry per key. Its reason is empty if the key is neither set nor explained.
    """
    run = config.run
    objective = "mlm" if (run.phase, run.objective) == ("cross", "mntp") else run.objective
    theirs, ours = _keys(recipe(run.size, objective, run.phase, name="original")), _keys(config)
    listed = []
    for key, value in ours.items():
        if value != theirs[key]:
            who = origins.get(key)
            why = f"set by {who}" if who else REASONS.get(key, "")
            listed.append(Difference(key, value, theirs[key], why))
    return listed


def _keys(config: Config) -> dict[str, Any]:
    """Return the science keys, `run.tokens` and `data.order` by name."""
    return {**science_keys(config), "run.tokens": config.run.tokens, "data.order": config.data.order}


def facts(config: Config) -> list[Fact]:
    """Return the properties that no key reproduces, and a batch warm-up that only the published files have."""
    phase, size = PHASES[config.run.phase], config.run.size
    tokens = phase.configured_batch_warmup[size]
    masks = any(ROW_OBJECTIVES[name].masks for name in OBJECTIVES[config.run.objective].row_objectives)
    always = [fact for fact in ALWAYS if masks or fact.what != "masks"]
    if not tokens:
        return always
    rows = (phase.padded if config.data.batching == "padded" else phase.packed).micro_rows[size]
    ours = config.batch.warmup_tokens
    normalised = " batch.loss_normalization=global" if config.batch.loss_normalization == "microbatch" else ""
    warmup = Fact(
        "batch warm-up",
        f"{ours:,} tokens" if ours else "none: every step has the full batch",
        f"none; its files configure {tokens:,} tokens from {phase.padded.micro_rows[size]} sequences",
        "their trainer reads the key in its sequence packer alone, which was off;"
        f" batch.warmup_tokens={format_count(tokens)} batch.warmup_min_rows={rows}{normalised} trains as configured",
    )
    return [*always, warmup]


def describe(listed: list[Difference], config: Config) -> str:
    """Return the differences and facts as text."""
    name = f"{config.run.size} {config.run.objective} {config.run.phase}"
    lines = [f"{name}, recipe {config.run.recipe}: {len(listed)} keys differ from the original trainer's run"]
    for one in listed:
        lines.append(f"  {one.key}: {_shown(one.here)} (original: {_shown(one.original)})")
        lines.append(f"    {one.why or 'NO REASON IS RECORDED'}")
    lines.append("what no key reproduces:")
    for fact in facts(config):
        lines.append(f"  {fact.what}: {fact.here} (original: {fact.original})")
        lines.append(f"    {fact.why}")
    return "\n".join(lines)


def to_json(listed: list[Difference], config: Config) -> dict[str, Any]:
    """Return the differences and facts as plain values."""
    return {"keys": [one._asdict() for one in listed], "always": [fact._asdict() for fact in facts(config)]}


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def unused_keys(config: Config) -> dict[str, str]:
    """Return the keys that the run does not read, each with the reason."""
    objective, name = OBJECTIVES[config.run.objective], config.run.objective
    listed = {}
    if not objective.needs_mask_token:
        listed["data.mlm_probability"] = f"{name} masks no token"
    if objective.causal:
        listed["model.encoder_window"] = f"{name} has no bidirectional rows"
    elif not objective.is_hybrid:
        listed["model.decoder_window_keys"] = f"{name} has no causal rows"
    if config.data.validation is None:
        listed |= dict.fromkeys(("metrics.eval_every_steps", "metrics.eval_rows"), "data.validation is not set")
    if config.data.tokenizer is not None:
        listed["data.tokenizer"] = "the tokenizer is the one that the datasets were made with"
    if config.batch.warmup_tokens == 0:
        listed["batch.warmup_min_rows"] = "batch.warmup_tokens is 0"
    if config.optim.name != "muon":
        listed |= dict.fromkeys(("optim.momentum", "optim.adjust_lr"), f"optim.name is {config.optim.name}")
    return listed


def ignored_lines(config: Config, given: Collection[str]) -> list[str]:
    """Return a line for each key of `given` that has no effect, and one if data.validation has no eval_every_steps."""
    lines = [f"{key}: has no effect, because {why}" for key, why in unused_keys(config).items() if key in given]
    if config.data.validation is not None and config.metrics.eval_every_steps is None:
        lines.append(
            "data.validation: is evaluated at the end of the run only; metrics.eval_every_steps=N does so on the way"
        )
    return lines


def phase_lines(overrides: Sequence[str], phases: Collection[str]) -> list[str]:
    """Return a line for each override (`PHASE.group.key=value`) whose phase is not in `phases`, those of the run."""
    of_phase = split_overrides(overrides)[1]
    return [
        f"{phase}.{override}: has no effect, because this run trains {', '.join(phases)}"
        for phase, its_overrides in of_phase.items()
        if phase not in phases
        for override in its_overrides
    ]
