"""Hold the chunk boundaries of a micro-batch's rows, which every layer of every pipeline stage needs.

Rows are flattened: hidden states are [rows * seq_len, 1, hidden] and attention sees [tokens, heads, dim], as
Transformer Engine expects. `PackedRows` is passed in core's `packed_seq_params` argument, which reaches each layer and
survives activation recomputation. Each stage builds its own from the data; only hidden states travel between stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_ettin.model.boundaries import ChunkBoundaries
from megatron_ettin.platform.device import to_device

Value = TypeVar("Value")


@dataclass
class PackedRows(PackedSeqParams):
    """Chunk boundaries of a micro-batch. Shapes: R rows of S tokens, T = R * S, C chunks."""

    seq_len: int = 0
    chunk_lengths: tuple[int, ...] = ()
    """C lengths in flat order, padding at the end of rows included; they sum to T."""
    segments: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[T] index of each token's chunk."""
    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[T] position of each token within its chunk."""
    slots: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[R] slot of each row within the step; if `flat`, [C] slot of each chunk."""
    flat: bool = False
    """True if the only row holds the step's rows end to end, one chunk each."""
    dropout_key: int = 0
    """Hash of (seed, phase, step), from dropout.py's `step_key`."""
    layer_keys: torch.Tensor | None = None
    """Keys from dropout.py's `layer_keys` for a captured graph, whose masks change from replay to replay; else None."""
    slice_start: int = 0
    """First position of this rank's slice of every row, under context parallelism."""
    slice_tokens: int = 0
    """Length of that slice; the whole row without context parallelism."""
    causal_tokens: int | None = None
    """Number of tokens in causal rows, which come first; None: all or none, by the model's objective."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Masks and rotary tables, made once per micro-batch and shared by the layers."""

    @classmethod
    def of(cls, host: ChunkBoundaries, device: torch.device | str = "cpu", dropout_key: int = 0) -> PackedRows:
        """Copy boundaries to `device`, without waiting for it. `dropout_key`: `step_key` of the step."""
        longest = max(host.chunk_lengths)
        cu_seqlens, segments, positions, slots = (
            to_device(torch.as_tensor(array), device)
            for array in (host.cu_seqlens, host.segments, host.positions, host.slots)
        )
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            seq_len=host.seq_len,
            chunk_lengths=host.chunk_lengths,
            segments=segments,
            positions=positions,
            slots=slots,
            flat=host.flat,
            dropout_key=dropout_key,
            slice_start=host.slice_start,
            slice_tokens=host.slice_tokens,
            causal_tokens=host.causal_tokens,
        )

    @property
    def rows(self) -> int:
        """Return the number of rows R."""
        return len(self.segments) // self.seq_len

    def split_causal(self, causal: bool) -> list[tuple[PackedRows, bool]]:
        """Return the causal rows with True and the other rows with False, without an empty part.

        Args:
            causal: whether all rows are causal, used if `causal_tokens` is None.
        """
        tokens = len(self.segments)
        first = self.causal_tokens
        if first is None:
            first = tokens if causal else 0
        if first in (0, tokens):
            return [(self, first > 0)]
        return self.cached("causal", lambda: [(self._range(0, first), True), (self._range(first, tokens), False)])

    def _range(self, begin: int, end: int) -> PackedRows:
        """Return tokens [begin, end), which are whole chunks, with the fields that attention needs."""
        ends = np.cumsum(self.chunk_lengths)
        chunks = slice(int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(ends, end)) + 1)
        lengths = self.chunk_lengths[chunks]
        boundaries = self.cu_seqlens_q[chunks.start : chunks.stop + 1] - begin
        return PackedRows(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            seq_len=min(self.seq_len, end - begin),
            chunk_lengths=lengths,
            segments=self.segments[begin:end],
            positions=self.positions[begin:end],
        )

    def cached(self, key: Any, make: Callable[[], Value]) -> Value:
        """Return `make()`, called once per `key` and micro-batch."""
        if key not in self.cache:
            self.cache[key] = make()
        value: Value = self.cache[key]
        return value
