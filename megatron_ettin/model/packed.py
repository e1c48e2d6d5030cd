"""What every layer of every pipeline stage knows about a micro-batch: where its chunks begin and end.

Rows are flattened, so hidden states are [rows * seq_len, 1, hidden] and attention sees [tokens, heads, dim], the same
form Transformer Engine wants. `PackedRows` rides on core's `packed_seq_params` argument, which reaches each layer and
survives activation recomputation; each stage builds its own from the data, only hidden states travel.
Masks and rotary tables are made once a micro-batch and shared by the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_ettin.platform.transfer import to_device


@dataclass
class PackedRows(PackedSeqParams):
    """Boundaries of the chunks in the rows of a micro-batch. Shapes: R rows of S tokens, T = R * S, C chunks."""

    seq_len: int = 0
    chunk_lengths: tuple[int, ...] = ()  # C lengths in flat order, tails of padding included; they sum to T
    segments: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [T] index of the chunk
    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [T] place within the chunk
    slots: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [R] the row's slot within the step
    dropout_key: int = 0  # of (seed, step)
    layer_keys: torch.Tensor | None = None  # dropout.py's, where the masks of a recorded pass are to change
    first_place: int = 0  # where this rank's slice of every row begins, under context parallelism
    slice_tokens: int = 0  # and its length; the whole row without
    causal_rows: int | None = None  # the first so many rows are causal; None: what the model's objective says
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return int(self.slots.numel())

    def parts(self, causal: bool) -> list[tuple[PackedRows, bool]]:
        """The causal rows and the others, those that there are; `causal`: of all, where this does not say."""
        rows = self.rows if causal else 0
        if self.causal_rows is not None:
            rows = self.causal_rows
        if rows in (0, self.rows):
            return [(self, rows > 0)]
        return self.once("parts", lambda: [(self._part(0, rows), True), (self._part(rows, self.rows), False)])

    def _part(self, first: int, end: int) -> PackedRows:
        """Rows [first, end) as a micro-batch of their own."""
        a, b = first * self.seq_len, end * self.seq_len
        ends = np.cumsum(self.chunk_lengths)
        chunks = slice(int(np.searchsorted(ends, a, side="right")), int(np.searchsorted(ends, b)) + 1)
        lengths = self.chunk_lengths[chunks]
        boundaries = self.cu_seqlens_q[chunks.start : chunks.stop + 1] - a
        return PackedRows(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            seq_len=self.seq_len,
            chunk_lengths=lengths,
            segments=self.segments[a:b],
            positions=self.positions[a:b],
            slots=self.slots[first:end],
            dropout_key=self.dropout_key,
            first_place=self.first_place,
            slice_tokens=self.slice_tokens,
            causal_rows=end - first if first == 0 else 0,
        )

    def once(self, key: Any, make: Any) -> Any:
        """`make()` the first time `key` is asked for in this micro-batch, the same value afterwards."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


def pack_rows(
    lengths: Sequence[Sequence[int]],
    seq_len: int,
    device: torch.device | str = "cpu",
    slots: Sequence[int] | None = None,
    dropout_key: int = 0,
    causal_rows: int | None = None,
    context: tuple[int, int] = (0, 1),
) -> PackedRows:
    """Boundaries of rows given as lists of chunk lengths; what a row lacks to `seq_len` becomes a segment of its own.

    `slots`: number of each row within the step (default 0, 1, ...), on which dropout masks depend. `context`: rank and
    degree of context parallelism."""
    filled = [[*row, seq_len - sum(row)] if sum(row) < seq_len else list(row) for row in lengths]
    flat = np.array([n for row in filled for n in row], dtype=np.int64)
    starts = np.cumsum(flat) - flat
    segments = to_device(torch.from_numpy(np.repeat(np.arange(len(flat)), flat)), device)
    positions = to_device(torch.from_numpy(np.arange(int(flat.sum())) - np.repeat(starts, flat)), device)
    boundaries = to_device(torch.from_numpy(np.concatenate([starts, [flat.sum()]]).astype(np.int32)), device)
    longest = int(flat.max())
    return PackedRows(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        seq_len=seq_len,
        chunk_lengths=tuple(flat.tolist()),
        segments=segments,
        positions=positions,
        slots=to_device(torch.tensor(list(range(len(filled)) if slots is None else slots)), device),
        dropout_key=dropout_key,
        first_place=context[0] * (seq_len // context[1]),
        slice_tokens=seq_len // context[1],
        causal_rows=causal_rows,
    )
