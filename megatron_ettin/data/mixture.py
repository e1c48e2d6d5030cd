"""What a run trains on: one dataset or several, by token weight or token budget, and the slots each gets of a block.

A weight is a share of tokens; slots are rows; sources differ in tokens a row. So a source's share of slots is
weight / mean tokens a row, normalised, and becomes whole slots of a fixed block by largest remainder. Datasets listed
without weights are taken in proportion to their rows, as if they were one dataset (to within a slot of a block)."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.counts import parse_count
from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.config.schema import DataConfig

BLOCK_SLOTS = 10_000
KEYS = ("path", "weight", "tokens")
LARGEST_WEIGHT = 1e100  # sums of weights stay finite
FILE_SUFFIXES = (".yaml", ".yml")
FORMS = "a DATASET path, a list of {path, weight} or {path, tokens}, or a MIXTURE.yaml"


@dataclass(frozen=True)
class MixtureEntry:
    path: str
    weight: float | None = None  # share of tokens, relative to the other entries'
    tokens: int | None = None  # a budget; the shares of budgets are those of weights

    def to_plain(self) -> dict[str, Any]:
        """As `data.mixture` states it."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def parse_mixture(value: Any, root: str | None = None) -> list[MixtureEntry]:
    """`data.mixture`: a path, a list of paths, a list of {path, weight} or {path, tokens}, or the YAML file of a list.

    Relative dataset paths begin at `root`; without one, those of a file begin at its folder. Raises UserError."""
    where = "data.mixture"
    if isinstance(value, str) and value.endswith(FILE_SUFFIXES):
        where = value
        root = str(Path(value).parent) if root is None else root
        value = read_mixture_file(Path(value))
    if value is None or value == "" or (isinstance(value, Sequence) and not isinstance(value, str) and not value):
        raise UserError(f"{where}: empty; give {FORMS}")
    items = [value] if isinstance(value, (str, Mapping)) else value
    if not isinstance(items, Sequence):
        raise UserError(f"{where}: {value!r}; give {FORMS}")
    entries = [parse_entry(f"{where}[{i}]", item) for i, item in enumerate(items)]
    kinds = {"weight" if e.weight is not None else "tokens" if e.tokens is not None else "neither" for e in entries}
    if len(kinds) > 1:
        raise UserError(f"{where}: entries with {' and '.join(sorted(kinds))}; give every entry the same key")
    return [dataclasses.replace(entry, path=below(root, entry.path)) for entry in entries]


def settled(data: DataConfig) -> DataConfig:
    """The same data with its mixture as a list of entries and no file or root to look up: what a run records, so that
    a mixture file edited later does not change what the run says of itself. Raises UserError."""
    if data.mixture is None:
        raise UserError("data.mixture: not set; give a dataset made by `ettin prepare`, data.mixture=DATASET")
    entries = parse_mixture(data.mixture, data.root)
    return dataclasses.replace(data, mixture=[entry.to_plain() for entry in entries], root=None)


def below(root: str | None, path: str) -> str:
    """`path`, if relative, from `root` on."""
    return path if root is None else os.path.normpath(os.path.join(root, os.path.expanduser(path)))


def read_mixture_file(path: Path) -> Any:
    """The list of a YAML file, which may stand under `datasets:`. Raises UserError."""
    import yaml

    from megatron_ettin.base.yaml_reading import load_yaml

    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"data.mixture: {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if isinstance(content, Mapping):
        for key in content:
            if key != "datasets":
                raise UserError(f"{path}: no key {shown(key)}{nearest(shown(key), ['datasets'])}; keys: datasets")
        content = content.get("datasets")
    if content is not None and not isinstance(content, list):
        raise UserError(f"{path}: a list of datasets was expected, found {shown(content)}")
    return content


def shown(value: Any) -> str:
    """A value for a message. What is nested is named by its type: written out, aliases can stand for billions."""
    if isinstance(value, str | int | float | bool | None):
        return repr(value[:60] if isinstance(value, str) else value)[:80]
    return f"a {type(value).__name__}"


def parse_entry(where: str, item: Any) -> MixtureEntry:
    if isinstance(item, str):
        if not item.strip():
            raise UserError(f"{where}: an empty path")
        return MixtureEntry(item)
    if not isinstance(item, Mapping):
        raise UserError(f"{where}: {shown(item)}; give a path or {{path, weight}} or {{path, tokens}}")
    for key in item:
        if key not in KEYS:
            raise UserError(f"{where}: no key {shown(key)}{nearest(shown(key), KEYS)}; keys: {', '.join(KEYS)}")
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
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)  # YAML 1.1 reads `1e-3` as text
    except (TypeError, ValueError):
        raise UserError(f"{where}.weight: {shown(weight)}; give a number above 0") from None
    if not 0 < number < LARGEST_WEIGHT:  # false for NaN
        raise UserError(f"{where}.weight: {weight}; give a finite number above 0")
    return number


def positive_tokens(where: str, tokens: Any) -> int | None:
    if tokens is None:
        return None
    if isinstance(tokens, bool) or (isinstance(tokens, float) and not math.isfinite(tokens)):
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
