"""Tell the format of an input by its name, and which formats one folder may hold.

This is strict on purpose: a file with an unknown extension is never taken for text, and a file of one format never
decides that files of another are left out. Files that are passed over are recorded with a reason and reported at the
end.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import counted
from megatron_ettin.prepare.filesystem import Entry, parent_of
from megatron_ettin.prepare.input_file import InputFile

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
FORMAT_OF_SUFFIX = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".jl": "jsonl",
    ".parquet": "parquet",
    ".arrow": "datasets",
    ".idx": "indexed",
}
COMPRESSIBLE = ("text", "jsonl")
# formats that `--format` can apply to every file of a folder; the others have an index that lists their files
WHOLE_FOLDER = ("text", "jsonl", "parquet")
# corpora of JSON lines are published as .json.gz; a plain .json is one object more often than not
COMPRESSED_ONLY = {".json": "jsonl"}
# name of a part that `split -d` makes of a .jsonl
NUMBERED_PART = re.compile(r"\.jsonl\.\d+$")
ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation|contributing|code_of_conduct|dataset_?card|data_?sheet)"
    r"([._-].*)?$",
    re.IGNORECASE,
)
EXTENSIONS_SHOWN = 4

# reasons to pass over files, which complete the message "3 files passed over, ..."
EMPTY = "empty"
UNKNOWN = "whose extension does not say what is in them"
ABOUT_DATA = "READMEs, licences and the like"
FOREIGN = "indices that are not Megatron's"
CACHED = "kept by `datasets` of a map or a filter"


@dataclass
class PassedOver:
    """Files of folders that are not read, by reason."""

    by_reason: dict[str, list[Entry]] = field(default_factory=dict)
    read_bytes: int = 0
    """Bytes of the files that are read."""

    def add(self, reason: str, entry: Entry) -> None:
        """Note a file that is not read."""
        self.by_reason.setdefault(reason, []).append(entry)

    @property
    def urls(self) -> list[str]:
        """Return the paths and URLs of the files, reason by reason."""
        return [entry.url for entries in self.by_reason.values() for entry in entries]

    def lines(self) -> Iterator[str]:
        """Yield one message for each reason."""
        for reason, entries in self.by_reason.items():
            shown = ", ".join([*(entry.url for entry in entries[:3]), *(["..."] if len(entries) > 3 else [])])
            by_extension = f" ({extensions(entries)}; `--format text` reads every file)" if reason == UNKNOWN else ""
            most = reason == UNKNOWN and sum(entry.bytes for entry in entries) > self.read_bytes
            warning = "warning: more bytes than were read: " if most else ""
            yield f"{warning}{counted(len(entries), 'file')} passed over, {reason}{by_extension}: {shown}"


def extensions(entries: list[Entry]) -> str:
    """Count the extensions of files, the commonest first: "312 .py, 4 .csv"."""
    counts = Counter(os.path.splitext(entry.url)[1] or "no extension" for entry in entries).most_common()
    more = sum(count for _, count in counts[EXTENSIONS_SHOWN:])
    named = [f"{count:,} {suffix}" for suffix, count in counts[:EXTENSIONS_SHOWN]]
    return ", ".join([*named, *([f"{more:,} others"] if more else [])])


def format_of_name(name: str) -> tuple[str | None, str | None]:
    """Return (format, compression) by a file's extensions. The format is None if unknown, the compression if none."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression is None:
        return ("jsonl" if NUMBERED_PART.search(name.lower()) else FORMAT_OF_SUFFIX.get(suffix)), None
    format_name = {**FORMAT_OF_SUFFIX, **COMPRESSED_ONLY}.get(os.path.splitext(stem)[1])
    return (format_name if format_name in COMPRESSIBLE else None), compression


def is_about(name: str) -> bool:
    """Return whether a file's name is that of a README, a licence or the like."""
    return ABOUT.match(name) is not None


def one_format_per_folder(files: Iterable[InputFile], passed_over: PassedOver) -> list[InputFile]:
    """Return the files to read, without READMEs and the like that lie in or above a folder with data.

    Raises:
        UserError: a folder holds files of two formats, texts lie above files of another format, or an INPUT has both
            texts and a Megatron dataset. The message names a file of each format.
    """
    files = list(files)
    held: dict[str, dict[str, InputFile]] = {}
    for file in files:
        held.setdefault(parent_of(file.url), {}).setdefault(file.format, file)
    data = above({folder: formats for folder, formats in held.items() if set(formats) != {"text"}})
    kept = [file for file in files if not (is_text_about(file) and parent_of(file.url) in data)]
    gone = [file for file in files if is_text_about(file) and parent_of(file.url) in data]
    for file in gone:
        passed_over.add(ABOUT_DATA, Entry(file.url, False, file.bytes, file.modified))
    text = next((file for file in kept if file.format in COMPRESSIBLE), None)
    tokens = next((file for file in kept if file.format == "indexed"), None)
    if text is not None and tokens is not None:
        # if the dataset was made from these texts, each document would be read twice
        raise two_formats_error(tokens, text)
    first: dict[str, InputFile] = {}
    for file in kept:
        folder = parent_of(file.url)
        other = first.setdefault(folder, file)
        if file.format == "text" and other.format == "text":
            other = data.get(folder, other)
            other = other if other.format not in COMPRESSIBLE else file
        if other.format != file.format:
            raise two_formats_error(other, file)
    return kept


def two_formats_error(one: InputFile, other: InputFile) -> UserError:
    """Return the error for an INPUT that holds files of two formats."""
    return UserError(
        f"{one.url} is {one.format} and {other.url} is {other.format}: which of them is the corpus? Name the files"
        " to read, each kind as an INPUT of its own, or move the others away"
    )


def is_text_about(file: InputFile) -> bool:
    """Return whether a file is a text about the data, such as a README."""
    return file.format == "text" and is_about(file.url.rpartition("/")[2])


def above(held: dict[str, dict[str, InputFile]]) -> dict[str, InputFile]:
    """Return folder -> a file in it or below it whose format is not text. `held`: folder -> format -> a file."""
    examples: dict[str, InputFile] = {}
    for folder, formats in held.items():
        file = next(one for format_name, one in formats.items() if format_name != "text")
        while folder not in examples or (examples[folder].format in COMPRESSIBLE and file.format not in COMPRESSIBLE):
            examples[folder] = file
            folder = parent_of(folder)
    return examples
