"""Describe one input of `ettin prepare`, read its bytes, and check that it is still what was listed.

A broken or cut-off archive is an error that names the file.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.prepare.filesystem import find, local_path, open_input

# an input byte counts as so many of text, where compression or format make it more; by compression, else by format
GROWTH = {"gzip": 4, "zstd": 4, "bzip2": 4, "xz": 4, "parquet": 3}


@dataclass(frozen=True)
class InputFile:
    """One input as the plan, the readers and prepare.json know it.

    It has strings and numbers only, so that prepare.json holds it as it is (frozen_plan.py).
    """

    url: str
    """Path, or URL of fsspec's."""
    name: str
    """Name in the dataset: the INPUT's own, then the path within it."""
    source: str
    """INPUT that it belongs to."""
    format: str
    """Value of `--format`, but not `auto`."""
    compression: str | None
    bytes: int
    modified: str = ""
    """Changes when the content does: nanoseconds, an ETag; empty where the file system says nothing."""
    detail: str = ""
    """JSON with what its directory's index says about it."""

    @property
    def growth(self) -> int:
        """Return the bytes of text that an input byte counts as."""
        return GROWTH.get(self.compression or self.format, 1)

    @property
    def weight_bytes(self) -> int:
        """Return the size in bytes of text, by which work is cut into tasks."""
        return self.bytes * self.growth


@dataclass(frozen=True)
class Segment:
    """Part of a file that belongs to bytes [start, end)."""

    file: InputFile
    start: int
    end: int

    @property
    def is_whole(self) -> bool:
        """Return whether the segment is the whole file."""
        return self.start == 0 and self.end == self.file.bytes


REMEDY = "let nothing write to it and run again with --replan"
# on a network an answer takes milliseconds
CONCURRENT_CHECKS = 32


def check_unchanged(files: Iterable[InputFile]) -> None:
    """Raise UserError naming the first input that is not as it was listed.

    This is checked again before a dataset is published: what was read of such a file may be neither the old content nor
    the new.
    """
    with ThreadPoolExecutor(CONCURRENT_CHECKS) as pool:
        for difference in pool.map(difference_from_listed, files):
            if difference:
                raise UserError(f"{difference}; {REMEDY}")


def difference_from_listed(file: InputFile) -> str:
    """Return how an input differs from what was listed, or an empty string."""
    now = find(file.url)
    if now is None:
        return f"{file.url}: was removed while it was read"
    if now.bytes != file.bytes:
        return f"{file.url}: had {file.bytes:,} bytes when it was listed and has {now.bytes:,}"
    # a remote file system may give one file's time in two ways; a pair of files has two times
    if local_path(file.url) is not None and now.modified not in file.modified.split():
        return f"{file.url}: was written to while it was read"
    return ""


def shrunk(file: InputFile, end: int) -> UserError:
    """Return the error for a file that ends before it should."""
    return UserError(f"{file.url}: ends at byte {end:,}, it had {file.bytes:,} when it was listed; {REMEDY}")


BLOCK_BYTES = 1 << 20
# a block of well compressed text becomes a thousand times as much
COMPRESSED_BLOCK_BYTES = 1 << 17
# zstd --long=31
LARGEST_WINDOW_BYTES = 1 << 31
# whose members may be followed by zeros
PADDED = ("gzip", "xz")


def blocks(file: InputFile) -> Iterator[bytes]:
    """Yield the file's bytes, decompressed. Raises UserError where the archive is broken or cut off."""
    if file.compression is None:
        yield from raw_blocks(file.url, BLOCK_BYTES)
    else:
        yield from decompressed(raw_blocks(file.url, COMPRESSED_BLOCK_BYTES), file)


def raw_blocks(url: str, block_bytes: int) -> Iterator[bytes]:
    """Yield the file's bytes as they are."""
    with open_input(url) as stream:
        while block := stream.read(block_bytes):
            yield block


def decompressed(raw: Iterator[bytes], file: InputFile) -> Iterator[bytes]:
    """Decompress the members one after another, each checked to have its end: all formats allow several."""
    import zstandard

    def new_member() -> Any:
        if file.compression == "gzip":
            return zlib.decompressobj(wbits=31)
        if file.compression == "bzip2":
            return bz2.BZ2Decompressor()
        if file.compression == "xz":
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LARGEST_WINDOW_BYTES)
        return zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES).decompressobj()

    member: Any = None
    read_bytes = 0
    try:
        for block in raw:
            read_bytes += len(block)
            while block:
                member = member or new_member()
                if out := member.decompress(block):
                    yield out
                block = member.unused_data if member.eof else b""
                if member.eof:
                    member = None
                    block = block.lstrip(b"\x00") if file.compression in PADDED else block
    except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or file.compression != "bzip2"):
            # of the file system; bzip2's own errors are OSErrors without a number
            raise
        raise UserError(f"{file.url}: broken {file.compression} data before byte {read_bytes} ({error})") from None
    if member is not None:
        raise UserError(f"{file.url}: {file.compression} data ends in the middle, at byte {read_bytes}: truncated")
