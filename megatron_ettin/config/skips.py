"""Rows that a run leaves out: `A:B,C:D`, positions of the data order as metrics.jsonl has them under `rows`."""

from __future__ import annotations

import itertools

from megatron_ettin.base.errors import UserError

Skips = tuple[tuple[int, int], ...]
FORM = "write FIRST:END, such as 281600:309760, several with commas between"


def place_of(number: int, skips: Skips) -> int:
    """The position in the order of a run's row number `number`; rows left out have no number."""
    for first, end in skips:
        if number >= first:
            number += end - first
    return number


def parse_skips(value: str | None, key: str = "data.skip") -> Skips:
    """Ranges [first, end), ascending and apart. Raises UserError."""
    if value is None:
        return ()
    found = []
    for part in str(value).split(","):
        first, colon, end = part.strip().replace("_", "").partition(":")
        if not (colon and first.isdigit() and end.isdigit() and int(first) < int(end)):
            raise UserError(f"{key}: {part.strip()!r} is no range of rows; {FORM}")
        found.append((int(first), int(end)))
    for before, after in itertools.pairwise(found):
        if after[0] < before[1]:
            raise UserError(f"{key}: {before[0]}:{before[1]} and {after[0]}:{after[1]} overlap or are out of order")
    return tuple(found)
