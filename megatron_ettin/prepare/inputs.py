"""List the files that `ettin prepare` reads, and cut the reading into tasks, by names, sizes and directory indices.

A task is about TASK_BYTES of input: some small files, or a range of a large one. The cut does not depend on the number
of workers, so neither does the output. A range is of bytes for every format, and each format has its own rule which
documents belong to it (lines that begin in it, row groups that begin in it, ...), so that no file has to be opened to
plan. A compressed file and an MDS shard can only be read from the start and are not split. Small corpora get smaller
tasks, so that several workers have tasks. Very large ones get larger tasks, because each task makes a shard.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_ettin.base.errors import UserError
from megatron_ettin.prepare.filesystem import Entry, base_name, canonical, find, local_path, parent_of, walk
from megatron_ettin.prepare.formats import (
    ABOUT_DATA,
    CACHED,
    COMPRESSIBLE,
    EMPTY,
    FOREIGN,
    FORMAT_OF_SUFFIX,
    UNKNOWN,
    WHOLE_FOLDER,
    PassedOver,
    extensions,
    format_of_name,
    is_about,
    one_format_per_folder,
)
from megatron_ettin.prepare.input_file import InputFile, Segment
from megatron_ettin.prepare.readers.arrow import dataset_dict_files, saved_dataset_files
from megatron_ettin.prepare.readers.indexed import own_dataset_files, pair_at, pair_of
from megatron_ettin.prepare.readers.mds_index import mds_files

TASK_BYTES = 16 << 20
SMALLEST_TASK_BYTES = 4 << 20
LARGEST_TASK_BYTES = 1 << 30
# tasks are smaller than TASK_BYTES if there would be fewer than this
FEWEST_TASKS = 64
# tasks are larger than TASK_BYTES if there would be more than this
MOST_TASKS = 1_024
# extensions of files that belong to another file
PARTNERS = (".bin", ".crc", ".lock")
SPLITTABLE = ("jsonl", "parquet", "datasets", "indexed")
# file that marks a directory as one corpus -> (format, function that lists the corpus's files); no others are read
CONTAINERS = {
    "manifest.json": ("indexed", own_dataset_files),
    "index.json": ("mds", mds_files),
    "dataset_dict.json": ("datasets", dataset_dict_files),
    "state.json": ("datasets", saved_dataset_files),
}


@dataclass(frozen=True)
class Task:
    """Segments that become one shard of each split."""

    index: int
    segments: tuple[Segment, ...]


def list_inputs(
    inputs: Sequence[str], format_name: str, out: str | os.PathLike[str] | None = None
) -> tuple[list[InputFile], PassedOver]:
    """Return every file to read, in order, and the files of directories that were passed over. Raises UserError.

    Args:
        inputs: paths and URLs, as given on the command line.
        format_name: value of `--format`.
        out: the dataset to be made, which is never an input.
    """
    if "" in inputs:
        raise UserError("INPUT: an empty name; the current directory is `.`")
    files: list[InputFile] = []
    passed_over = PassedOver()
    taken: dict[str, int] = {}
    for given in map(canonical, inputs):
        refuse_output(given, out)
        label = base_name(given)
        taken[label] = taken.get(label, 0) + 1
        source = label if taken[label] == 1 else f"{label}#{taken[label]}"
        files += read_files(given, Listing(source, format_name, out, passed_over))
    if not files:
        known = " ".join((*FORMAT_OF_SUFFIX, ".jsonl.gz", ".json.zst", *CONTAINERS))
        left = "".join(f"; {line}" for line in passed_over.lines())
        raise UserError(
            f"no input documents in {', '.join(inputs)}; looked for files that are not empty: {known}{left}"
        )
    passed_over.read_bytes = sum(file.bytes for file in files)
    return files, passed_over


@dataclass(frozen=True)
class Listing:
    """Settings for listing the files of one INPUT."""

    source: str
    format_name: str
    out: str | os.PathLike[str] | None
    passed_over: PassedOver

    def takes(self, format_name: str) -> bool:
        """Return whether files of this format are read."""
        return self.format_name in ("auto", format_name)


def read_files(given: str, listing: Listing) -> list[InputFile]:
    """Return the files of one INPUT, with one format in each folder.

    Raises:
        UserError: a file cannot be read, or most of the INPUT's files and bytes have extensions of no known format.
    """
    before = len(listing.passed_over.by_reason.get(UNKNOWN, []))
    files = []
    for file in files_of_input(given, listing):
        check_name(file.url)
        if file.format in COMPRESSIBLE and not file.bytes:
            listing.passed_over.add(EMPTY, Entry(file.url, False, 0, file.modified))
        else:
            files.append(file)
    unknown = listing.passed_over.by_reason.get(UNKNOWN, [])[before:]
    unknown_bytes, read_bytes = sum(entry.bytes for entry in unknown), sum(file.bytes for file in files)
    if len(unknown) > len(files) > 0 and unknown_bytes > read_bytes:
        raise UserError(
            f"{given}: the extensions of {len(unknown):,} of {len(unknown) + len(files):,} files, most of its bytes, do"
            f" not say what is in them ({extensions(unknown)}); --format text (or jsonl, parquet) reads every file as"
            " that; or name the files to read"
        )
    return one_format_per_folder(files, listing.passed_over) if listing.format_name == "auto" else files


def refuse_output(given: str, out: str | os.PathLike[str] | None) -> None:
    """Raise UserError if an INPUT is the output folder `out`, which would be read while it is made."""
    path = local_path(given)
    if path is not None and out is not None and os.path.realpath(path) == os.fspath(out):
        raise UserError(f"{given}: is also --out; name another directory for the dataset")


def check_name(url: str) -> None:
    """Raise UserError if a name is not UTF-8, because the dataset's tables could not hold it."""
    try:
        url.encode("utf-8")
    except UnicodeEncodeError:
        shown = os.fsencode(url).decode("utf-8", "backslashreplace")
        raise UserError(f"{shown}: the file's name is not UTF-8; rename it") from None


def files_of_input(given: str, listing: Listing) -> Iterator[InputFile]:
    """Yield the files of one INPUT: a file, a directory, or the prefix of a Megatron dataset. Raises UserError."""
    entry, source = find(given), listing.source
    if entry is None:
        pair = pair_at(given, source, source) if listing.takes("indexed") else None
        if pair is None:
            raise UserError(f"{given}: no such file or directory")
        yield pair
    elif entry.is_directory:
        yield from directory_files(given, listing)
    elif base_name(given) in CONTAINERS and (files := container_files(parent_of(given), [entry], source, listing)):
        yield from files
    else:
        yield explicit_file(entry, source, listing.format_name)


def directory_files(folder: str, listing: Listing) -> Iterator[InputFile]:
    """Yield the files to read under a directory, and record the others in `listing.passed_over`. Raises UserError."""
    for here, folders, files in walk(folder):
        path = local_path(here)
        if path is not None and listing.out is not None and os.path.realpath(path) == os.fspath(listing.out):
            folders.clear()
            continue
        within = here.removeprefix(folder).strip("/")
        name = f"{listing.source}/{within}" if within else listing.source
        contained = container_files(here, files, name, listing)
        if contained is not None:
            folders.clear()
            yield from contained
            continue
        for entry in files:
            check_name(entry.url)
            file = listed_file(entry, f"{name}/{base_name_of(entry)}", listing)
            if file is not None:
                yield file


def base_name_of(entry: Entry) -> str:
    """Return the last part of an entry's path or URL; a link has its own name."""
    return entry.url.rpartition("/")[2]


def container_files(folder: str, files: list[Entry], name: str, listing: Listing) -> list[InputFile] | None:
    """Return the files of a directory that a file of CONTAINERS marks as one corpus, else None. Raises UserError.

    Args:
        folder: the directory.
        files: the files in it.
        name: name of the directory in the dataset.
        listing: settings of the INPUT.
    """
    listed = {base_name_of(entry): entry for entry in files}
    for marker, (format_name, list_files) in CONTAINERS.items():
        if marker in listed and listing.takes(format_name):
            members = list_files(folder, listed, name, listing.source)
            if members is not None:
                return members
    loose = next((n for n in listed if n.endswith((".mds", ".mds.zstd"))), None)
    if loose is not None and listing.takes("mds") and "index.json" not in listed:
        raise UserError(f"{folder}: holds MDS shards ({loose}) but no index.json, without which they cannot be read")
    return None


def listed_file(entry: Entry, name: str, listing: Listing) -> InputFile | None:
    """Return a file of a directory as an input; if it is not read, record the reason and return None."""
    file_name = base_name_of(entry)
    named, compression = format_of_name(file_name)
    wanted = listing.format_name
    if wanted in WHOLE_FOLDER:
        if wanted != "text" and named in (None, "text") and is_about(file_name):
            listing.passed_over.add(ABOUT_DATA, entry)
            return None
        kept = compression if wanted in COMPRESSIBLE else None
        return InputFile(entry.url, name, listing.source, wanted, kept, entry.bytes, entry.modified)
    if named == "datasets" and file_name.startswith("cache-"):
        listing.passed_over.add(CACHED, entry)
        return None
    file = None
    if named == "indexed" and listing.takes("indexed"):
        file = pair_of(entry, name, listing.source, strict=wanted == "indexed")
    elif named is not None and listing.takes(named) and not (named == "text" and compression):
        file = InputFile(entry.url, name, listing.source, named, compression, entry.bytes, entry.modified)
    if file is None and not entry.url.endswith(PARTNERS):
        listing.passed_over.add(reason_of(entry, named, wanted), entry)
    return file


def reason_of(entry: Entry, named: str | None, format_name: str) -> str:
    """Return the reason to pass over a file. `named` is the format that its extension names, or None."""
    if not entry.bytes:
        return EMPTY
    if named is None and is_about(base_name_of(entry)):
        return ABOUT_DATA
    if named == "indexed":
        return FOREIGN
    return UNKNOWN if format_name == "auto" else f"not {format_name}"


def explicit_file(entry: Entry, source: str, format_name: str) -> InputFile:
    """Return a file named on the command line: --format decides, else its extension, which must be known.

    Raises:
        UserError: the file is empty or cannot be read, or its format is unknown.
    """
    path = local_path(entry.url)
    if path is not None and not os.path.isfile(path):
        raise UserError(f"{path}: neither a file nor a directory")
    named, compression = format_of_name(base_name_of(entry))
    if format_name == "auto" and compression and named != "jsonl":
        suffix = os.path.splitext(entry.url)[1]
        raise UserError(f"{entry.url}: compressed, not .jsonl{suffix}; say what is in it with --format")
    if entry.bytes == 0:
        raise UserError(f"{entry.url}: the file is empty")
    if path is not None and not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read (permissions)")
    if format_name == "mds" or (format_name == "auto" and entry.url.endswith((".mds", ".mds.zstd"))):
        raise UserError(f"{entry.url}: an MDS shard is read through its directory; name the one with index.json")
    if format_name == "auto" and entry.url.endswith(".bin"):
        named = "indexed"
    if format_name == "auto" and named is None:
        raise UserError(
            f"{entry.url}: its extension does not say what is in it; say so with --format: text (the file is one"
            " document), jsonl (a document a line), parquet, datasets, mds or indexed"
        )
    chosen = format_name if format_name != "auto" or named is None else named
    if chosen == "indexed":
        pair = pair_at(entry.url, source, source)
        if pair is None:
            raise UserError(f"{entry.url}: a Megatron dataset is a pair, name.bin and name.idx; the .idx is not there")
        return pair
    kept = compression if chosen in COMPRESSIBLE else None
    return InputFile(entry.url, source, source, chosen, kept, entry.bytes, entry.modified)


def task_bytes(total_bytes: int) -> int:
    """Return the size of a task for a corpus of `total_bytes`, both in estimated bytes of text."""
    usual = min(TASK_BYTES, max(SMALLEST_TASK_BYTES, total_bytes // FEWEST_TASKS))
    return max(usual, min(LARGEST_TASK_BYTES, total_bytes // MOST_TASKS))


def is_splittable(file: InputFile) -> bool:
    """Return whether a file may be cut into segments.

    Arrow streams have no index: to reach a batch their messages are walked, which is cheap on a local disk only.
    """
    if file.format == "datasets" and local_path(file.url) is None:
        return False
    return file.format in SPLITTABLE and file.compression is None


def cut_tasks(files: Iterable[InputFile]) -> list[Task]:
    """Divide the files into tasks: whole small files together, large ones in ranges as long as a task."""
    files = list(files)
    limit = task_bytes(sum(file.weight_bytes for file in files))
    tasks: list[Task] = []
    gathered: list[Segment] = []
    weight = 0

    def close() -> None:
        nonlocal gathered, weight
        if gathered:
            tasks.append(Task(len(tasks), tuple(gathered)))
        gathered, weight = [], 0

    for file in files:
        split = is_splittable(file) and file.weight_bytes > limit
        step = max(limit // file.growth, 1) if split else max(file.bytes, 1)
        for start in range(0, max(file.bytes, 1), step):
            end = min(start + step, file.bytes)
            size = (end - start) * file.growth
            if weight + size > limit:
                close()
            gathered.append(Segment(file, start, end))
            weight += size
    close()
    return tasks
