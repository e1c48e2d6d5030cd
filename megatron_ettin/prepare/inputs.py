"""Which files `ettin prepare` reads and how the reading is cut into tasks, from names, sizes and directory indices.

A task is about TASK_BYTES of input: some small files, or a range of a large one. The cut does not look at the number
of workers, so neither does the output. A range is of bytes for every kind, and each kind has its own rule which
documents belong to it (lines that begin in it, row groups that begin in it, ...), so that no file has to be opened to
plan. A compressed file and an MDS shard cannot be entered in the middle and are not split. Small corpora get smaller
tasks, so that there is something to share; very large ones get larger tasks, because a task is a shard and 100,000
shards help nobody.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.prepare.filesystem import Entry, base_name, canonical, find, local_path, parent_of, walk
from megatron_ettin.prepare.formats import (
    ABOUT_DATA,
    CACHED,
    COMPRESSIBLE,
    EMPTY,
    FOREIGN,
    FORMATS,
    KIND_OF_SUFFIX,
    UNKNOWN,
    WHOLE_FOLDER,
    PassedOver,
    extensions,
    is_about,
    kind_of,
    one_kind_a_folder,
)
from megatron_ettin.prepare.input_file import InputFile, Segment
from megatron_ettin.prepare.readers.arrow import dataset_dict_files, saved_dataset_files
from megatron_ettin.prepare.readers.indexed import own_dataset_files, pair_at, pair_of
from megatron_ettin.prepare.readers.mds_index import mds_files

TASK_BYTES = 16 << 20
SMALLEST_TASK_BYTES = 4 << 20
LARGEST_TASK_BYTES = 1 << 30
FEWEST_TASKS = 64  # tasks shrink below TASK_BYTES before there are fewer
MOST_TASKS = 1_024  # and grow beyond it before there are more
PARTNERS = (".bin", ".crc", ".lock")  # belong to another file
SPLITTABLE = ("jsonl", "parquet", "datasets", "indexed")
# a file by which a directory is known as one corpus: it names what belongs to it, and nothing else in it is read
CONTAINERS = {
    "manifest.json": ("indexed", own_dataset_files),
    "index.json": ("mds", mds_files),
    "dataset_dict.json": ("datasets", dataset_dict_files),
    "state.json": ("datasets", saved_dataset_files),
}


@dataclass(frozen=True)
class Task:
    index: int
    segments: tuple[Segment, ...]


def list_inputs(
    inputs: Sequence[str], format_name: str, out: str | os.PathLike[str] | None = None
) -> tuple[list[InputFile], PassedOver]:
    """Every file to read, in order, and the files of directories that were passed over. `out` is never an input."""
    if format_name not in FORMATS:
        raise UserError(f"--format: {format_name!r}{nearest(format_name, FORMATS)}; allowed: {', '.join(FORMATS)}")
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
        known = " ".join((*KIND_OF_SUFFIX, ".jsonl.gz", ".json.zst", *CONTAINERS))
        left = "".join(f"; {line}" for line in passed_over.lines())
        raise UserError(
            f"no input documents in {', '.join(inputs)}; looked for files that are not empty: {known}{left}"
        )
    passed_over.read_bytes = sum(file.bytes for file in files)
    return files, passed_over


@dataclass(frozen=True)
class Listing:
    """How the files of one INPUT are listed."""

    source: str
    format_name: str
    out: str | os.PathLike[str] | None
    passed_over: PassedOver

    def takes(self, kind: str) -> bool:
        return self.format_name in ("auto", kind)


def read_files(given: str, listing: Listing) -> list[InputFile]:
    """The files of one INPUT, those of one kind only in each folder. Raises UserError also where its extensions would
    leave out most of it, by files and by bytes.
    """
    before = len(listing.passed_over.by_reason.get(UNKNOWN, []))
    found = []
    for file in files_of_input(given, listing):
        check_name(file.url)
        if file.kind in COMPRESSIBLE and not file.bytes:
            listing.passed_over.add(EMPTY, Entry(file.url, False, 0, file.modified))
        else:
            found.append(file)
    unknown = listing.passed_over.by_reason.get(UNKNOWN, [])[before:]
    unknown_bytes, found_bytes = sum(entry.bytes for entry in unknown), sum(file.bytes for file in found)
    if len(unknown) > len(found) > 0 and unknown_bytes > found_bytes:
        raise UserError(
            f"{given}: the extensions of {len(unknown):,} of {len(unknown) + len(found):,} files, most of its bytes, do"
            f" not say what is in them ({extensions(unknown)}); --format text (or jsonl, parquet) reads every file as"
            " that; or name the files to read"
        )
    return one_kind_a_folder(found, listing.passed_over) if listing.format_name == "auto" else found


def refuse_output(given: str, out: str | os.PathLike[str] | None) -> None:
    """Raise UserError where an INPUT is the output, which would be read while it is made."""
    path = local_path(given)
    if path is not None and out is not None and os.path.realpath(path) == os.fspath(out):
        raise UserError(f"{given}: is also --out; name another directory for the dataset")


def check_name(url: str) -> None:
    """Raise UserError for a name that is no UTF-8: the dataset's tables could not hold it."""
    try:
        url.encode("utf-8")
    except UnicodeEncodeError:
        shown = os.fsencode(url).decode("utf-8", "backslashreplace")
        raise UserError(f"{shown}: the file's name is not UTF-8; rename it") from None


def files_of_input(given: str, listing: Listing) -> Iterator[InputFile]:
    entry, source = find(given), listing.source
    if entry is None:
        pair = pair_at(given, source, source) if listing.takes("indexed") else None
        if pair is None:
            raise UserError(f"{given}: no such file or directory")
        yield pair
    elif entry.is_directory:
        yield from directory_files(given, listing)
    elif base_name(given) in CONTAINERS and (found := container_files(parent_of(given), [entry], source, listing)):
        yield from found
    else:
        yield explicit_file(entry, source, listing.format_name)


def directory_files(folder: str, listing: Listing) -> Iterator[InputFile]:
    """Files under a directory whose names or indices say that they are wanted; the others are passed over."""
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
            file = found_file(entry, f"{name}/{base_name_of(entry)}", listing)
            if file is not None:
                yield file


def base_name_of(entry: Entry) -> str:
    """Of a listed file: the name it is listed by, also where it is a link."""
    return entry.url.rpartition("/")[2]


def container_files(folder: str, files: list[Entry], name: str, listing: Listing) -> list[InputFile] | None:
    """The files of a directory that is one corpus, None where it is not. `files`: what lies in it, as listed."""
    listed = {base_name_of(entry): entry for entry in files}
    for marker, (kind, list_files) in CONTAINERS.items():
        if marker in listed and listing.takes(kind):
            found = list_files(folder, listed, name, listing.source)
            if found is not None:
                return found
    loose = next((n for n in listed if n.endswith((".mds", ".mds.zstd"))), None)
    if loose is not None and listing.takes("mds") and "index.json" not in listed:
        raise UserError(f"{folder}: holds MDS shards ({loose}) but no index.json, without which they cannot be read")
    return None


def found_file(entry: Entry, name: str, listing: Listing) -> InputFile | None:
    """A file found in a directory. None, and passed over with its reason, where it is not read."""
    file_name = base_name_of(entry)
    kind, compression = kind_of(file_name)
    wanted = listing.format_name
    if wanted in WHOLE_FOLDER:
        if wanted != "text" and kind in (None, "text") and is_about(file_name):
            listing.passed_over.add(ABOUT_DATA, entry)
            return None
        kept = compression if wanted in COMPRESSIBLE else None
        return InputFile(entry.url, name, listing.source, wanted, kept, entry.bytes, entry.modified)
    if kind == "datasets" and file_name.startswith("cache-"):
        listing.passed_over.add(CACHED, entry)
        return None
    file = None
    if kind == "indexed" and listing.takes("indexed"):
        file = pair_of(entry, name, listing.source, strict=wanted == "indexed")
    elif kind is not None and listing.takes(kind) and not (kind == "text" and compression):
        file = InputFile(entry.url, name, listing.source, kind, compression, entry.bytes, entry.modified)
    if file is None and not entry.url.endswith(PARTNERS):
        listing.passed_over.add(reason_of(entry, kind, wanted), entry)
    return file


def reason_of(entry: Entry, kind: str | None, format_name: str) -> str:
    """Why a file is passed over that its extension does not ask for."""
    if not entry.bytes:
        return EMPTY
    if kind is None and is_about(base_name_of(entry)):
        return ABOUT_DATA
    if kind == "indexed":
        return FOREIGN
    return UNKNOWN if format_name == "auto" else f"not {format_name}"


def explicit_file(entry: Entry, source: str, format_name: str) -> InputFile:
    """A file named on the command line: --format decides, else its extension, which must be known."""
    path = local_path(entry.url)
    if path is not None and not os.path.isfile(path):
        raise UserError(f"{path}: neither a file nor a directory")
    kind, compression = kind_of(base_name_of(entry))
    if format_name == "auto" and compression and kind != "jsonl":
        suffix = os.path.splitext(entry.url)[1]
        raise UserError(f"{entry.url}: compressed, not .jsonl{suffix}; say what is in it with --format")
    if entry.bytes == 0:
        raise UserError(f"{entry.url}: the file is empty")
    if path is not None and not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read (permissions)")
    if format_name == "mds" or (format_name == "auto" and entry.url.endswith((".mds", ".mds.zstd"))):
        raise UserError(f"{entry.url}: an MDS shard is read through its directory; name the one with index.json")
    if format_name == "auto" and entry.url.endswith(".bin"):
        kind = "indexed"
    if format_name == "auto" and kind is None:
        raise UserError(
            f"{entry.url}: its extension does not say what is in it; say so with --format: text (the file is one"
            " document), jsonl (a document a line), parquet, datasets, mds or indexed"
        )
    kind = format_name if format_name != "auto" or kind is None else kind
    if kind == "indexed":
        pair = pair_at(entry.url, source, source)
        if pair is None:
            raise UserError(f"{entry.url}: a Megatron dataset is a pair, name.bin and name.idx; the .idx is not there")
        return pair
    kept = compression if kind in COMPRESSIBLE else None
    return InputFile(entry.url, source, source, kind, kept, entry.bytes, entry.modified)


def task_bytes(total_bytes: int) -> int:
    """How much input a task takes, given all of it."""
    usual = min(TASK_BYTES, max(SMALLEST_TASK_BYTES, total_bytes // FEWEST_TASKS))
    return max(usual, min(LARGEST_TASK_BYTES, total_bytes // MOST_TASKS))


def is_splittable(file: InputFile) -> bool:
    """Arrow streams have no index: to find a place in one its messages are walked, which is cheap on a local disk."""
    if file.kind == "datasets" and local_path(file.url) is None:
        return False
    return file.kind in SPLITTABLE and file.compression is None


def cut_tasks(files: Iterable[InputFile]) -> list[Task]:
    """Whole small files together, large ones in ranges as long as a task."""
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
