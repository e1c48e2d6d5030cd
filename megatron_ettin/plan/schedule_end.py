"""Fit a schedule to a run that `run.steps` cuts short, and describe where a run ends in its schedule."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import format_count
from megatron_ettin.config.recipe import recipe
from megatron_ettin.config.resolve import SPAN
from megatron_ettin.config.schema import Config, DataConfig, ScheduleConfig
from megatron_ettin.data.manifest import read_manifest
from megatron_ettin.data.mixture import parse_mixture
from megatron_ettin.data.sampler import BatchSizes
from megatron_ettin.optim.schedule import decayed, lr_fraction

# most rounds of `fit_schedule`: the run's end and the batch warm-up depend on each other, and converge in a few rounds
FIXED_POINT = 20


def expected_row_tokens(data: DataConfig) -> float:
    """Return the expected mean tokens of a row, without opening a packing index.

    These are `data.mean_tokens_per_row` if set. Otherwise padded rows have the mean length of the datasets' chunks;
    packed rows, and rows of datasets that cannot be read, count as full.
    """
    if data.mean_tokens_per_row is not None or data.batching == "packed" or data.mixture is None:
        return data.mean_tokens_per_row or float(data.seq_len)
    try:
        manifests = [read_manifest(Path(entry.path)) for entry in parse_mixture(data.mixture, data.root)]
    except UserError:
        # the error is reported when the data are opened
        return float(data.seq_len)
    return min(sum(one.tokens for one in manifests) / max(sum(one.chunks for one in manifests), 1), data.seq_len)


def end_tokens(config: Config, row_tokens: float) -> int:
    """Return the tokens at which a run with rows of `row_tokens` on average ends, by `run.tokens` or `run.steps`."""
    if config.run.steps is None:
        return config.run.tokens
    rows = BatchSizes.of(config.batch, row_tokens).rows_before(config.run.steps)
    return min(config.run.tokens, round(rows * row_tokens))


def fit_schedule(config: Config, free: Collection[str], row_tokens: float) -> Config:
    """Return the run with its schedule scaled to its steps, if these end before `run.tokens`; else unchanged.

    Args:
        config: configuration from `parse`, whose schedule spans `run.tokens`.
        free: keys of `SPAN` that may be scaled; none is if `schedule.end_tokens` is not among them or is set.
        row_tokens: mean tokens of a row.
    """
    if config.schedule.end_tokens is not None or "schedule.end_tokens" not in free:
        return config
    whole, fitted = config.run.tokens, config
    for _ in range(FIXED_POINT):
        end = end_tokens(fitted, row_tokens)
        if end >= whole:
            return config
        before, fitted = fitted, _spanning(config, free, end)
        if fitted == before:
            break
    return fitted


def _spanning(config: Config, free: Collection[str], end: int) -> Config:
    """Return the run with the free keys of its schedule scaled by `end` / `run.tokens`."""
    shares = {key: config.value(key) * end // config.run.tokens for key in SPAN[:-1] if key in free}
    fitted = config.with_keys(shares)
    schedule = fitted.schedule
    warmup = schedule.warmup_tokens if schedule.name == "wsd" else 0
    if decays(schedule) and schedule.decay_tokens + warmup <= end:
        fitted = fitted.with_keys({"schedule.end_tokens": end})
    return fitted


def decays(schedule: ScheduleConfig) -> bool:
    """Return whether the learning rate falls at the end."""
    return schedule.name != "constant" and schedule.decay_tokens > 0


def free_by_value(config: Config) -> frozenset[str]:
    """Return the keys of `SPAN` that have the recipe's value, scaled to `run.tokens`.

    Only the resolved configuration is needed, not the overrides that led to it.
    """
    run, schedule = config.run, config.schedule
    base = recipe(run.size, run.objective, run.phase, config.data.batching, run.recipe)
    keys = ["schedule.end_tokens"] if schedule.end_tokens is None else []
    keys += [key for key in SPAN[:-1] if config.value(key) == base.value(key) * run.tokens // base.run.tokens]
    return frozenset(keys)


def lr_at_end(config: Config, row_tokens: float) -> float:
    """Return the learning rate at the end of a run with rows of `row_tokens` tokens on average."""
    return config.optim.lr * lr_fraction(end_tokens(config, row_tokens), config.schedule, config.run.tokens)


def describe_end(config: Config, row_tokens: float) -> str:
    """Return a line on how far the run gets in its schedule, and on the learning rate at its end."""
    schedule, end = config.schedule, end_tokens(config, row_tokens)
    about = "about " if config.run.steps is not None and end < config.run.tokens else ""
    parts = []
    if schedule.warmup_tokens:
        parts.append(f"{_share(end, schedule.warmup_tokens)} of warm-up ({format_count(schedule.warmup_tokens)})")
    if config.batch.warmup_tokens:
        whole = config.batch.warmup_tokens
        parts.append(f"{_share(end, whole)} of batch warm-up ({format_count(whole)})")
    if decays(schedule):
        done = decayed(end, schedule, schedule.end_tokens or config.run.tokens)
        parts.append(f"{100 * done:.3g} % of decay ({format_count(schedule.decay_tokens)})")
    else:
        parts.append("no decay")
    rate = lr_fraction(end, schedule, config.run.tokens)
    return (
        f"{schedule.name} ends after {about}{format_count(end)} tokens, at {', '.join(parts)}; the rate there is"
        f" {rate:.3g} of optim.lr {config.optim.lr:g}"
    )


def describe_fit(config: Config, fitted: Config, row_tokens: float) -> str | None:
    """Return a line on what `run.steps` changed in the schedule; None if it changed nothing.

    Args:
        config: configuration from `parse`.
        fitted: configuration from `fit_schedule`.
        row_tokens: mean tokens of a row that `fit_schedule` was given.
    """
    if fitted == config:
        return None
    changed = [f"{key} {fitted.value(key):,}" for key in SPAN if fitted.value(key) != config.value(key)]
    return (
        f"run.steps {config.run.steps:,} ends before run.tokens {config.run.tokens:,}, and the schedule with it, for"
        f" rows of {row_tokens:,.0f} tokens: {', '.join(changed)}; schedule.end_tokens={config.run.tokens} keeps that"
        " of run.tokens"
    )


def _share(end: int, whole: int) -> str:
    return f"{100 * min(end / whole, 1):.3g} %"
