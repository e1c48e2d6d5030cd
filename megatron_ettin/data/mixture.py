"""What a run trains on: one dataset or several, by token weight or token budget, and the slots each gets of a block.

A weight is a share of tokens; slots are rows; sources differ in tokens a row. So a source's share of slots is
weight / mean tokens a row, normalised, and becomes whole slots of a fixed block by largest remainder. Datasets listed
without weights are taken in proportion to their rows, as if they were one dataset (to within a slot of a block)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ettin.config.counts import parse_count
from megatron_ettin.config.errors import UserError, nearest

BLOCK_SLOTS = 10_000
KEYS = ("path", "weight", "tokens")


@dataclass(frozen=True)
class MixtureEntry:
    path: str
    weight: float | None = None  # share of tokens, relative to the other entries'
    tokens: int | None = None  # a budget; the shares of budgets are those of weights


def parse_mixture(value: Any) -> list[MixtureEntry]:
    """`data.mixture`: a path, a list of paths, or a list of {path, weight} or {path, tokens}."""
    if value is None or value == "" or (isinstance(value, Sequence) and not isinstance(value, str) and not value):
        raise UserError("data.mixture: empty; give a DATASET path or a list of {path, weight}")
    items = [value] if isinstance(value, (str, Mapping)) else value
    if not isinstance(items, Sequence):
        raise UserError(f"data.mixture: {value!r}; give a DATASET path or a list of {{path, weight}}")
    entries = [parse_entry(i, item) for i, item in enumerate(items)]
    kinds = {"weight" if e.weight is not None else "tokens" if e.tokens is not None else "neither" for e in entries}
    if len(kinds) > 1:
        raise UserError(f"data.mixture: entries with {' and '.join(sorted(kinds))}; give every entry the same key")
    return entries


def parse_entry(i: int, item: Any) -> MixtureEntry:
    where = f"data.mixture[{i}]"
    if isinstance(item, str):
        if not item.strip():
            raise UserError(f"{where}: an empty path")
        return MixtureEntry(item)
    if not isinstance(item, Mapping):
        raise UserError(f"{where}: {item!r}; give a path or {{path, weight}} or {{path, tokens}}")
    for key in item:
        if key not in KEYS:
            raise UserError(f"{where}: no key {key!r}{nearest(str(key), KEYS)}; keys: {', '.join(KEYS)}")
    path = item.get("path")
    if not isinstance(path, str) or not path.strip():
        raise UserError(f"{where}: no path")
    weight, tokens = item.get("weight"), item.get("tokens")
    if weight is not None and tokens is not None:
        raise UserError(f"{where}: both weight and tokens; give one")
    return MixtureEntry(path, positive_weight(where, weight), positive_tokens(where, tokens))


def positive_weight(where: str, weight: Any) -> float | None:
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise UserError(f"{where}.weight: {weight!r}; give a number above 0")
    if not math.isfinite(weight) or weight <= 0:
        raise UserError(f"{where}.weight: {weight}; give a finite number above 0")
    return float(weight)


def positive_tokens(where: str, tokens: Any) -> int | None:
    if tokens is None:
        return None
    if isinstance(tokens, float) and not math.isfinite(tokens):
        raise UserError(f"{where}.tokens: {tokens}; give a count above 0, such as 250B")
    count = parse_count(tokens, f"{where}.tokens")
    if count <= 0:
        raise UserError(f"{where}.tokens: {tokens}; give a count above 0, such as 250B")
    return count


def slot_counts(entries: Sequence[MixtureEntry], rows: Sequence[int], mean_tokens: Sequence[float]) -> list[int]:
    """Slots of every block of BLOCK_SLOTS that each source gets; their sum is BLOCK_SLOTS."""
    shares = []
    for entry, num_rows, mean in zip(entries, rows, mean_tokens, strict=True):
        weight = entry.weight if entry.weight is not None else entry.tokens
        shares.append(float(num_rows) if weight is None else weight / mean)
    total = math.fsum(shares)
    counts = largest_remainder([share / total for share in shares], BLOCK_SLOTS)
    for entry, count, share in zip(entries, counts, shares, strict=True):
        if count == 0:
            raise UserError(
                f"data.mixture: {entry.path} would get {share / total:.2g} of the rows, less than half a slot of a "
                f"block of {BLOCK_SLOTS:,}, and never be read; raise its weight or prepare it with another dataset"
            )
    return counts


def largest_remainder(fractions: Sequence[float], seats: int) -> list[int]:
    """Whole seats in proportion: floors first, the rest to the largest remainders (ties to the earlier source)."""
    exact = [fraction * seats for fraction in fractions]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: seats - sum(counts)]:
        counts[i] += 1
    return counts
