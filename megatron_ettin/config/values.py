"""A share that changes over a run, as text: `0.5`, or `0:1, 10B:0.5, 20B:0` (tokens:share, linear in between).

Rows that a run leaves out: `A:B,C:D`, positions of the data order as metrics.jsonl has them under `rows`.

`data.validation`: what a run is evaluated on, as names and paths.

What `profile.*` asks for: steps `A:B` (A to B - 1, counted as in metrics.jsonl) on some ranks."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import parse_count
from megatron_ettin.config.schema import Config

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


FORMS = "a DATASET path, a list of paths or {name: path}"
HELD_OUT = "heldout"  # the folder that `ettin prepare --holdout` makes within a dataset


def validation_sets(value: Any, key: str = "data.validation") -> dict[str, str]:
    """Name -> dataset path, in the order given. A path without a name is called after its folder (`heldout` after the
    one above it), or by itself where two are called the same. Raises UserError."""
    if isinstance(value, Mapping):
        named = {str(name): path for name, path in value.items()}
    else:
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, Sequence):
            raise UserError(f"{key}: {value!r}; give {FORMS}")
        short = [name_of(path) if isinstance(path, str) else "" for path in paths]
        uses = Counter(short)
        pairs = zip(short, paths, strict=True)
        named = {name if uses[name] == 1 else str(path): path for name, path in pairs}
        if len(named) != len(paths):
            raise UserError(f"{key}: a dataset is given twice; give each once")
    for name, path in named.items():
        if not isinstance(path, str) or not path.strip() or not name.strip():
            raise UserError(f"{key}: {path!r} is no path; give {FORMS}")
    if not named:
        raise UserError(f"{key}: empty; give {FORMS}")
    return named


def name_of(path: str) -> str:
    parts = PurePath(path).parts
    return parts[-2] if len(parts) > 1 and parts[-1] == HELD_OUT else parts[-1] if parts else path


MOST_STEPS = 50  # a trace of a step is megabytes, and is held in memory until it is written


def profiled_steps(config: Config) -> range:
    """Steps from 1; empty where none are asked for. Raises UserError."""
    text = config.profile.steps
    if text is None:
        return range(0)
    first, colon, end = str(text).partition(":")
    if not (first.isdigit() and int(first) >= 1 and (not colon or (end.isdigit() and int(end) > int(first)))):
        raise UserError(f"profile.steps: {text!r} is not A:B (steps A to B - 1, from 1 on) or a single step")
    steps = range(int(first), int(end) if colon else int(first) + 1)
    if len(steps) > MOST_STEPS:
        raise UserError(f"profile.steps: {text} are {len(steps):,} steps; at most {MOST_STEPS}, for all are in memory")
    return steps


def profiled_ranks(config: Config) -> tuple[int, ...] | None:
    """None: all of them. Raises UserError."""
    text = str(config.profile.ranks)
    if text == "all":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"profile.ranks: {text!r} is neither 'all' nor numbers of ranks such as 0,8")
    return tuple(int(part) for part in parts)


def check_profile(config: Config) -> None:
    profiled_steps(config)
    profiled_ranks(config)
