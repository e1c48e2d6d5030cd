"""A share that changes over a run, as text: `0.5`, or `0:1, 10B:0.5, 20B:0` (tokens:share, linear in between)."""

from __future__ import annotations

import bisect
from typing import Any

from megatron_ettin.base.counts import parse_count
from megatron_ettin.base.errors import UserError

Points = tuple[tuple[int, float], ...]


def parse_points(value: Any, key: str) -> Points:
    """The points of a share, tokens ascending. Raises UserError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return ((0, _share(value, value, key)),)
    if not isinstance(value, str):
        raise UserError(f"{key}: {value!r}; give a number from 0 to 1, or TOKENS:SHARE,... such as 0:1,10B:0.5")
    points = []
    for part in value.split(","):
        tokens, colon, share = part.strip().partition(":")
        points.append((parse_count(tokens, key) if colon else 0, _share(share if colon else tokens, value, key)))
    places = [tokens for tokens, _ in points]
    if places != sorted(set(places)):
        raise UserError(f"{key}: {value!r}; the tokens of its points must ascend")
    return tuple(points)


def _share(text: Any, whole: Any, key: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"{key}: {whole!r}; a share is a number from 0 to 1")
    return share


def share_at(points: Points, tokens: float) -> float:
    """The share after `tokens`: linear between points, constant before the first and after the last."""
    after = bisect.bisect_right([place for place, _ in points], tokens)
    if after == 0:
        return points[0][1]
    if after == len(points):
        return points[-1][1]
    (begin, low), (end, high) = points[after - 1], points[after]
    return low + (high - low) * (tokens - begin) / (end - begin)
