"""Find the samples of a published order, which are token ids, in the datasets by their content.

This is a streaming join: hash every sample of the files, then scan the datasets once and look up each chunk's hash.
Memory holds about 32 bytes a sample (its hash, its index by hash, its chunk twice) and one batch of tokens. Special
tokens around a sample or chunk do not count, nor do tokens beyond those that a row can hold, because trainers differ in
what they add and where they cut. Hashes have 64 bits: among 10**9 samples and as many chunks the chance that one of
them is matched falsely is some 5 %. Equal samples get the first chunk that has their content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.base.paths import Links
from megatron_ettin.data.dataset import Dataset
from megatron_ettin.data.hashing import GOLDEN, UInt64Array, mix64
from megatron_ettin.data.indexed import open_shard
from megatron_ettin.data.manifest import TokenizerRecord, shard_file
from megatron_ettin.data.packing import pack
from megatron_ettin.data.packing_index import check_rows
from megatron_ettin.data.replay.files import RecordedRows, open_parquet

# consecutive samples that are packed together
WINDOW_SAMPLES = 4_096
# tokens hashed at once, which takes some 100 MB for intermediate arrays
BATCH_TOKENS = 1 << 21
SPREAD_SAMPLES = 1 << 20
UNMATCHED = -1
# a chunk of the mixture as one number: source << SOURCE_SHIFT | chunk
SOURCE_SHIFT = 44

Int64Array = npt.NDArray[np.int64]
IntArray = npt.NDArray[np.integer]


def published_rows(
    paths: Sequence[Path], datasets: Sequence[Dataset], seq_len: int, batching: str, missing: str
) -> Iterator[RecordedRows]:
    """Yield the rows of the samples in order. `padded`: one row per sample; else packed in windows of WINDOW_SAMPLES.

    Raises:
        UserError: some samples are in no dataset and `missing` is not "skip", or chunks do not fit rows of `seq_len`.
    """
    for dataset in datasets:
        check_rows(dataset, seq_len, batching)
    tokenizer = datasets[0].manifest.tokenizer
    samples = [open_parquet(path).metadata.num_rows for path in paths]
    hashes = np.empty(sum(samples), np.uint64)
    for path, end, count in zip(paths, np.cumsum(samples).tolist(), samples, strict=True):
        hashes[end - count : end] = sample_hashes(path, tokenizer, seq_len)
    matches = find_chunks(hashes, datasets, seq_len)
    lost = np.flatnonzero(matches == UNMATCHED)
    if lost.size and (missing == "error" or lost.size == matches.size):
        ends = np.cumsum(samples)
        file = int(np.searchsorted(ends, lost[0], side="right"))
        index = int(lost[0] - (ends[file] - samples[file]))
        row = int(order_by_step(paths[file])[index])
        raise UserError(
            f"data.order: {lost.size:,} of {matches.size:,} samples are in no dataset of data.mixture"
            f" ({100 * (1 - lost.size / matches.size):.2f} % are), the first in {paths[file]} row {row};"
            " add their datasets, or leave them out with data.order_missing=skip"
        )
    matches = matches[matches != UNMATCHED]
    first = 0
    for begin in range(0, len(matches), WINDOW_SAMPLES):
        window = matches[begin : begin + WINDOW_SAMPLES]
        rows = window_rows(window >> SOURCE_SHIFT, window & ((1 << SOURCE_SHIFT) - 1), datasets, seq_len, batching)
        numbers = np.arange(first, first + len(rows[1]))
        first += len(numbers)
        yield RecordedRows(*rows, numbers, skipped_samples=lost.size if begin == 0 else 0)


def window_rows(
    sources: Int64Array, chunks: Int64Array, datasets: Sequence[Dataset], seq_len: int, batching: str
) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """Pack the samples of one window into rows, sorted by the first of their samples.

    Returns:
        Source of each row, number of chunks of each row, chunk numbers row after row, number of tokens of each row.
    """
    lengths = np.empty(len(chunks), np.int64)
    row_of, num_rows = np.empty(len(chunks), np.int64), 0
    for s in np.unique(sources).tolist():
        of_source = np.flatnonzero(sources == s)
        lengths[of_source] = np.minimum(datasets[s].lengths_of(chunks[of_source]), seq_len)
        if batching == "padded":
            continue
        for members, counts in pack(lengths[of_source], seq_len):
            row_of[of_source[members]] = num_rows + np.repeat(np.arange(len(counts)), counts)
            num_rows += len(counts)
    if batching == "padded":
        return sources, np.ones_like(chunks), chunks, lengths
    _, first_of_row, row = np.unique(row_of, return_index=True, return_inverse=True)
    # for each sample, the first sample of its row
    leader = first_of_row[row]
    in_order = np.argsort(leader, kind="stable")
    first, counts = np.unique(leader, return_counts=True)
    tokens = np.add.reduceat(lengths[in_order], np.cumsum(counts) - counts)
    return sources[first], counts, chunks[in_order], tokens


def find_chunks(hashes: UInt64Array, datasets: Sequence[Dataset], seq_len: int) -> Int64Array:
    """Return source << SOURCE_SHIFT | chunk of each sample, or UNMATCHED. Sorts `hashes` in place."""
    by_hash = np.argsort(hashes, kind="stable")
    hashes.sort()
    # only the first of equal hashes gets its chunk in the loop below
    matches = np.full(len(hashes), UNMATCHED, np.int64)
    wanted = 1 + int(np.count_nonzero(hashes[1:] != hashes[:-1])) if len(hashes) else 0
    for source, dataset in enumerate(datasets):
        for first, of_chunk in chunk_hashes(dataset, seq_len):
            if wanted == 0:
                break
            # looked up in the order of `hashes`, because random look-ups would miss every cache
            by_value = np.argsort(of_chunk)
            index = np.empty(len(of_chunk), np.int64)
            index[by_value] = np.minimum(np.searchsorted(hashes, of_chunk[by_value]), len(hashes) - 1)
            hit = np.flatnonzero((hashes[index] == of_chunk) & (matches[index] == UNMATCHED))[::-1]
            # the hits are in reverse, so that the first of equal chunks is written last
            matches[index[hit]] = (source << SOURCE_SHIFT) + first + hit
            wanted -= len(np.unique(index[hit]))
    # the other samples with an equal hash get the same chunk
    leader = 0
    for begin in range(0, len(hashes), SPREAD_SAMPLES):
        indices = np.arange(begin, min(begin + SPREAD_SAMPLES, len(hashes)))
        new = (indices == 0) | (hashes[indices] != hashes[np.maximum(indices - 1, 0)])
        leaders = np.maximum.accumulate(np.where(new, indices, leader))
        matches[indices] = matches[leaders]
        leader = int(leaders[-1])
    in_order = np.empty_like(matches)
    in_order[by_hash] = matches
    return in_order


def chunk_hashes(dataset: Dataset, seq_len: int) -> Iterator[tuple[int, UInt64Array]]:
    """Yield (number of the first chunk, hashes by `content_hashes`) for consecutive batches of chunks."""
    first = 0
    for record in dataset.manifest.shards:
        shard = open_shard(shard_file(dataset.path, record, "", Links.UNCHECKED), scattered=False)
        lengths = np.asarray(shard.chunk_lengths, np.int64)
        ends = np.cumsum(lengths)
        begin = 0
        while begin < len(lengths):
            start = int(ends[begin] - lengths[begin])
            end = max(begin + 1, int(np.searchsorted(ends, start + BATCH_TOKENS, side="right")))
            tokens = shard.tokens[start : int(ends[end - 1])]
            yield first + begin, content_hashes(tokens, lengths[begin:end], dataset.manifest.tokenizer, seq_len - 2)
            begin = end
        first += len(lengths)


def sample_hashes(path: Path, tokenizer: TokenizerRecord, seq_len: int) -> UInt64Array:
    """Return the hashes (`content_hashes`) of a file's samples, in the order of their steps. Raises UserError."""
    import pyarrow

    file, parts = open_parquet(path), [np.zeros(0, np.uint64)]
    dtype, row, types = file.schema_arrow.field("input_ids").type, 0, pyarrow.types
    nested = types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype)
    if not nested or not types.is_integer(dtype.value_type):
        raise UserError(f"data.order: {path}: column input_ids holds {dtype}, wanted lists of token ids")
    try:
        for batch in file.iter_batches(max(1, BATCH_TOKENS // seq_len), columns=["input_ids"]):
            column = batch.column(0).cast(pyarrow.large_list(dtype.value_type))
            if column.null_count:
                raise UserError(f"data.order: {path}: row {row + int(np.argmin(column.is_valid()))} has no input_ids")
            lengths = np.asarray(column.value_lengths()).astype(np.int64)
            parts.append(content_hashes(np.asarray(column.flatten()), lengths, tokenizer, seq_len - 2))
            row += len(lengths)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"data.order: {path}: damaged ({first_line(error)})") from None
    return np.concatenate(parts)[order_by_step(path)]


def order_by_step(path: Path) -> Int64Array:
    """Return the row numbers of a file sorted by its column `step`; in the order of the file if it has none."""
    file = open_parquet(path)
    if "step" not in file.schema_arrow.names:
        return np.arange(file.metadata.num_rows)
    steps = np.asarray(file.read(columns=["step"]).column(0).combine_chunks())
    return np.argsort(steps, kind="stable")


def content_hashes(tokens: IntArray, lengths: Int64Array, tokenizer: TokenizerRecord, limit: int) -> UInt64Array:
    """Return a 64-bit hash of the first `limit` tokens of each sequence, special tokens around it left out.

    `tokens` holds the sequences one after another. One [CLS] before, any [PAD] after and then one [SEP] are left out.
    """
    if len(tokens) == 0:
        return mix64(np.zeros(len(lengths), np.uint64))
    ends = np.cumsum(lengths)
    begins = ends - lengths
    start = begins.copy()
    padded = np.flatnonzero(ends > start)
    while (padded := padded[tokens[ends[padded] - 1] == tokenizer.pad_id]).size:
        ends[padded] -= 1
        padded = padded[ends[padded] > start[padded]]
    ends -= (ends > start) & (tokens[np.maximum(ends - 1, 0)] == tokenizer.sep_id)
    start += (ends > start) & (tokens[np.minimum(start, len(tokens) - 1)] == tokenizer.cls_id)
    ends = np.minimum(ends, start + limit)
    offsets = np.arange(len(tokens)) - np.repeat(start, lengths)
    hashes = mix64((tokens.astype(np.uint64) << np.uint64(32)) ^ offsets.astype(np.uint64))
    sums = np.zeros(len(tokens) + 1, np.uint64)
    # modulo 2**64: a difference of two is the sum between them
    np.cumsum(hashes, out=sums[1:])
    return mix64(sums[ends] - sums[start] + (ends - start).astype(np.uint64) * np.uint64(GOLDEN))
