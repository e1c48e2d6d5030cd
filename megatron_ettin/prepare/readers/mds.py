"""Read the samples of an MDS shard, one after another. A compressed shard is decompressed as it is read.

A shard is: the number of samples n (uint32), n + 1 offsets of their bounds (uint32), the columns as JSON, the samples.
A sample is: the size (uint32) of each column whose size varies, then the columns. The encoding of an `ndarray` column
has its dtype and shape ("ndarray:uint16:10,20"). If it leaves one out, the data has it before the values. Memory is
bounded by a shard's offsets (some 20 bytes a sample) and one sample. The hashes of the index are checked while reading,
so that a damaged shard never becomes part of a dataset.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.prepare.input_file import (
    BLOCK_BYTES,
    COMPRESSED_BLOCK_BYTES,
    InputFile,
    Segment,
    decompressed,
    raw_blocks,
)
from megatron_ettin.prepare.readers.columns import choose_columns
from megatron_ettin.prepare.readers.document import Document, ReadOptions, document_tokens
from megatron_ettin.prepare.readers.mds_index import MdsShard, index_of, shard_from_json

SIZE = struct.Struct("<I")
# dtypes of the sizes in a shape, by the two low bits of the byte before them
SHAPE_DTYPES = ("<u1", "<u2", "<u4", "<u8")
# the byte before values whose encoding names no dtype -> dtype
VALUE_DTYPES = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    18: "float16",
    32: "uint32",
    33: "int32",
    34: "float32",
    64: "uint64",
    65: "int64",
    66: "float64",
}
INTEGER_ENCODINGS = {"int": "int64", **{name: name for name in VALUE_DTYPES.values() if "int" in name}}
TEXT_ENCODINGS = ("str", "str_int")


def mds_documents(segment: Segment, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of a shard. Raises UserError.

    If reading fails, the shard's hashes are checked, so that the message is that the shard is damaged and not, for
    example, that a token id is wrong.
    """
    shard = shard_from_json(segment.file.detail)
    try:
        yield from shard_documents(segment.file, shard, options)
    except UserError:
        stored = HashedBlocks(raw_blocks(segment.file.url, BLOCK_BYTES), shard.file_hashes)
        for _ in stored:
            pass
        stored.check(segment.file.url, index_of(segment.file))
        raise


def shard_documents(file: InputFile, shard: MdsShard, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of a shard. A damaged one raises UserError, at its end at the latest."""
    encodings = {name: encoding for name, encoding, _ in shard.columns}
    columns = choose_columns(encodings, options, index_of(file), lambda encoding: encoding == "str", is_id_array)
    numbers = {name: i for i, (name, *_) in enumerate(shard.columns)}
    for number, sample in enumerate(samples(file, shard)):
        where = f"{file.url}#{number}"
        name = None if columns.id is None else scalar(sample[numbers[columns.id]], encodings[columns.id], where)
        name = f"{file.name}#{number}" if name is None else name
        content = sample[numbers[columns.content]]
        if columns.is_text:
            yield Document(file, name, text=text_value(content, where))
        else:
            assert options.tokenizer is not None
            sequences = array_rows(content, encodings[columns.content], where)
            yield Document(file, name, tokens=document_tokens(sequences, where, options.tokenizer))


def is_id_array(encoding: str) -> bool:
    """Return whether an encoding is an ndarray of integers, or of a dtype that is known only from the data."""
    name, _, rest = encoding.partition(":")
    dtype = rest.partition(":")[0]
    return name == "ndarray" and (not dtype or is_integer(dtype))


def is_integer(dtype: str) -> bool:
    """Return whether a name is that of one of MDS's integer dtypes."""
    return dtype in VALUE_DTYPES.values() and np.issubdtype(np.dtype(dtype), np.integer)


class HashedBlocks:
    """Iterable of the given blocks that counts their bytes and computes their digests. `expected`: name -> digest."""

    def __init__(self, blocks: Iterator[bytes], expected: dict[str, str]) -> None:
        self.bytes = 0
        self._blocks = blocks
        self._expected = expected
        self._digests = {name: made() for name in expected if (made := hash_function(name)) is not None}

    def __iter__(self) -> Iterator[bytes]:
        for block in self._blocks:
            self.bytes += len(block)
            for digest in self._digests.values():
                digest.update(block)
            yield block

    def check(self, what: str, index: str) -> None:
        """Raise UserError if a digest is not the expected one. `what` and `index` name them in the message."""
        for name, digest in self._digests.items():
            if digest.hexdigest() != self._expected[name]:
                digests = f"{digest.hexdigest()}, {index} says {self._expected[name]}"
                raise UserError(f"{what}: damaged, its {name} is {digests}")


def hash_function(name: str) -> Callable[[], Any] | None:
    """Return the constructor of a hash by its name; None if it is unknown or needs xxhash, which is not installed."""
    if name in hashlib.algorithms_guaranteed and not name.startswith("shake_"):
        return lambda: hashlib.new(name, usedforsecurity=False)
    if name.startswith("xx"):
        try:
            import xxhash
        except ImportError:
            return None
        return getattr(xxhash, name, None)
    return None


class Reader:
    """Reader of a stream of blocks. `offset` is the number of bytes read so far."""

    def __init__(self, blocks: Iterator[bytes], where: str) -> None:
        self._blocks = blocks
        self._where = where
        self._held = b""
        self._position = 0
        self.offset = 0

    def read(self, size: int, what: str) -> bytes:
        """Return the next `size` bytes. Raises UserError if there are fewer; `what` names them in the message."""
        pieces: list[bytes] = []
        missing = size
        while missing:
            if self._position == len(self._held):
                block = next(self._blocks, None)
                if block is None:
                    end = self.offset + size - missing
                    raise UserError(f"{self._where}: truncated, ends at byte {end} within {what}")
                self._held, self._position = block, 0
            piece = self._held[self._position : self._position + missing]
            self._position += len(piece)
            missing -= len(piece)
            pieces.append(piece)
        self.offset += size
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_rest(self) -> int:
        """Read to the end, and return the number of bytes that were left."""
        rest = len(self._held) - self._position + sum(len(block) for block in self._blocks)
        self.offset += rest
        return rest


def samples(file: InputFile, shard: MdsShard) -> Iterator[list[bytes]]:
    """Yield the columns of each sample, as bytes. Raises UserError."""
    index = index_of(file)
    stored = HashedBlocks(
        raw_blocks(file.url, COMPRESSED_BLOCK_BYTES if file.compression else BLOCK_BYTES), shard.file_hashes
    )
    unfolded = bounded(decompressed(iter(stored), file), shard.raw_bytes, file.url, index)
    plain = HashedBlocks(unfolded, shard.raw_hashes) if file.compression else stored
    reader = Reader(iter(plain), file.url)
    bounds = read_bounds(reader, file, shard, index)
    reader.read(int(bounds[0]) - reader.offset, "the description of its columns")
    for number, size in enumerate(np.diff(bounds).tolist()):
        yield sample_columns(reader.read(size, f"sample {number}"), shard, f"{file.url}#{number}")
    reader.read_rest()
    stored.check(file.url, index)
    if plain.bytes != shard.raw_bytes:
        raise UserError(f"{file.url}: {plain.bytes} bytes uncompressed, {index} says {shard.raw_bytes}")
    plain.check(f"{file.url} (uncompressed)" if file.compression else file.url, index)


def bounded(blocks: Iterator[bytes], most_bytes: int, url: str, index: str) -> Iterator[bytes]:
    """Yield the blocks. Raises UserError beyond `most_bytes`, because a small file can decompress to terabytes."""
    total = 0
    for block in blocks:
        total += len(block)
        if total > most_bytes:
            raise UserError(f"{url}: more than {most_bytes:,} bytes uncompressed, which is what {index} says")
        yield block


def read_bounds(reader: Reader, file: InputFile, shard: MdsShard, index: str) -> npt.NDArray[np.int64]:
    """Return the offsets of the samples' bounds [samples + 1]. Raises UserError if they do not ascend within it."""
    (count,) = SIZE.unpack(reader.read(SIZE.size, "its first number"))
    if count != shard.samples:
        raise UserError(f"{file.url}: holds {count} samples, {index} says {shard.samples}")
    raw = reader.read(SIZE.size * (count + 1), "its table of offsets")
    bounds = np.frombuffer(raw, "<u4").astype(np.int64)
    backwards = np.flatnonzero(np.diff(bounds) < 0)
    if len(backwards) or bounds[0] < reader.offset or bounds[-1] > shard.raw_bytes:
        number = int(backwards[0]) if len(backwards) else 0 if bounds[0] < reader.offset else count - 1
        raise UserError(f"{file.url}: damaged table of offsets at sample {number}")
    return bounds


def sample_columns(sample: bytes, shard: MdsShard, where: str) -> list[bytes]:
    """Return the columns of a sample, as bytes. Raises UserError."""
    position, sizes = 0, []
    for _, _, fixed in shard.columns:
        if fixed is not None:
            sizes.append(fixed)
            continue
        if position + SIZE.size > len(sample):
            raise UserError(f"{where}: damaged sample, {len(sample)} bytes cannot hold its columns' sizes")
        sizes.append(SIZE.unpack_from(sample, position)[0])
        position += SIZE.size
    if position + sum(sizes) != len(sample):
        raise UserError(f"{where}: damaged sample, {len(sample)} bytes, its columns take {position + sum(sizes)}")
    columns = []
    for size in sizes:
        columns.append(sample[position : position + size])
        position += size
    return columns


def text_value(raw: bytes, where: str) -> str:
    """Decode a text column. Raises UserError."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8, byte 0x{raw[error.start]:02x} at offset {error.start} of it") from None


def scalar(raw: bytes, encoding: str, where: str) -> str | None:
    """Decode the value of an id column; None if its encoding is neither text nor integer."""
    if encoding in TEXT_ENCODINGS or encoding == "bytes":
        return text_value(raw, where)
    dtype = INTEGER_ENCODINGS.get(encoding)
    return None if dtype is None else str(np.frombuffer(raw, np.dtype(dtype).newbyteorder("<"))[0])


def array_rows(raw: bytes, encoding: str, where: str) -> list[npt.NDArray[np.integer]]:
    """Decode an ndarray and return its rows along the last axis; a 1-D array is one row. Raises UserError."""
    dtype_name, _, shape_text = encoding.partition(":")[2].partition(":")
    position = 0
    try:
        if not dtype_name:
            dtype_name, position = VALUE_DTYPES[raw[0]], 1
            if not is_integer(dtype_name):
                raise UserError(f"{where}: an ndarray of {dtype_name}, which are no token ids")
        if shape_text:
            shape = [int(part) for part in shape_text.split(",")]
        else:
            dimensions, dtype = raw[position] >> 2, SHAPE_DTYPES[raw[position] & 3]
            position += 1
            shape = np.frombuffer(raw, dtype, dimensions, position).tolist()
            position += dimensions * np.dtype(dtype).itemsize
        values = np.frombuffer(raw, np.dtype(dtype_name).newbyteorder("<"), offset=position)
        if values.size == int(np.prod(shape)):
            return list(values.reshape(int(np.prod(shape[:-1])), shape[-1]))
    except (IndexError, KeyError, ValueError):
        pass
    raise UserError(f"{where}: damaged ndarray of {len(raw)} bytes")
