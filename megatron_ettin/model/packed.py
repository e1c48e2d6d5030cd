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

from megatron_ettin.platform.device import to_device


@dataclass
class PackedRows(PackedSeqParams):
    """Boundaries of the chunks in the rows of a micro-batch. Shapes: R rows of S tokens, T = R * S, C chunks."""

    seq_len: int = 0
    chunk_lengths: tuple[int, ...] = ()  # C lengths in flat order, tails of padding included; they sum to T
    segments: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [T] index of the chunk
    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [T] place within the chunk
    slots: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [R] the row's slot within the step
    flat: bool = False  # one row holds the step's rows end to end, a chunk each: `slots` [C] are of chunks
    dropout_key: int = 0  # of (seed, step)
    layer_keys: torch.Tensor | None = None  # dropout.py's, where the masks of a recorded pass are to change
    first_place: int = 0  # where this rank's slice of every row begins, under context parallelism
    slice_tokens: int = 0  # and its length; the whole row without
    causal_places: int | None = None  # the first so many of T are of causal rows; None: as the model's objective says
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.segments) // self.seq_len

    def parts(self, causal: bool) -> list[tuple[PackedRows, bool]]:
        """The causal rows and the others, those that there are; `causal`: of all, where this does not say."""
        tokens = len(self.segments)
        first = tokens if causal else 0
        if self.causal_places is not None:
            first = self.causal_places
        if first in (0, tokens):
            return [(self, first > 0)]
        return self.once("parts", lambda: [(self._part(0, first), True), (self._part(first, tokens), False)])

    def _part(self, a: int, b: int) -> PackedRows:
        """Places [a, b), which are whole chunks, for attention alone."""
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
            seq_len=min(self.seq_len, b - a),
            chunk_lengths=lengths,
            segments=self.segments[a:b],
            positions=self.positions[a:b],
        )

    def causal_part(self, positions: torch.Tensor) -> int:
        """Return how many of rising flat positions of this rank's slices are of causal rows."""
        rows, rest = divmod(self.causal_places or 0, self.seq_len)
        within = min(max(rest - self.first_place, 0), self.slice_tokens)
        return int(torch.searchsorted(positions, rows * self.slice_tokens + within))

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
    causal_places: int | None = None,
    context: tuple[int, int] = (0, 1),
    flat: bool = False,
) -> PackedRows:
    """Boundaries of rows given as lists of chunk lengths; what a row lacks to `seq_len` becomes a segment of its own.

    `slots`: number of each row within the step (default 0, 1, ...), on which dropout masks depend; with `flat` of each
    chunk of the only row. `context`: rank and degree of context parallelism."""
    filled = [[*row, seq_len - sum(row)] if sum(row) < seq_len else list(row) for row in lengths]
    chunks = np.array([n for row in filled for n in row], dtype=np.int64)
    starts, tokens = np.cumsum(chunks) - chunks, int(chunks.sum())
    segments = to_device(torch.from_numpy(np.repeat(np.arange(len(chunks)), chunks)), device)
    positions = to_device(torch.from_numpy(np.arange(tokens) - np.repeat(starts, chunks)), device)
    boundaries = to_device(torch.from_numpy(np.concatenate([starts, [tokens]]).astype(np.int32)), device)
    numbers = list(range(len(filled)) if slots is None else slots)
    if flat:
        numbers += [0] * (len(chunks) - len(numbers))  # the padding at the end has no slot
    longest = int(chunks.max())
    return PackedRows(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        seq_len=seq_len,
        chunk_lengths=tuple(chunks.tolist()),
        segments=segments,
        positions=positions,
        slots=to_device(torch.tensor(numbers), device),
        flat=flat,
        dropout_key=dropout_key,
        first_place=context[0] * (seq_len // context[1]),
        slice_tokens=seq_len // context[1],
        causal_places=causal_places,
    )
