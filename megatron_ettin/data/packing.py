"""Best-fit packing of whole chunks into rows, window by window.

Within a window of chunks each row takes the longest chunk left, then again and again the longest that still fits.
The lengths on hand are the bits of one Python integer, so "the longest that fits" is a mask and a bit_length: no tree,
no numpy call per chunk, about a microsecond a chunk. Memory is bounded by the window. Rows that a window could not
fill hand their chunks on to the next one, as long as they are few; the very last window keeps what it has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

WINDOW_CHUNKS = 65_536
FULL_ENOUGH = 0.985  # rows below are tried again with the next window's chunks
CARRIED_CHUNKS = WINDOW_CHUNKS // 4  # at most so many are

Int64Array = npt.NDArray[np.int64]


def pack(lengths: npt.NDArray[np.integer], row_tokens: int) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Pack chunks 0 .. n-1 of the given lengths (1 .. row_tokens each). Yields windows of rows as
    (chunk numbers, row after row; how many chunks each row has). Every chunk comes exactly once."""
    carried = np.zeros(0, np.int64)
    for first in range(0, len(lengths), WINDOW_CHUNKS):
        last = min(first + WINDOW_CHUNKS, len(lengths))
        window = np.concatenate([carried, np.arange(first, last, dtype=np.int64)])
        chunks, counts = pack_window(window, lengths, row_tokens)
        if last == len(lengths):
            carried = np.zeros(0, np.int64)
        else:
            chunks, counts, carried = split_off_unfilled(chunks, counts, lengths, row_tokens)
        if len(counts):
            yield chunks, counts


def pack_window(window: Int64Array, lengths: npt.NDArray[np.integer], row_tokens: int) -> tuple[Int64Array, Int64Array]:
    window_lengths = np.asarray(lengths[window])
    # Per length, the chunks that have it, last first, so that pop() gives them in order.
    by_length = np.lexsort((-window, window_lengths))
    sorted_lengths = window_lengths[by_length]
    distinct, starts = np.unique(sorted_lengths, return_index=True)
    stacks: dict[int, list[int]] = {}
    for length, ids in zip(distinct.tolist(), np.split(window[by_length], starts[1:]), strict=True):
        stacks[length] = ids.tolist()
    on_hand = sum(1 << length for length in stacks)
    chunks: list[int] = []
    counts: list[int] = []
    masks = [(1 << (room + 1)) - 1 for room in range(row_tokens + 1)] if row_tokens <= 16_384 else None
    while on_hand:
        room, count = row_tokens, 0
        while fits := on_hand & (masks[room] if masks else (1 << (room + 1)) - 1):
            length = fits.bit_length() - 1
            stack = stacks[length]
            chunks.append(stack.pop())
            if not stack:
                on_hand ^= 1 << length
            room -= length
            count += 1
        counts.append(count)
    return np.asarray(chunks, np.int64), np.asarray(counts, np.int64)


def split_off_unfilled(
    chunks: Int64Array, counts: Int64Array, lengths: npt.NDArray[np.integer], row_tokens: int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """(chunks and counts of the rows to keep, chunks to carry to the next window). The emptiest rows are carried."""
    ends = np.cumsum(counts)
    tokens = np.add.reduceat(np.asarray(lengths[chunks], np.int64), ends - counts)
    emptiest_first = np.argsort(tokens, kind="stable")
    carry = np.zeros(len(counts), bool)
    carry[emptiest_first[np.cumsum(counts[emptiest_first]) <= CARRIED_CHUNKS]] = True
    carry &= tokens < FULL_ENOUGH * row_tokens
    of_chunk = np.repeat(carry, counts)
    return chunks[~of_chunk], counts[~carry], np.sort(chunks[of_chunk])
