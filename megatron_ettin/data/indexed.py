"""Read and write Megatron-Core's indexed file format with numpy alone.

Each sequence is a chunk; `document_indices` holds the first chunk of every document and, last, the number of chunks.
Core's own reader imports torch and its builder keeps Python lists; worker processes and `ettin inspect` need neither.
A test opens our shards with core's IndexedDataset, so the two cannot drift apart.

Files that are read in training order are mapped with MADV_RANDOM. Without it, reading a page that is not in memory also
reads the file system's read-ahead, 128 KiB on many hosts and megabytes on some. A look-up of 8 bytes then costs a
millisecond, and the memory of the process seems to grow by the size of the file.
"""

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
# magic, version, dtype code, sequences, documents + 1
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
# Megatron-Core's table without its floats; this package writes uint16 or int32
DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
FLOAT_CODES = {6: "float64", 7: "float32"}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
LARGEST_UINT16_VOCAB = 65_536

IntArray = npt.NDArray[np.integer]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of tokens: uint16 while every id fits, else int32."""
    return np.dtype("<u2") if vocab_size <= LARGEST_UINT16_VOCAB else np.dtype("<i4")


def narrowed(values: npt.NDArray[Any], dtype: np.dtype[Any], what: str) -> npt.NDArray[Any]:
    """Cast whole numbers to `dtype`. Raises UserError naming `what` if one does not fit, which a cast would wrap."""
    limits = np.iinfo(dtype)
    if values.size and (int(values.min()) < limits.min or int(values.max()) > limits.max):
        wrong = int(values.min()) if int(values.min()) < limits.min else int(values.max())
        raise UserError(f"{what}: {wrong} does not fit into {dtype.name} ({limits.min} to {limits.max})")
    return values.astype(dtype)


def index_bytes(chunk_lengths: IntArray, document_indices: IntArray, dtype: np.dtype[Any]) -> bytes:
    """Return the content of an .idx file for chunks of these lengths in tokens; `dtype` is the type of the tokens."""
    lengths = narrowed(np.asarray(chunk_lengths), np.dtype("<i4"), "length of a chunk in tokens")
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
    pointers *= dtype.itemsize
    documents = np.asarray(document_indices, dtype="<i8")
    header = HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], len(lengths), len(documents))
    return b"".join((header, lengths.tobytes(), pointers.tobytes(), documents.tobytes()))


def index_file_bytes(chunks: int, documents: int) -> int:
    """Return the size in bytes of an .idx file with these numbers of chunks and documents."""
    return HEADER.size + 12 * chunks + 8 * (documents + 1)


@dataclass(frozen=True)
class IndexHeader:
    """The header of an .idx file, and the byte offsets of its arrays."""

    path: str
    dtype: np.dtype[Any]
    """Type of the tokens in the .bin."""
    sequences: int
    boundaries: int
    """Entries of `document_indices`: one more than the documents, or 0."""

    @property
    def documents(self) -> int:
        """Return the number of documents."""
        return max(self.boundaries - 1, 0)

    @property
    def pointers_at(self) -> int:
        """Return the byte offset of the array of the sequences' own offsets in the .bin."""
        return HEADER.size + 4 * self.sequences

    @property
    def documents_at(self) -> int:
        """Return the byte offset of the array `document_indices`."""
        return self.pointers_at + 8 * self.sequences


def parse_header(raw: bytes, path: str, index_bytes: int) -> IndexHeader:
    """Parse the header of an .idx file.

    Args:
        raw: the first HEADER.size bytes of the file.
        path: name of the file, for messages.
        index_bytes: size of the file.

    Raises:
        UserError: the file is not a Megatron index of token ids, or is truncated.
    """
    if len(raw) < HEADER.size:
        raise UserError(f"{path}: {len(raw)} bytes, too short for a Megatron index")
    magic, version, code, sequences, boundaries = HEADER.unpack(raw)
    if magic != MAGIC:
        raise UserError(f"{path}: not a Megatron index: begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise UserError(f"{path}: Megatron index version {version}; version {VERSION} is read")
    if code in FLOAT_CODES:
        raise UserError(f"{path}: its values are {FLOAT_CODES[code]}, which are no token ids")
    if code not in DTYPE_OF_CODE:
        raise UserError(f"{path}: unknown dtype code {code}; known: {', '.join(map(str, DTYPE_OF_CODE))}")
    header = IndexHeader(path, DTYPE_OF_CODE[code], sequences, boundaries)
    expected = header.documents_at + 8 * boundaries
    if index_bytes < expected:
        content = f"{sequences} sequences and {boundaries - 1} documents, {expected} bytes"
        raise UserError(f"{path}: truncated, {index_bytes} bytes; its header lists {content}")
    return header


@dataclass(frozen=True)
class MappedShard:
    """One open .bin/.idx pair, memory-mapped."""

    tokens: npt.NDArray[np.integer]
    chunk_lengths: npt.NDArray[np.int32]
    chunk_offsets: npt.NDArray[np.int64]
    """Offset of each chunk in the .bin, in bytes."""
    document_indices: npt.NDArray[np.int64]
    index_path: Path

    def chunk(self, i: int) -> IntArray:
        """Return the tokens of chunk `i`. Raises RankError if it is empty or lies outside of the .bin."""
        first, length = int(self.chunk_offsets[i]) // self.tokens.itemsize, int(self.chunk_lengths[i])
        tokens = self.tokens[first : first + length] if first >= 0 and length > 0 else self.tokens[:0]
        if len(tokens) != length or not length:
            raise RankError(
                f"{self.index_path}: damaged: chunk {i} is {length} tokens from {first:,} on, and the .bin has"
                f" {len(self.tokens):,}; `ettin inspect --verify` tells where"
            )
        return tokens


def open_shard(prefix: Path, scattered: bool = True) -> MappedShard:
    """Memory-map the .bin and .idx files of a shard.

    Args:
        prefix: path without .bin and .idx.
        scattered: whether chunks are read in random order; False if they are read from end to end.

    Raises:
        UserError: the .idx is not a Megatron index, or is truncated.
    """
    index_path = prefix.with_suffix(".idx")
    raw = map_file(index_path, np.uint8, scattered)
    header = parse_header(raw[: HEADER.size].tobytes(), str(index_path), raw.size)
    lengths = np.frombuffer(raw, "<i4", header.sequences, HEADER.size)
    offsets = np.frombuffer(raw, "<i8", header.sequences, header.pointers_at)
    document_indices = np.frombuffer(raw, "<i8", header.boundaries, header.documents_at)
    tokens = map_file(prefix.with_suffix(".bin"), header.dtype, scattered)
    return MappedShard(tokens, lengths, offsets, document_indices, index_path)


def map_file(path: Path, dtype: npt.DTypeLike, scattered: bool = True) -> npt.NDArray[Any]:
    """Map a file as a read-only array of `dtype` [n], for random access if `scattered`. Raises OSError."""
    with open(path, "rb") as stream:
        stream.seek(0, 2)
        size = stream.tell()
        if size == 0:
            return np.zeros(0, dtype)
        mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
    if scattered:
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype, size // np.dtype(dtype).itemsize)


def map_npy(path: Path) -> npt.NDArray[Any]:
    """Map the array of an .npy file for random access."""
    mapped = np.load(path, mmap_mode="r")
    if mapped.size:
        mapped._mmap.madvise(mmap.MADV_RANDOM)
    return np.asarray(mapped)
