"""Boundaries of chunks against a walk through the tokens, one by one."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from megatron_ettin.model.boundaries import ChunkBoundaries

ROWS = [[5, 3], [], [8], [1, 1, 2]]


def test_chunk_boundaries_match_walk_through_tokens() -> None:
    """Every row is filled up to 8 tokens with a chunk of padding."""
    boundaries = ChunkBoundaries.of(ROWS, 8, slots=[4, 5, 6, 7])
    chunks = [5, 3, 8, 8, 1, 1, 2, 4]
    assert boundaries.chunk_lengths == tuple(chunks)
    assert boundaries.segments.tolist() == [chunk for chunk, n in enumerate(chunks) for _ in range(n)]
    assert boundaries.positions.tolist() == [i for n in chunks for i in range(n)]
    assert boundaries.cu_seqlens.tolist() == [sum(chunks[:i]) for i in range(len(chunks) + 1)]
    assert boundaries.cu_seqlens.dtype == np.int32
    assert boundaries.slots.tolist() == [4, 5, 6, 7]


def test_chunk_boundaries_of_flat_rows_give_padding_slot_0() -> None:
    boundaries = ChunkBoundaries.of([[3, 4]], 16, slots=[9, 10], flat=True)
    assert boundaries.chunk_lengths == (3, 4, 9)
    assert boundaries.slots.tolist() == [9, 10, 0]


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("causal_tokens", [0, 8, 11, 24, 32])
def test_count_causal_of_context_parallel_slices_matches_count(cp: int, causal_tokens: int) -> None:
    """Labels stand at every third token; a rank holds the same slice of every row."""
    labelled = np.arange(32) % 3 == 0
    for rank in range(cp):
        boundaries = ChunkBoundaries.of(ROWS, 8, causal_tokens=causal_tokens, context=(rank, cp))
        ours = slice(boundaries.slice_start, boundaries.slice_start + boundaries.slice_tokens)
        own = labelled.reshape(4, 8)[:, ours].reshape(-1)
        expected = int((labelled & (np.arange(32) < causal_tokens)).reshape(4, 8)[:, ours].sum())
        assert boundaries.count_causal(np.flatnonzero(own)) == expected


def test_boundaries_import_no_torch() -> None:
    code = "import sys, megatron_ettin.model.boundaries; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
