"""Compute where the chunks of a micro-batch's rows begin and end, in host memory.

Importing it loads neither torch nor Megatron, so loader workers can use it; model/packed.py copies its results to a
device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Union

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

# a numpy array, or a tensor once `pin_arrays` has pinned it
HostArray = Union["npt.NDArray[np.integer]", "torch.Tensor"]
Record = TypeVar("Record", bound=Any)


@dataclasses.dataclass(frozen=True)
class ChunkBoundaries:
    """Chunk boundaries of a micro-batch in host memory. Shapes: R rows of S tokens, T = R * S, C chunks."""

    seq_len: int
    """Tokens of a row, S."""
    chunk_lengths: tuple[int, ...]
    """C lengths in flat order, padding at the end of rows included; they sum to T."""
    cu_seqlens: HostArray
    """[C + 1] first token of each chunk, and T; int32, as attention kernels take it."""
    segments: HostArray
    """[T] index of each token's chunk."""
    positions: HostArray
    """[T] position of each token within its chunk."""
    slots: HostArray
    """[R] slot of each row within the step; if `flat`, [C] slot of each chunk."""
    flat: bool
    """True if the only row holds the step's rows end to end, one chunk each."""
    causal_tokens: int | None
    """Number of tokens in causal rows, which come first; None: all or none, by the model's objective."""
    slice_start: int
    """First position of this rank's slice of every row, under context parallelism."""
    slice_tokens: int
    """Length of that slice; the whole row without context parallelism."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[Sequence[int]],
        seq_len: int,
        slots: Sequence[int] | None = None,
        causal_tokens: int | None = None,
        context: tuple[int, int] = (0, 1),
        flat: bool = False,
    ) -> ChunkBoundaries:
        """Return the boundaries of rows; the padding of a row becomes a chunk of its own.

        Args:
            lengths: chunk lengths of each row, at most `seq_len` in sum.
            seq_len: tokens of a row.
            slots: slot of each row within the step, on which dropout masks depend; by default 0, 1, ... If `flat`, the
                slot of each chunk but the padding, without a default.
            causal_tokens: how many of the first tokens are in causal rows; None: by the model's objective.
            context: rank and degree of context parallelism.
            flat: whether the only row holds the step's rows end to end, one chunk each.
        """
        filled = [[*row, seq_len - sum(row)] if sum(row) < seq_len else row for row in lengths]
        chunks = np.array([n for row in filled for n in row], dtype=np.int64)
        ends = np.cumsum(chunks)
        starts, tokens = ends - chunks, int(ends[-1])
        numbers = [*(range(len(filled)) if slots is None else slots)]
        if flat:
            # the padding at the end has no slot
            numbers += [0] * (len(chunks) - len(numbers))
        return cls(
            seq_len=seq_len,
            chunk_lengths=tuple(chunks.tolist()),
            cu_seqlens=np.append(starts, tokens).astype(np.int32),
            segments=np.repeat(np.arange(len(chunks)), chunks),
            positions=np.arange(tokens) - np.repeat(starts, chunks),
            slots=np.array(numbers, np.int64),
            flat=flat,
            causal_tokens=causal_tokens,
            slice_start=context[0] * (seq_len // context[1]),
            slice_tokens=seq_len // context[1],
        )

    def count_causal(self, positions: npt.NDArray[np.integer]) -> int:
        """Return how many of the ascending flat `positions` of this rank's slices are in causal rows."""
        rows, rest = divmod(self.causal_tokens or 0, self.seq_len)
        within = min(max(rest - self.slice_start, 0), self.slice_tokens)
        return int(np.searchsorted(positions, rows * self.slice_tokens + within))


def pin_arrays(record: Record) -> Record:
    """Return a copy of a dataclass with page-locked tensors for its arrays, which a GPU copies while it computes."""
    import torch

    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    pinned = {name: torch.from_numpy(array).pin_memory() for name, array in arrays.items()}
    changed: Record = dataclasses.replace(record, **pinned)
    return changed
