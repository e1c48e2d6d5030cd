"""Pack whole chunks into rows by best fit, window by window, and write the files of a packing index.

Within a window of chunks each row takes the longest unused chunk, then repeatedly the longest that still fits. The
lengths in use are the bits of one Python integer, so a mask and a bit_length find the longest that fits, in about a
microsecond a chunk. Memory is bounded by the window. The chunks of rows that a window could not fill are packed again
with the next window, up to CARRIED_CHUNKS of them. The last window's rows stay as they are.

One process or several write the files in bounded memory. Chunks are split into segments of SEGMENT_CHUNKS by their
number alone, and each segment is packed separately. So the bytes do not depend on which process packed which segment. A
process holds the lengths of one segment (16 MiB) and one window. The parts of several processes are joined in order.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError, serve_parent
from megatron_ettin.base.paths import Links
from megatron_ettin.data.dataset import Dataset
from megatron_ettin.data.indexed import HEADER
from megatron_ettin.data.manifest import FileRecord, shard_file
from megatron_ettin.data.row_files import CHUNKS_FILE, ENDS_FILE, PACKING_DTYPES, TOKENS_FILE, RowWriter

WINDOW_CHUNKS = 65_536
# rows that are less full are tried again with the next window's chunks, up to CARRIED_CHUNKS of them
FULL_ENOUGH = 0.985
CARRIED_CHUNKS = WINDOW_CHUNKS // 4

Int64Array = npt.NDArray[np.int64]


def pack(lengths: npt.NDArray[np.integer], row_tokens: int) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Pack chunks 0 .. n-1 of the given lengths (1 .. row_tokens each) into rows. Every chunk is in exactly one row.

    Yields:
        For each window of rows: the chunk numbers, row after row, and the number of chunks of each row.
    """
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
    """Pack the chunks of one window; return chunk numbers, row after row, and the number of chunks of each row."""
    window_lengths = np.asarray(lengths[window])
    # the chunks of each length, last first, so that pop() gives them in order
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
    """Split off the emptiest rows. Returns chunks and counts of the rows to keep, and the chunks to pack again."""
    ends = np.cumsum(counts)
    tokens = np.add.reduceat(np.asarray(lengths[chunks], np.int64), ends - counts)
    emptiest_first = np.argsort(tokens, kind="stable")
    carry = np.zeros(len(counts), bool)
    carry[emptiest_first[np.cumsum(counts[emptiest_first]) <= CARRIED_CHUNKS]] = True
    carry &= tokens < FULL_ENOUGH * row_tokens
    of_chunk = np.repeat(carry, counts)
    return chunks[~of_chunk], counts[~carry], np.sort(chunks[of_chunk])


SEGMENT_CHUNKS = 64 * WINDOW_CHUNKS
JOINED_ROWS = 1 << 20

# chunk numbers, row after row; number of chunks of each row; tokens of each row
Packed = tuple[Int64Array, Int64Array, Int64Array]


def write_packed(folder: Path, dataset: Dataset, seq_len: int, workers: int) -> tuple[int, int, dict[str, FileRecord]]:
    """Pack all chunks of a dataset into the files of an index.

    Returns:
        Number of rows, number of tokens, and the record of each file.
    """
    segments = -(-dataset.num_chunks // SEGMENT_CHUNKS)
    with RowWriter(folder, PACKING_DTYPES) as files:
        done = 0
        if min(workers, segments) > 1:
            # the pool breaks if the kernel kills a worker; this process then packs the rest
            with contextlib.suppress(BrokenProcessPool):
                for part in parts_in_order(folder, dataset, seq_len, min(workers, segments), segments):
                    join_part(part, files)
                    done += 1
        for segment in range(done, segments):
            for rows in packed_windows(dataset, segment, seq_len):
                files.append(*rows)
        records = files.finish()
    # parts of a pool that broke
    for part in list(folder.glob("part_*")):
        part.unlink()
    return files.rows, files.tokens, records


def packed_windows(dataset: Dataset, segment: int, seq_len: int) -> Iterator[Packed]:
    """Yield the rows of one segment, window by window. Raises UserError if a chunk's length is not 1 to `seq_len`."""
    first = segment * SEGMENT_CHUNKS
    lengths = read_lengths(dataset, first, min(first + SEGMENT_CHUNKS, dataset.num_chunks))
    if len(lengths) and not (int(lengths.min()) >= 1 and int(lengths.max()) <= seq_len):
        raise UserError(
            f"dataset {dataset.path}: a chunk of {lengths.min()} or {lengths.max()} tokens among chunks {first} to "
            f"{first + len(lengths) - 1}, rows hold 1 to {seq_len}: damaged; `ettin inspect --verify` tells where"
        )
    for chunks, counts in pack(lengths, seq_len):
        starts = np.cumsum(counts) - counts
        yield chunks + first, counts, np.add.reduceat(lengths[chunks].astype(np.int64), starts)


def read_lengths(dataset: Dataset, first: int, end: int) -> npt.NDArray[np.int32]:
    """Read the lengths of chunks [first, end) in tokens. No file is mapped, because mapped pages count as memory."""
    shards = dataset.manifest.shards
    begins = np.cumsum([0] + [shard.chunks for shard in shards])
    parts = [np.zeros(0, "<i4")]
    shard = int(np.searchsorted(begins, first, side="right")) - 1
    while first < end:
        stop = min(end, int(begins[shard + 1]))
        path = shard_file(dataset.path, shards[shard], ".idx", Links.UNCHECKED)
        offset = HEADER.size + 4 * (first - int(begins[shard]))
        parts.append(np.fromfile(path, "<i4", count=stop - first, offset=offset))
        if len(parts[-1]) != stop - first:
            raise UserError(f"{path}: truncated while it was read")
        first, shard = stop, shard + 1
    return np.concatenate(parts)


def parts_in_order(folder: Path, dataset: Dataset, seq_len: int, workers: int, segments: int) -> Iterator[Path]:
    """Pack segments in worker processes, and yield the path prefix of each segment's part files, in order.

    At most 2 * `workers` segments are in work or on disk at a time.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=serve_parent) as pool:
        waiting: deque[Future[Path]] = deque()
        try:
            for segment in range(segments):
                waiting.append(pool.submit(_pack_part, folder, dataset, seq_len, segment))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _pack_part(folder: Path, dataset: Dataset, seq_len: int, segment: int) -> Path:
    """Pack one segment into its own part files. Returns their path without the name of the column."""
    prefix = f"part_{segment:06d}."
    with RowWriter(folder, PACKING_DTYPES, prefix) as files:
        for rows in packed_windows(dataset, segment, seq_len):
            files.append(*rows)
    return folder / prefix


def join_part(prefix: Path, files: RowWriter) -> None:
    """Append the rows of a segment's part files to `files`, and remove the part files."""
    paths = {name: Path(f"{prefix}{name}") for name in PACKING_DTYPES}
    num_rows = paths[TOKENS_FILE].stat().st_size // PACKING_DTYPES[TOKENS_FILE].itemsize
    chunks_before = 0
    for row in range(0, num_rows, JOINED_ROWS):
        count = min(JOINED_ROWS, num_rows - row)
        ends = np.fromfile(paths[ENDS_FILE], "<i8", count, offset=8 * row)
        tokens = np.fromfile(paths[TOKENS_FILE], "<i4", count, offset=4 * row)
        chunks_end = int(ends[-1])
        chunks = np.fromfile(paths[CHUNKS_FILE], "<i8", chunks_end - chunks_before, offset=8 * chunks_before)
        files.append(chunks, np.diff(ends, prepend=chunks_before), tokens)
        chunks_before = chunks_end
    for path in paths.values():
        path.unlink()
