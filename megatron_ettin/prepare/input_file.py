"""Describe one input of `ettin prepare`, read its bytes, and check that it has not changed since it was listed.

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

# compression, else format -> estimated bytes of text per byte of input; 1 for the others
GROWTH = {"gzip": 4, "zstd": 4, "bzip2": 4, "xz": 4, "parquet": 3}


@dataclass(frozen=True)
class InputFile:
    """One input file as it was listed. It has strings and numbers only, so that prepare.json can store it."""

    url: str
    """Path, or URL that fsspec opens."""
    name: str
    """Name in the dataset: the INPUT's name, then the path within it."""
    source: str
    """Name of the INPUT that the file belongs to."""
    format: str
    """Format: a value of `--format` other than `auto`."""
    compression: str | None
    bytes: int
    modified: str = ""
    """Text that changes with the content (mtime in ns, ETag); empty if the file system gives none."""
    detail: str = ""
    """JSON of what the index of its directory says about the file; empty if there is no index."""

    @property
    def growth(self) -> int:
        """Return the estimated bytes of text per byte of the file."""
        return GROWTH.get(self.compression or self.format, 1)

    @property
    def weight_bytes(self) -> int:
        """Return the estimated bytes of text in the file, by which files are divided into tasks."""
        return self.bytes * self.growth


@dataclass(frozen=True)
class Segment:
    """Bytes [start, end) of a file. Each format's reader has a rule for the documents that belong to them."""

    file: InputFile
    start: int
    end: int

    @property
    def is_whole(self) -> bool:
        """Return whether the segment is the whole file."""
        return self.start == 0 and self.end == self.file.bytes


REMEDY = "let nothing write to it and run again with --replan"
# threads that check files: on a network an answer takes milliseconds
CONCURRENT_CHECKS = 32


def check_unchanged(files: Iterable[InputFile]) -> None:
    """Raise UserError naming the first input that has changed since it was listed.

    This is checked before a dataset is published, because what was read from such a file may mix old and new content.
    """
    with ThreadPoolExecutor(CONCURRENT_CHECKS) as pool:
        for difference in pool.map(difference_from_listed, files):
            if difference:
                raise UserError(f"{difference}; {REMEDY}")


def difference_from_listed(file: InputFile) -> str:
    """Return a message on how an input has changed since it was listed; empty if it has not."""
    now = find(file.url)
    if now is None:
        return f"{file.url}: was removed while it was read"
    if now.bytes != file.bytes:
        return f"{file.url}: had {file.bytes:,} bytes when it was listed and has {now.bytes:,}"
    # local files only, because a remote file system may write one time in two ways; a .bin with its .idx has two times
    if local_path(file.url) is not None and now.modified not in file.modified.split():
        return f"{file.url}: was written to while it was read"
    return ""


def shrunk(file: InputFile, end: int) -> UserError:
    """Return the error for a file that ends before it should."""
    return UserError(f"{file.url}: ends at byte {end:,}, it had {file.bytes:,} when it was listed; {REMEDY}")


BLOCK_BYTES = 1 << 20
# smaller, because a block of well compressed text can grow a thousandfold
COMPRESSED_BLOCK_BYTES = 1 << 17
# the window of `zstd --long=31`
LARGEST_WINDOW_BYTES = 1 << 31
# formats whose members may be followed by zero bytes
PADDED = ("gzip", "xz")


def blocks(file: InputFile) -> Iterator[bytes]:
    """Yield the file's bytes in blocks, decompressed. Raises UserError if the archive is broken or truncated."""
    if file.compression is None:
        yield from raw_blocks(file.url, BLOCK_BYTES)
    else:
        yield from decompressed(raw_blocks(file.url, COMPRESSED_BLOCK_BYTES), file)


def raw_blocks(url: str, block_bytes: int) -> Iterator[bytes]:
    """Yield the file's bytes in blocks of at most `block_bytes`, not decompressed."""
    with open_input(url) as stream:
        while block := stream.read(block_bytes):
            yield block


def decompressed(raw: Iterator[bytes], file: InputFile) -> Iterator[bytes]:
    """Yield the blocks of `raw` decompressed. A file may have several members, and the last one must be complete.

    Raises:
        UserError: the data is broken or truncated.
    """
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
            # an error of the file system; bzip2's own errors are OSErrors without a number
            raise
        raise UserError(f"{file.url}: broken {file.compression} data before byte {read_bytes} ({error})") from None
    if member is not None:
        raise UserError(f"{file.url}: {file.compression} data ends in the middle, at byte {read_bytes}: truncated")
