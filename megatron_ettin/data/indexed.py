"""Megatron-Core's indexed file format, read and written with numpy alone: one sequence a chunk, `document_indices`
giving the first chunk of every document and, last, the number of chunks.

Core's own reader imports torch and the builder keeps Python lists; worker processes and `ettin inspect` need neither.
A test opens our shards with core's IndexedDataset, so the two cannot drift apart.

Memory maps of files that are read a little at a time, at places all over them.

A page that is not in memory brings the file system's whole read-ahead with it, 128 KiB on many machines and megabytes
on some: a look-up of 8 bytes then costs a millisecond, and the process seems to hold the file. Advice keeps it to the
page. Whoever reads a file from end to end opens it in the ordinary way instead."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import RankError, UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
VERSION = 1
# core's table without its floats (6 and 7); what is written here is uint16 or int32
DTYPE_OF_CODE: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
LARGEST_UINT16_VOCAB = 65_536

IntArray = npt.NDArray[np.integer]


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits, else int32."""
    return np.dtype("<u2") if vocab_size <= LARGEST_UINT16_VOCAB else np.dtype("<i4")


def narrowed(values: npt.NDArray[Any], dtype: np.dtype, what: str) -> npt.NDArray[Any]:
    """Return whole numbers as `dtype`. Raises UserError naming `what` where one does not fit: a cast would wrap it."""
    limits = np.iinfo(dtype)
    if values.size and (int(values.min()) < limits.min or int(values.max()) > limits.max):
        wrong = int(values.min()) if int(values.min()) < limits.min else int(values.max())
        raise UserError(f"{what}: {wrong} does not fit into {dtype.name} ({limits.min} to {limits.max})")
    return values.astype(dtype)


def index_bytes(chunk_lengths: IntArray, document_indices: IntArray, dtype: np.dtype) -> bytes:
    """The content of an .idx file."""
    lengths = narrowed(np.asarray(chunk_lengths), np.dtype("<i4"), "length of a chunk in tokens")
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
    pointers *= dtype.itemsize
    documents = np.asarray(document_indices, dtype="<i8")
    header = HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], len(lengths), len(documents))
    return b"".join((header, lengths.tobytes(), pointers.tobytes(), documents.tobytes()))


def index_file_bytes(chunks: int, documents: int) -> int:
    """The size of an .idx file with so many chunks and documents."""
    return HEADER.size + 12 * chunks + 8 * (documents + 1)


@dataclass(frozen=True)
class Shard:
    """One open .bin/.idx pair, memory-mapped."""

    tokens: npt.NDArray[np.integer]
    chunk_lengths: npt.NDArray[np.int32]
    chunk_offsets: npt.NDArray[np.int64]  # bytes into the .bin
    document_indices: npt.NDArray[np.int64]
    index_path: Path

    def chunk(self, i: int) -> IntArray:
        """The tokens of a chunk. Raises RankError where the index places them outside of the .bin."""
        first, length = int(self.chunk_offsets[i]) // self.tokens.itemsize, int(self.chunk_lengths[i])
        tokens = self.tokens[first : first + length] if first >= 0 and length > 0 else self.tokens[:0]
        if len(tokens) != length or not length:
            raise RankError(
                f"{self.index_path}: damaged: chunk {i} is {length} tokens from {first:,} on, and the .bin has"
                f" {len(self.tokens):,}; `ettin inspect --verify` tells where"
            )
        return tokens


def open_shard(prefix: Path, scattered: bool = True) -> Shard:
    """`prefix` is the path without .bin and .idx. `scattered`: chunks are read in training order, all over the files,
    and reading ahead would fetch what nobody asked for; False for going through it from end to end."""
    index_path = prefix.with_suffix(".idx")
    mapped = map_scattered if scattered else map_in_order
    raw = mapped(index_path, np.dtype(np.uint8))
    if raw.size < HEADER.size:
        raise UserError(f"{index_path}: {raw.size} bytes, too short for a Megatron index")
    magic, version, code, chunks, documents = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC or version != VERSION or code not in DTYPE_OF_CODE:
        raise UserError(f"{index_path}: not a Megatron index of version {VERSION} with tokens of an integer type")
    if raw.size < HEADER.size + 12 * chunks + 8 * documents:
        raise UserError(f"{index_path}: {raw.size} bytes, but its header tells of {chunks} chunks: truncated")
    place = HEADER.size
    lengths = np.frombuffer(raw, dtype="<i4", count=chunks, offset=place)
    place += lengths.nbytes
    offsets = np.frombuffer(raw, dtype="<i8", count=chunks, offset=place)
    place += offsets.nbytes
    document_indices = np.frombuffer(raw, dtype="<i8", count=documents, offset=place)
    dtype: np.dtype = DTYPE_OF_CODE[int(code)]
    return Shard(mapped(prefix.with_suffix(".bin"), dtype), lengths, offsets, document_indices, index_path)


def map_scattered(path: Path, dtype: npt.DTypeLike) -> npt.NDArray:
    """The file as a read-only array of `dtype` [n] for reading at random places. Raises OSError."""
    with open(path, "rb") as stream:
        stream.seek(0, 2)
        size = stream.tell()
        if size == 0:
            return np.zeros(0, dtype)
        mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype, size // np.dtype(dtype).itemsize)


def map_npy(path: Path) -> npt.NDArray:
    """The array of an .npy file, for reading at random places."""
    mapped = np.load(path, mmap_mode="r")
    if mapped.size:
        mapped._mmap.madvise(mmap.MADV_RANDOM)
    return np.asarray(mapped)


def map_in_order(path: Path, dtype: npt.DTypeLike) -> npt.NDArray:
    """The same for reading from end to end."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)
