"""Parse values that are more than one number or name: shares over tokens, ranges of rows, lists, validation datasets.

Lists are written as YAML lists. Texts such as `4,3` and `0:8,16:24`, which earlier versions had, are read too.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import parse_count

Points = tuple[tuple[int, float], ...]
# most steps of a trace: each takes megabytes of memory until the trace is written
MOST_STEPS = 50


def parse_points(value: Any, key: str) -> Points:
    """Read a share that may change over a run: `0.5`, `[[0, 1], [10B, 0.5]]`, or the older `0:1,10B:0.5`.

    Returns:
        (tokens, share) of each point, tokens ascending.

    Raises:
        UserError: a point is malformed, or tokens do not ascend.
    """
    parts: Any = value
    if not isinstance(value, list):
        parts = [part.split(":") if ":" in part else (0, part) for part in str(value).split(",")]
    try:
        points = [(parse_count(tokens, key), float(str(share))) for tokens, share in parts]
    except (TypeError, ValueError):
        points = []
    if not points or not all(0 <= share <= 1 for _, share in points):
        raise UserError(
            f"{key}: {value!r}; give a number from 0 to 1, or [[TOKENS, SHARE], ...] such as [[0, 1], [10B, 0.5]]"
        )
    starts = [tokens for tokens, _ in points]
    if starts != sorted(set(starts)):
        raise UserError(f"{key}: {value!r}; the tokens of its points must ascend")
    return tuple(points)


def share_points(value: Any, key: str) -> float | list[list[float]]:
    """Read a share as `parse_points` does. Return plain values: a number, or a list of [tokens, share]."""
    points = parse_points(value, key)
    is_number = not isinstance(value, list) and ":" not in str(value)
    return points[0][1] if is_number else [list(point) for point in points]


def share_at(points: Points, tokens: float) -> float:
    """Return the share after `tokens`: linear between points, constant before the first and after the last."""
    after = bisect.bisect_right([start for start, _ in points], tokens)
    if after == 0:
        return points[0][1]
    if after == len(points):
        return points[-1][1]
    (begin, low), (end, high) = points[after - 1], points[after]
    return low + (high - low) * (tokens - begin) / (end - begin)


Skips = tuple[tuple[int, int], ...]


def parse_skips(value: Any, key: str = "data.skip") -> Skips:
    """Read ranges of rows [first, end): `[[0, 8], [16, 24]]`, or the older `0:8,16:24`.

    Raises:
        UserError: a range is malformed, or ranges overlap or are out of order.
    """
    if value is None:
        return ()
    ranges = []
    for part in value if isinstance(value, list) else str(value).split(","):
        numbers = _numbers(part, ":")
        if numbers is None or len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:
            raise UserError(f"{key}: {part!r} is not a range of rows; write [[FIRST, END], ...] such as [[0, 8]]")
        ranges.append((numbers[0], numbers[1]))
    for before, after in itertools.pairwise(ranges):
        if after[0] < before[1]:
            raise UserError(f"{key}: {before[0]}:{before[1]} and {after[0]}:{after[1]} overlap or are out of order")
    return tuple(ranges)


def row_ranges(value: Any, key: str) -> list[list[int]] | None:
    """Read ranges of rows as `parse_skips` does. Return plain lists; None for no range."""
    return [list(one) for one in parse_skips(value, key)] or None


def whole_numbers(value: Any, key: str) -> list[int]:
    """Read `[4, 3]`, or the older `4,3`. Raises UserError."""
    numbers = _numbers(value, ",")
    if numbers is None:
        raise UserError(f"{key}: {value!r} is not a list of whole numbers; write it as [4, 3]")
    return numbers


def names(value: Any, key: str) -> list[str]:
    """Read `[core_attn, mlp]`, or the older `core_attn,mlp`. Raises UserError."""
    parts = [str(part).strip() for part in (value if isinstance(value, list) else str(value).split(","))]
    if not parts:
        raise UserError(f"{key}: is empty; give at least one name")
    return parts


def rank_list(value: Any, key: str) -> list[int] | None:
    """Read `[0, 8]`, the older `0,8`, or `all`, which is None. Raises UserError."""
    if value == "all":
        return None
    numbers = _numbers(value, ",")
    if not numbers or min(numbers) < 0:
        raise UserError(f"{key}: {value!r} is neither `all` nor a list of ranks such as [0, 8]")
    return numbers


def step_span(value: Any, key: str) -> list[int]:
    """Read `[FIRST, END]`, the older `FIRST:END`, or a single step. Raises UserError."""
    first, end = first_and_end(value) or (0, 0)
    if not 1 <= first < end:
        raise UserError(f"{key}: {value!r} is not [FIRST, END] (steps FIRST to END - 1, from 1 on) or a single step")
    if end - first > MOST_STEPS:
        raise UserError(f"{key}: {value} are {end - first:,} steps; at most {MOST_STEPS}, because all are in memory")
    return [first, end]


def first_and_end(value: Any) -> tuple[int, int] | None:
    """Read `[FIRST, END]`, the older `FIRST:END`, or a single number N as N and N + 1; None for anything else."""
    numbers = _numbers(value, ":") or []
    if len(numbers) == 1:
        return numbers[0], numbers[0] + 1
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def _numbers(value: Any, separator: str) -> list[int] | None:
    """Return the whole numbers of a list, of its older text form, or of a single number; None for anything else."""
    try:
        return [int(str(part).strip()) for part in (value if isinstance(value, list) else str(value).split(separator))]
    except ValueError:
        return None


FORMS = "a DATASET path, a list of paths or {name: path}"
# the folder that `ettin prepare --holdout` makes within a dataset
HELD_OUT = "heldout"


def validation_sets(value: Any, key: str = "data.validation") -> dict[str, str]:
    """Return the dataset paths of `data.validation` by name, in the order given. Raises UserError.

    A path without a name gets the name of its folder (for `heldout` that of the folder above), or the whole path as its
    name if two folders have the same name.
    """
    if isinstance(value, Mapping):
        named = {str(name): path for name, path in value.items()}
    else:
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, Sequence):
            raise UserError(f"{key}: {value!r}; give {FORMS}")
        short = [_folder_name(path) if isinstance(path, str) else "" for path in paths]
        uses = Counter(short)
        pairs = zip(short, paths, strict=True)
        named = {name if uses[name] == 1 else str(path): path for name, path in pairs}
        if len(named) != len(paths):
            raise UserError(f"{key}: a dataset is given twice; give each once")
    for name, path in named.items():
        if not isinstance(path, str) or not path.strip() or not name.strip():
            raise UserError(f"{key}: {path!r} is not a path; give {FORMS}")
    if not named:
        raise UserError(f"{key}: empty; give {FORMS}")
    return named


def _folder_name(path: str) -> str:
    parts = PurePath(path).parts
    return parts[-2] if len(parts) > 1 and parts[-1] == HELD_OUT else parts[-1] if parts else path
