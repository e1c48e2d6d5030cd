"""How often a run reads each dataset of its mixture, as a table and as warnings.

Repeated data is worth about as much as new data up to some four epochs, and little beyond (Muennighoff et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_ettin.base.counts import format_count
from megatron_ettin.data.manifest import read_manifest
from megatron_ettin.data.mixture import MixtureEntry

FEW_EPOCHS = 4
ROUNDING = 0.005  # a budget of exactly the dataset is one epoch, whatever the rounding to slots and steps


class SourceEpochs(NamedTuple):
    dataset: str
    share: float  # of the run's tokens
    tokens: int  # that the dataset has
    epochs: float  # times that the run reads it


def planned_epochs(mixture: Sequence[MixtureEntry], run_tokens: int) -> list[SourceEpochs]:
    """The table before there is a row plan, from the manifests alone. Raises UserError where a dataset is not there."""
    sizes = [read_manifest(Path(entry.path)).tokens for entry in mixture]
    weights = [entry.weight or entry.tokens or size for entry, size in zip(mixture, sizes, strict=True)]
    shares = [weight / sum(weights) for weight in weights]
    columns = zip(mixture, shares, sizes, strict=True)
    return [SourceEpochs(entry.path, share, size, share * run_tokens / size) for entry, share, size in columns]


def describe_epochs(table: Sequence[SourceEpochs]) -> list[str]:
    """Lines of the table: dataset, share, tokens it has, epochs."""
    width = max(len("dataset"), *(len(source.dataset) for source in table))
    lines = [f"{'dataset':<{width}}   share   tokens   epochs"]
    for source in table:
        figures = f"{100 * source.share:6.2f}%  {format_count(source.tokens):>7}  {source.epochs:7.3g}"
        lines.append(f"{source.dataset:<{width}}  {figures}")
    return lines


def epoch_warnings(table: Sequence[SourceEpochs]) -> list[str]:
    """A line for every dataset that is read more than once."""
    lines = []
    for source in table:
        told = f"data.mixture: {source.dataset} will be read {source.epochs:,.1f} times"
        if source.epochs > FEW_EPOCHS + ROUNDING:
            lines.append(f"warning: {told}; beyond {FEW_EPOCHS} epochs repeated data adds little: add data or lower it")
        elif source.epochs > 1 + ROUNDING:
            lines.append(f"note: {told}")
    return lines
