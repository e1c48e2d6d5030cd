"""Bytes of a file in blocks, decompressed; a broken or cut-off archive is told by name."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterator
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.prepare.filesystem import open_input
from megatron_ettin.prepare.input_file import InputFile

BLOCK_BYTES = 1 << 20
COMPRESSED_BLOCK_BYTES = 1 << 17  # a block of well compressed text becomes a thousand times as much
LARGEST_WINDOW_BYTES = 1 << 31  # zstd --long=31
PADDED = ("gzip", "xz")  # whose members may be followed by zeros


def blocks(file: InputFile) -> Iterator[bytes]:
    """The file's bytes, decompressed."""
    if file.compression is None:
        yield from raw_blocks(file.url, BLOCK_BYTES)
    else:
        yield from decompressed(raw_blocks(file.url, COMPRESSED_BLOCK_BYTES), file)


def raw_blocks(url: str, block_bytes: int) -> Iterator[bytes]:
    with open_input(url) as stream:
        while block := stream.read(block_bytes):
            yield block


def decompressed(raw: Iterator[bytes], file: InputFile) -> Iterator[bytes]:
    """Members one after another, each checked to have its end: all of these formats allow several."""
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
            raise  # of the file system; bzip2's own errors are OSErrors without a number
        raise UserError(f"{file.url}: broken {file.compression} data before byte {read_bytes} ({error})") from None
    if member is not None:
        raise UserError(f"{file.url}: {file.compression} data ends in the middle, at byte {read_bytes}: truncated")
