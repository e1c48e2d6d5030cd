"""Resolve the mixture of datasets that a run trains on: each one's slots in a block, and its epochs.

A weight is a share of tokens, slots are rows, and sources differ in tokens a row. So a source's share of slots is
weight / mean tokens a row, normalised, and becomes whole slots of a fixed block by largest remainder. Datasets listed
without weights are taken in proportion to their rows, as if they were one dataset (to within a slot of a block).

Repeated data is worth about as much as new data up to some four epochs, and little beyond (Muennighoff et al. 2023).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.base.parsing import read_yaml
from megatron_ettin.base.text import format_count, parse_count
from megatron_ettin.config.schema import DataConfig
from megatron_ettin.data.manifest import read_manifest

BLOCK_SLOTS = 10_000
KEYS = ("path", "weight", "tokens")
# below this, sums of weights stay finite
LARGEST_WEIGHT = 1e100
FILE_SUFFIXES = (".yaml", ".yml")
FORMS = "a DATASET path, a list of {path, weight} or {path, tokens}, or a MIXTURE.yaml"


@dataclass(frozen=True)
class MixtureEntry:
    """One dataset of a mixture."""

    path: str
    weight: float | None = None
    """Share of tokens, relative to the weights of the other entries."""
    tokens: int | None = None
    """Token budget, used like a weight relative to the other entries' budgets."""

    def to_plain(self) -> dict[str, Any]:
        """Return the entry as a dict for `data.mixture`, without keys that are None."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def parse_mixture(value: Any, root: str | None = None) -> list[MixtureEntry]:
    """Parse `data.mixture`.

    Args:
        value: a path, a list of paths, a list of {path, weight} or {path, tokens}, or the path of a YAML file that
            holds a list.
        root: folder of relative dataset paths. None: the folder of the YAML file; other paths stay as they are.

    Raises:
        UserError: the value is none of these.
    """
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
    used = {"weight" if e.weight is not None else "tokens" if e.tokens is not None else "neither" for e in entries}
    if len(used) > 1:
        raise UserError(f"{where}: entries with {' and '.join(sorted(used))}; give every entry the same key")
    return [dataclasses.replace(entry, path=below(root, entry.path)) for entry in entries]


def resolve_mixture(data: DataConfig) -> DataConfig:
    """Return the same keys with `data.mixture` as a list of entries and `data.root` applied. Raises UserError.

    A run records this, so that a mixture file edited later does not change the run's record.
    """
    if data.mixture is None:
        raise UserError("data.mixture: not set; give a dataset made by `ettin prepare`, data.mixture=DATASET")
    entries = parse_mixture(data.mixture, data.root)
    return dataclasses.replace(data, mixture=[entry.to_plain() for entry in entries], root=None)


def below(root: str | None, path: str) -> str:
    """Return `path`, joined to `root` if it is relative and `root` is given."""
    return path if root is None else os.path.normpath(os.path.join(root, os.path.expanduser(path)))


def read_mixture_file(path: Path) -> Any:
    """Return the list in a YAML file, which may be the value of its key `datasets`. Raises UserError."""
    content = read_yaml(path, f"data.mixture: {path}")
    if isinstance(content, Mapping):
        for key in content:
            if key != "datasets":
                raise UserError(f"{path}: no key {shown(key)}{nearest(shown(key), ['datasets'])}; keys: datasets")
        content = content.get("datasets")
    if content is not None and not isinstance(content, list):
        raise UserError(f"{path}: a list of datasets was expected, found {shown(content)}")
    return content


def shown(value: Any) -> str:
    """Format a value for a message. A nested one is shown by its type, because YAML aliases can make it huge."""
    if isinstance(value, str | int | float | bool | None):
        return repr(value[:60] if isinstance(value, str) else value)[:80]
    return f"a {type(value).__name__}"


def parse_entry(where: str, item: Any) -> MixtureEntry:
    """Parse one entry of a mixture; `where` names it in messages. Raises UserError."""
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
    """Return a weight as a number. Raises UserError if it is not positive and finite."""
    if weight is None:
        return None
    try:
        # YAML 1.1 reads `1e-3` as text
        number = math.nan if isinstance(weight, bool) else float(weight)
    except (TypeError, ValueError):
        raise UserError(f"{where}.weight: {shown(weight)}; give a number above 0") from None
    # false for NaN
    if not 0 < number < LARGEST_WEIGHT:
        raise UserError(f"{where}.weight: {weight}; give a finite number above 0")
    return number


def positive_tokens(where: str, tokens: Any) -> int | None:
    """Return a token budget as a count. Raises UserError if it is not positive."""
    if tokens is None:
        return None
    if isinstance(tokens, bool) or (isinstance(tokens, float) and not math.isfinite(tokens)):
        raise UserError(f"{where}.tokens: {tokens}; give a count above 0, such as 250B")
    count = parse_count(tokens, f"{where}.tokens")
    if count <= 0:
        raise UserError(f"{where}.tokens: {tokens}; give a count above 0, such as 250B")
    return count


def slot_counts(entries: Sequence[MixtureEntry], rows: Sequence[int], mean_tokens: Sequence[float]) -> list[int]:
    """Return the number of slots of each source in every block; their sum is BLOCK_SLOTS.

    Args:
        entries: the mixture.
        rows: number of rows of each dataset.
        mean_tokens: mean tokens of a row of each dataset.

    Raises:
        UserError: a dataset would get no slot.
    """
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
    """Divide `seats` by `fractions`: the floors, then one more each for the largest remainders (ties: the earlier)."""
    exact = [fraction * seats for fraction in fractions]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: seats - sum(counts)]:
        counts[i] += 1
    return counts


FEW_EPOCHS = 4
# tolerance in epochs: rounding to slots and steps must not turn one epoch into "read more than once"
ROUNDING = 0.005


class SourceEpochs(NamedTuple):
    """Number of times that a run reads one dataset."""

    dataset: str
    share: float
    """Share of the run's tokens."""
    tokens: int
    """Tokens of the dataset."""
    epochs: float
    """Number of times that the run reads the dataset."""


def planned_epochs(mixture: Sequence[MixtureEntry], run_tokens: int) -> list[SourceEpochs]:
    """Estimate from the manifests how often each dataset is read. Raises UserError if a dataset is missing."""
    sizes = [read_manifest(Path(entry.path)).tokens for entry in mixture]
    weights = [entry.weight or entry.tokens or size for entry, size in zip(mixture, sizes, strict=True)]
    shares = [weight / sum(weights) for weight in weights]
    columns = zip(mixture, shares, sizes, strict=True)
    return [SourceEpochs(entry.path, share, size, share * run_tokens / size) for entry, share, size in columns]


def describe_epochs(table: Sequence[SourceEpochs]) -> list[str]:
    """Return the lines of a table with a header: dataset, share, tokens, epochs."""
    width = max(len("dataset"), *(len(source.dataset) for source in table))
    lines = [f"{'dataset':<{width}}   share   tokens   epochs"]
    for source in table:
        figures = f"{100 * source.share:6.2f}%  {format_count(source.tokens):>7}  {source.epochs:7.3g}"
        lines.append(f"{source.dataset:<{width}}  {figures}")
    return lines


def epoch_warnings(table: Sequence[SourceEpochs]) -> list[str]:
    """Return a line for every dataset that is read more than once."""
    lines = []
    for source in table:
        line = f"data.mixture: {source.dataset} will be read {source.epochs:,.1f} times"
        if source.epochs > FEW_EPOCHS + ROUNDING:
            lines.append(f"warning: {line}; beyond {FEW_EPOCHS} epochs repeated data adds little: add data or lower it")
        elif source.epochs > 1 + ROUNDING:
            lines.append(f"note: {line}")
    return lines
