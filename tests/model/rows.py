"""Packed rows from lists of chunk lengths, and the labelled positions of whole rows of labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_ettin.config.tables import IGNORE
from megatron_ettin.model.boundaries import ChunkBoundaries
from megatron_ettin.model.packed import PackedRows


def pack_rows(
    lengths: Sequence[Sequence[int]],
    seq_len: int,
    slots: Sequence[int] | None = None,
    dropout_key: int = 0,
    causal_tokens: int | None = None,
) -> PackedRows:
    """Return the boundaries of rows given as lists of chunk lengths."""
    return PackedRows.of(ChunkBoundaries.of(lengths, seq_len, slots, causal_tokens), dropout_key=dropout_key)


def labelled(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labels [n] of rows of labels with IGNORE where there is none, and their flat positions [n]."""
    positions = (labels.reshape(-1) != IGNORE).nonzero().squeeze(1)
    return labels.reshape(-1)[positions], positions
