"""Stream text files and JSON lines, plain or compressed. Every defect is reported with file and line or byte.

This is strict on purpose: a line that cannot be read is an error and not a skipped document, because a corpus that
silently lost its second half trains just as quietly. Only blank lines are passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import load_json
from megatron_ettin.prepare.filesystem import open_input
from megatron_ettin.prepare.input_file import BLOCK_BYTES, InputFile, Segment, blocks, shrunk
from megatron_ettin.prepare.readers.document import Document, ReadOptions

KEYS_SHOWN = 8
NOT_BLANK = re.compile(r"\S")


def text_document(segment: Segment, options: ReadOptions) -> Iterator[Document]:
    """Yield the one document of a text file. Raises UserError."""
    text = whole_text(segment.file)
    if not options.text_may_be_json and begins_with_json_object(text):
        raise UserError(
            f"{segment.file.url}: its first line is a JSON object, which would be trained on as text; say --format"
            " jsonl, or --format text where that is meant"
        )
    yield Document(segment.file, segment.file.name, text)


def begins_with_json_object(text: str) -> bool:
    """Return whether the first line that is not blank is a JSON object, as in JSON lines with a text's extension."""
    visible = NOT_BLANK.search(text)
    start = visible.start() if visible else 0
    end = text.find("\n", start)
    line = text[start:] if end < 0 else text[start:end]
    if not line.startswith("{"):
        return False
    try:
        return isinstance(load_json(line), dict)
    except (ValueError, RecursionError):
        return False


def whole_text(file: InputFile) -> str:
    """Return a text file's content, without a byte order mark. Raises UserError."""
    raw = b"".join(blocks(file))
    if file.compression is None and len(raw) < file.bytes:
        raise shrunk(file, len(raw))
    try:
        return decoded(raw, 0).removeprefix("\ufeff")
    except UserError as error:
        raise UserError(f"{file.url}: {error}") from None


def decoded(raw: bytes, offset: int) -> str:
    """Decode UTF-8. Raises UserError for other bytes or a NUL. `offset` is the position of `raw` in its file."""
    if (zero := raw.find(b"\x00")) >= 0:
        raise UserError(f"not text, a NUL byte at offset {offset + zero}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise UserError(f"not UTF-8, byte 0x{byte:02x} at offset {offset + error.start}") from None


def json_documents(segment: Segment, options: ReadOptions) -> Iterator[Document]:
    """Yield a document for every line that begins in the segment. Raises UserError.

    A document without an id is named `file:line` or, in a file that is split, `file@byte`, because the lines before the
    segment are not counted.
    """
    file = segment.file
    for number, offset, raw in lines(segment):
        if not raw.strip():
            continue
        try:
            text, given = parsed(raw, offset, options)
        except UserError as error:
            line = number or count_line_ends(file.url, 0, offset) + 1
            raise UserError(f"{file.url}:{line}: {error}") from None
        own = f"{file.name}:{number}" if number else f"{file.name}@{offset}"
        yield Document(file, own if given is None else whole_characters(str(given)), text)


def parsed(raw: bytes, offset: int, options: ReadOptions) -> tuple[str, Any]:
    """Return (text, id or None) of one line. Raises UserError whose message does not name file and line."""
    line = decoded(raw, offset)
    try:
        record = load_json(line.removeprefix("\ufeff") if offset == 0 else line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise UserError(f"invalid JSON ({reason})") from None
    return text_of(record, options.text_key), record.get(options.id_key)


def text_of(record: Any, text_key: str) -> str:
    """Return the text of a record. Raises UserError."""
    if not isinstance(record, dict):
        raise UserError(f"a JSON {type(record).__name__}, not an object with a {text_key!r} key")
    if text_key not in record:
        keys = ", ".join(list(record)[:KEYS_SHOWN]) + (", ..." if len(record) > KEYS_SHOWN else "")
        raise UserError(f"no key {text_key!r}; keys found: {keys or 'none'} (choose with --text-key)")
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f"{text_key!r} is of type {type(text).__name__}, not a string")
    return whole_characters(text)


def whole_characters(text: str) -> str:
    """Replace each unpaired surrogate, which is no character, by U+FFFD as the Unicode standard says."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def lines(segment: Segment) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number, byte offset, content) of each line that begins in the segment; in a split file the number is 0."""
    number, step = (1, 1) if segment.is_whole else (0, 0)
    if segment.file.compression:
        offset = 0
        for line in split_lines(blocks(segment.file)):
            yield number, offset, line
            number, offset = number + step, offset + len(line) + 1
        return
    with open_input(segment.file.url) as stream:
        offset = seek_first_line(stream, segment.start)
        while offset < segment.end and (line := stream.readline()):
            yield number, offset, line.rstrip(b"\n")
            number, offset = number + step, offset + len(line)
    if offset < segment.end:
        raise shrunk(segment.file, offset)


def seek_first_line(stream: IO[bytes], start: int) -> int:
    """Go to the first line that begins at `start` or after, and return its offset."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    # the end of the line before, at least its newline
    skipped = stream.readline()
    return start - 1 + len(skipped)


def count_line_ends(url: str, start: int, end: int) -> int:
    """Count the newlines in bytes [start, end)."""
    count = 0
    with open_input(url) as stream:
        stream.seek(start)
        while start < end and (block := stream.read(min(BLOCK_BYTES, end - start))):
            count += block.count(b"\n")
            start += len(block)
    return count


def split_lines(stream: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream of blocks, without their ends."""
    kept: list[bytes] = []
    for block in stream:
        first, *more = block.split(b"\n")
        kept.append(first)
        for line in more:
            yield b"".join(kept)
            kept = [line]
    if rest := b"".join(kept):
        yield rest
