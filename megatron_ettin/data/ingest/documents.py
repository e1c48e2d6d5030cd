"""The documents of a segment: text files and JSON lines, plain or compressed, streamed; every defect is told by file
and line or byte.

Strict on purpose: a line that cannot be read is an error and not a skipped document, because a corpus that silently
lost its second half trains just as quietly. Only blank lines are passed over."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_ettin.config.errors import UserError
from megatron_ettin.data.ingest.inputs import InputFile, Segment

BLOCK_BYTES = 1 << 20
KEYS_SHOWN = 8


@dataclass(frozen=True)
class Document:
    file: InputFile
    id: str  # the JSON id, else file:line; the file's name for text
    text: str


def read_documents(segment: Segment, text_key: str, id_key: str) -> Iterator[Document]:
    """The documents of a segment in order, those with an empty text included."""
    try:
        if segment.file.kind == "text":
            yield Document(segment.file, segment.file.name, whole_text(segment.file))
        else:
            yield from json_documents(segment, text_key, id_key)
    except OSError as error:
        raise UserError(f"{segment.file.path}: {error.strerror or error}") from None


def whole_text(file: InputFile) -> str:
    """A text file's content, without a byte order mark."""
    raw = b"".join(blocks(file))
    return decoded(raw, str(file.path), 0).removeprefix("\ufeff")


def decoded(raw: bytes, where: str, offset: int) -> str:
    """UTF-8 without NUL; `offset` is where `raw` begins in its file."""
    if (zero := raw.find(b"\x00")) >= 0:
        raise UserError(f"{where}: not text, a NUL byte at offset {offset + zero}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise UserError(f"{where}: not UTF-8, byte 0x{byte:02x} at offset {offset + error.start}") from None


def json_documents(segment: Segment, text_key: str, id_key: str) -> Iterator[Document]:
    file = segment.file
    for line_number, offset, raw in lines(segment):
        if not raw.strip():
            continue
        where = f"{file.path}:{line_number}"
        line = decoded(raw, where, offset)
        try:
            record = json.loads(line.removeprefix("\ufeff") if offset == 0 else line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise UserError(f"{where}: invalid JSON ({reason})") from None
        text = text_of(record, text_key, where)
        given = record.get(id_key)
        yield Document(file, f"{file.name}:{line_number}" if given is None else str(given), text)


def text_of(record: Any, text_key: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, not an object with a {text_key!r} key")
    if text_key not in record:
        keys = ", ".join(list(record)[:KEYS_SHOWN]) + (", ..." if len(record) > KEYS_SHOWN else "")
        raise UserError(f"{where}: no key {text_key!r}; keys found: {keys or 'none'} (choose with --text-key)")
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f"{where}: {text_key!r} is a {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of an escaped surrogate pair: no character, as the standard says
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def lines(segment: Segment) -> Iterator[tuple[int, int, bytes]]:
    """(line number, offset, line without its end) of every line that begins in the segment."""
    number = segment.first_line
    if segment.file.compression:
        offset = 0
        for line in split_lines(blocks(segment.file)):
            yield number, offset, line
            number, offset = number + 1, offset + len(line) + 1
        return
    with open(segment.file.path, "rb", buffering=BLOCK_BYTES) as stream:
        offset = seek_first_line(stream, segment.start)
        while offset < segment.end and (line := stream.readline()):
            yield number, offset, line.rstrip(b"\n")
            number, offset = number + 1, offset + len(line)


def seek_first_line(stream: IO[bytes], start: int) -> int:
    """Go to the first line that begins at `start` or after; returns its offset."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    skipped = stream.readline()  # the end of the line before, at least its newline
    return start - 1 + len(skipped)


def count_line_ends(path: Path, start: int, end: int) -> int:
    """Newlines in bytes [start, end)."""
    count = 0
    with open(path, "rb") as stream:
        stream.seek(start)
        while start < end and (block := stream.read(min(BLOCK_BYTES, end - start))):
            count += block.count(b"\n")
            start += len(block)
    return count


def split_lines(stream: Iterator[bytes]) -> Iterator[bytes]:
    kept: list[bytes] = []
    for block in stream:
        first, *more = block.split(b"\n")
        kept.append(first)
        for line in more:
            yield b"".join(kept)
            kept = [line]
    if rest := b"".join(kept):
        yield rest


def blocks(file: InputFile) -> Iterator[bytes]:
    """The file's bytes, decompressed; a broken or cut-off archive is a UserError."""
    with open(file.path, "rb") as stream:
        raw = iter(lambda: stream.read(BLOCK_BYTES), b"")
        if file.compression is None:
            yield from raw
        else:
            yield from decompressed(raw, file)


def decompressed(raw: Iterator[bytes], file: InputFile) -> Iterator[bytes]:
    """Members one after another, each checked to have its end: gzip and zstd both allow several."""
    import zstandard

    def new_member() -> Any:
        if file.compression == "gzip":
            return zlib.decompressobj(wbits=31)
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    member: Any = None
    try:
        for block in raw:
            while block:
                member = member or new_member()
                if out := member.decompress(block):
                    yield out
                block = member.unused_data if member.eof else b""
                if member.eof:
                    member = None
                    block = block.lstrip(b"\x00") if file.compression == "gzip" else block  # gzip allows padding
    except (zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{file.path}: broken {file.compression} data ({error})") from None
    if member is not None:
        raise UserError(f"{file.path}: {file.compression} data ends in the middle: truncated")
