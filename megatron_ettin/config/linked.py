"""Defaults that follow another key: what the recipe ties together stays so where one of the two is changed.

A value that the user gives stays as it is. A run that has begun keeps its own values of everything that follows, and of
what earlier versions had other defaults for: it must go on as it began, whatever the tables say by now."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from megatron_ettin.base.counts import counted
from megatron_ettin.config.schema import Config

# The schedule follows the run's length: `run.tokens`, or `run.steps` where they end earlier (plan/schedule_end.py).
SPAN = ("schedule.warmup_tokens", "schedule.decay_tokens", "batch.warmup_tokens", "schedule.end_tokens")
ROWS = ("batch.global_batch_rows", "batch.micro_batch_rows")
# keys whose value in the tables follows another one's: (leader, follower)
FOLLOWERS = (
    ("optim.lr", "optim.max_lr"),
    ("data.seq_len", "model.max_position_embeddings"),
    *(("data.seq_len", follower) for follower in ROWS),
    ("batch.global_batch_rows", "batch.micro_batch_rows"),
    ("batch.global_batch_rows", "batch.warmup_min_rows"),
    *(("schedule.end_tokens", follower) for follower in SPAN[:-1]),
    *(("run.tokens", follower) for follower in SPAN[:-1]),
    *(("run.steps", follower) for follower in SPAN),
)
KEPT = (*SPAN, "batch.warmup_min_rows", "optim.max_lr")
MOST_RATE = 10  # of the recipe's learning rate; more is told
LONGEST_USUAL_ROW = 131_072  # tokens; a longer one is told as a warning
MOST_ROUND = 32  # rows that divide by it suit most numbers of data-parallel ranks


def kept_by(begun: Config | None, given: Collection[str]) -> frozenset[str]:
    """Return the keys that a run keeps as it has begun with them because nothing sets them now.

    Args:
        begun: the run's recorded configuration; None for a new run, which keeps nothing.
        given: `group.key` of all that the user sets.
    """
    if begun is None:
        return frozenset()
    rows = ROWS if "data.seq_len" in given and ROWS[0] not in given else ()
    return frozenset({*KEPT, *rows}) - frozenset(given)


def follow(
    base: Config, merged: Any, given: Collection[str], begun: Config | None = None, of_file: Collection[str] = ()
) -> Any:
    """Move what follows a given key, in place.

    Args:
        base: the tables, from which the user's layers start.
        merged: the same with the user's layers in it, as OmegaConf's tree.
        given: `group.key` of all that the user sets.
        begun: the recorded configuration of a run that goes on.
        of_file: keys of `base` that an original trainer's file sets; a run keeps no other value of them.

    Returns:
        `merged`.
    """
    kept = kept_by(begun, {*given, *of_file})
    for key in kept:
        group, name = key.split(".")
        merged[group][name] = getattr(getattr(begun, group), name)
    fixed = {*given, *kept}
    if "optim.lr" in given and "optim.max_lr" not in fixed:
        merged.optim.max_lr = merged.optim.lr * (base.optim.max_lr / base.optim.lr)
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


def keep_begun(config: Config, begun: Config, keys: Collection[str]) -> Config:
    """Return the run with the values of `keys` that it has begun with."""
    for key in keys:
        group, name = key.split(".")
        value = getattr(getattr(begun, group), name)
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})
    return config


def keep_tokens_a_step(base: Config, merged: Any, fixed: Collection[str]) -> None:
    """Give rows of another length the tables' tokens a step and a micro-batch, as nearly as whole rows can."""
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
    """Let warm-up, decay and batch warm-up be the same shares of the run as in the tables. An earlier version's run
    that has begun with the whole ones goes on with them."""
    end = max(merged.schedule.end_tokens or merged.run.tokens, 0)
    for key in SPAN[:-1]:
        group, name = key.split(".")
        whole = getattr(getattr(base, group), name)
        if key not in fixed and (begun is None or getattr(getattr(begun, group), name) != whole):
            merged[group][name] = whole * end // base.run.tokens


def rows_line(base: Config, config: Config) -> str | None:
    """Return what another row length does to the tokens of a step; None where it is the tables' own.

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
