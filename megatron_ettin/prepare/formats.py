"""Which kind of input a file's name says it is, and which kinds one folder may hold.

Strict on purpose: a file whose name says nothing is never guessed to be text, and a file of one kind never decides that
files of another are left out. What is passed over is kept with its reason and told at the end.
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

FORMATS = ("auto", "text", "jsonl", "parquet", "datasets", "mds", "indexed")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
KIND_OF_SUFFIX = {
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
# formats of which every file of a folder can be one; the others have an index that says which files belong to them
WHOLE_FOLDER = ("text", "jsonl", "parquet")
# corpora of JSON lines are published as .json.gz; a plain .json is one object more often than not
COMPRESSED_ONLY = {".json": "jsonl"}
NUMBERED_PART = re.compile(r"\.jsonl\.\d+$")  # what `split -d` makes of a .jsonl
ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation|contributing|code_of_conduct|dataset_?card|data_?sheet)"
    r"([._-].*)?$",
    re.IGNORECASE,
)
EXTENSIONS_SHOWN = 4

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
        self.by_reason.setdefault(reason, []).append(entry)

    @property
    def urls(self) -> list[str]:
        return [entry.url for entries in self.by_reason.values() for entry in entries]

    def lines(self) -> Iterator[str]:
        """Yield one line for people for each reason."""
        for reason, entries in self.by_reason.items():
            shown = ", ".join([*(entry.url for entry in entries[:3]), *(["..."] if len(entries) > 3 else [])])
            of_kinds = f" ({extensions(entries)}; `--format text` reads every file)" if reason == UNKNOWN else ""
            most = reason == UNKNOWN and sum(entry.bytes for entry in entries) > self.read_bytes
            warning = "warning: more bytes than were read: " if most else ""
            yield f"{warning}{counted(len(entries), 'file')} passed over, {reason}{of_kinds}: {shown}"


def extensions(entries: list[Entry]) -> str:
    """Count the extensions of files, the commonest first: "312 .py, 4 .csv"."""
    counted = Counter(os.path.splitext(entry.url)[1] or "no extension" for entry in entries).most_common()
    more = sum(count for _, count in counted[EXTENSIONS_SHOWN:])
    named = [f"{count:,} {suffix}" for suffix, count in counted[:EXTENSIONS_SHOWN]]
    return ", ".join([*named, *([f"{more:,} others"] if more else [])])


def kind_of(name: str) -> tuple[str | None, str | None]:
    """Return (kind, compression) by a file's extensions; kind is None where they do not tell."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression is None:
        return ("jsonl" if NUMBERED_PART.search(name.lower()) else KIND_OF_SUFFIX.get(suffix)), None
    kind = {**KIND_OF_SUFFIX, **COMPRESSED_ONLY}.get(os.path.splitext(stem)[1])
    return (kind if kind in COMPRESSIBLE else None), compression


def is_about(name: str) -> bool:
    """Whether a file's name is that of a README, a licence or the like."""
    return ABOUT.match(name) is not None


def one_kind_a_folder(files: Iterable[InputFile], passed_over: PassedOver) -> list[InputFile]:
    """Return the files to read, texts about the data beside or below them taken out.

    Raises UserError naming both where a folder holds files of two kinds, or texts above files of another kind.
    """
    files = list(files)
    held: dict[str, dict[str, InputFile]] = {}
    for file in files:
        held.setdefault(parent_of(file.url), {}).setdefault(file.kind, file)
    data = above({folder: kinds for folder, kinds in held.items() if set(kinds) != {"text"}})
    kept = [file for file in files if not (is_text_about(file) and parent_of(file.url) in data)]
    gone = [file for file in files if is_text_about(file) and parent_of(file.url) in data]
    for file in gone:
        passed_over.add(ABOUT_DATA, Entry(file.url, False, file.bytes, file.modified))
    text = next((file for file in kept if file.kind in COMPRESSIBLE), None)
    tokens = next((file for file in kept if file.kind == "indexed"), None)
    if text is not None and tokens is not None:
        # a dataset that was made of these texts: each document would be read twice
        raise two_kinds(tokens, text)
    first: dict[str, InputFile] = {}
    for file in kept:
        folder = parent_of(file.url)
        other = first.setdefault(folder, file)
        if file.kind == "text" and other.kind == "text":
            other = data.get(folder, other)
            other = other if other.kind not in COMPRESSIBLE else file
        if other.kind != file.kind:
            raise two_kinds(other, file)
    return kept


def two_kinds(one: InputFile, other: InputFile) -> UserError:
    """Return the error for an INPUT that holds files of two kinds."""
    return UserError(
        f"{one.url} is {one.kind} and {other.url} is {other.kind}: which of them is the corpus? Name the files to read,"
        " each kind as an INPUT of its own, or move the others away"
    )


def is_text_about(file: InputFile) -> bool:
    return file.kind == "text" and is_about(file.url.rpartition("/")[2])


def above(held: dict[str, dict[str, InputFile]]) -> dict[str, InputFile]:
    """Return folder -> a file of another kind than text in it or below it."""
    found: dict[str, InputFile] = {}
    for folder, kinds in held.items():
        example = next(file for kind, file in kinds.items() if kind != "text")
        while folder not in found or (found[folder].kind in COMPRESSIBLE and example.kind not in COMPRESSIBLE):
            found[folder] = example
            folder = parent_of(folder)
    return found
