"""Make huge corpora for benchmarks: sparse files of the real formats, with content only in the rows that will be read.

A dataset of 10**9 rows of 1,024 tokens has 2 TB, but takes a few megabytes of disk.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
from pathlib import Path

import numpy as np

from megatron_ettin.base.files import write_json
from megatron_ettin.data.blended_dataset import open_blended_dataset
from megatron_ettin.data.indexed import CODE_OF_DTYPE, HEADER, MAGIC, VERSION, index_file_bytes
from megatron_ettin.data.manifest import (
    FILE_NAME,
    SHARD_SUFFIXES,
    FileRecord,
    Manifest,
    ShardRecord,
    SourceRecord,
    TokenizerRecord,
)
from megatron_ettin.data.mixture import MixtureEntry
from megatron_ettin.data.row_files import CHUNKS_FILE, ENDS_FILE, TOKENS_FILE, PackingRecord

DTYPE = np.dtype("<u2")
VOCABULARY = 50_368
SEED, PHASE = 21, "pretrain"


def make_sparse_dataset(folder: Path, rows: int, row_tokens: int) -> None:
    """Make a dataset of `rows` chunks of `row_tokens` tokens and its packing index, one chunk a row, all holes."""
    folder.mkdir(parents=True)
    name = "shard_00000"
    sizes = {
        ".bin": rows * row_tokens * DTYPE.itemsize,
        ".idx": index_file_bytes(rows, 1),
        ".starts.npy": write_starts_header(folder / f"{name}.starts.npy", rows),
        ".documents.arrow": write_one_document(folder / f"{name}.documents.arrow", rows * row_tokens),
        ".checksums.json": (folder / f"{name}.checksums.json").write_text("{}\n"),
    }
    for suffix, size in sizes.items():
        with open(folder / (name + suffix), "ab") as stream:
            stream.truncate(size)
    with open(folder / f"{name}.idx", "r+b") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[DTYPE], rows, 2))
        stream.seek(sizes[".idx"] - 8)
        stream.write(np.int64(rows).tobytes())
    nothing = "0" * 64
    files = {suffix: FileRecord(sizes[suffix], nothing) for suffix in SHARD_SUFFIXES}
    tokens = rows * row_tokens
    specials = (50_280, 50_281, 50_282, 50_283, 50_284)
    manifest = Manifest(
        tokenizer=TokenizerRecord("ettin", nothing, VOCABULARY, specials, 50_281, 50_282, 50_283, 50_284),
        dtype=DTYPE.name,
        chunk_tokens=row_tokens,
        min_chunk_tokens=0,
        skip_tokens=0,
        end_token="every",
        add_prefix_space=True,
        holdout=0.0,
        documents=1,
        chunks=rows,
        tokens=tokens,
        longest_chunk_tokens=row_tokens,
        dropped_tokens=0,
        empty_documents=0,
        sources=[SourceRecord("fake", 1, rows, tokens)],
        shards=[ShardRecord(name, 1, rows, tokens, files)],
        tokenizer_files={},
        settings_sha256=nothing,
    ).with_fingerprint()
    write_json(folder / FILE_NAME, dataclasses.asdict(manifest))
    make_sparse_plan(folder / f"rows_{row_tokens}", manifest.fingerprint, rows, row_tokens)


def make_sparse_plan(folder: Path, fingerprint: str, rows: int, row_tokens: int) -> None:
    folder.mkdir()
    sizes = {CHUNKS_FILE: 8 * rows, ENDS_FILE: 8 * rows, TOKENS_FILE: 4 * rows}
    for name, size in sizes.items():
        with open(folder / name, "wb") as stream:
            stream.truncate(size)
    files = {name: FileRecord(size, "0" * 64) for name, size in sizes.items()}
    record = PackingRecord(fingerprint, row_tokens, "packed", rows, rows * row_tokens, files)
    (folder / "plan.json").write_text(json.dumps(dataclasses.asdict(record)))


def write_starts_header(path: Path, rows: int) -> int:
    """Write the header of an .npy of `rows` int64 and return the size of the whole file."""
    with open(path, "wb") as stream:
        header = {"descr": "<i8", "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(stream, header)
        return stream.tell() + 8 * rows


def write_one_document(path: Path, tokens: int) -> int:
    import pyarrow
    import pyarrow.ipc

    columns = {
        "source": pyarrow.array(["fake"]).dictionary_encode(),
        "document_id": pyarrow.array(["fake:1"], pyarrow.large_string()),
        "tokens": pyarrow.array([tokens], pyarrow.int64()),
    }
    batch = pyarrow.record_batch(columns)
    with pyarrow.OSFile(str(path), "wb") as stream, pyarrow.ipc.new_file(stream, batch.schema) as writer:
        writer.write_batch(batch)
    return os.path.getsize(path)


def fill_positions(folders: list[Path], row_tokens: int, positions: range) -> None:
    """Write the rows at `positions` of the mixture of these datasets with equal weights."""
    corpus = open_blended_dataset(
        [MixtureEntry(str(f), weight=1.0) for f in folders], row_tokens, "packed", SEED, PHASE
    )
    sources, rows, _ = corpus.locate(np.arange(positions.start, positions.stop))
    for source, folder in enumerate(folders):
        fill_rows(folder, np.unique(rows[sources == source]), row_tokens)


def fill_rows(folder: Path, rows: np.ndarray, row_tokens: int) -> None:
    plan = folder / f"rows_{row_tokens}"
    total = os.path.getsize(plan / TOKENS_FILE) // 4
    chunks = writable(plan / CHUNKS_FILE, "<i8", 0, total)
    ends = writable(plan / ENDS_FILE, "<i8", 0, total)
    tokens = writable(plan / TOKENS_FILE, "<i4", 0, total)
    chunks[rows], ends[rows], tokens[rows] = rows, rows + 1, row_tokens
    before = rows[rows > 0] - 1
    ends[before] = before + 1
    index = folder / "shard_00000.idx"
    lengths = writable(index, "<i4", HEADER.size, total)
    offsets = writable(index, "<i8", HEADER.size + 4 * total, total)
    lengths[rows], offsets[rows] = row_tokens, rows * row_tokens * DTYPE.itemsize


def writable(path: Path, dtype: str, offset: int, count: int) -> np.memmap:
    """Return a memory map in which touching a page does not load its neighbours, which are holes."""
    mapped = np.memmap(path, dtype, "r+", offset, (count,))
    mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return mapped
