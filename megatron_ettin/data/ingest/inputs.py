"""Which files `ettin prepare` reads and how the reading is cut into tasks, from names, sizes and directory indices.

A task is about TASK_BYTES of input: some small files, or a range of a large one. The cut does not look at the number
of workers, so neither does the output. A range is of bytes for every kind, and each kind has its own rule which
documents belong to it (lines that begin in it, row groups that begin in it, ...), so that no file has to be opened to
plan. A compressed file and an MDS shard cannot be entered in the middle and are not split. Small corpora get smaller
tasks, so that there is something to share; very large ones get larger tasks, because a task is a shard and 100,000
shards help nobody."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_ettin.config.errors import UserError, nearest
from megatron_ettin.data.ingest.filesystem import Entry, base_name, canonical, find, local_path, parent_of, walk
from megatron_ettin.data.ingest.input_file import InputFile, Segment
from megatron_ettin.data.ingest.readers.arrow_directory import dataset_dict_files, saved_dataset_files
from megatron_ettin.data.ingest.readers.indexed_files import own_dataset_files, pair_at, pair_of
from megatron_ettin.data.ingest.readers.mds_index import mds_files

TASK_BYTES = 16 << 20
SMALLEST_TASK_BYTES = 4 << 20
LARGEST_TASK_BYTES = 1 << 30
FEWEST_TASKS = 64  # tasks shrink below TASK_BYTES before there are fewer
MOST_TASKS = 1_024  # and grow beyond it before there are more
FORMATS = ("auto", "text", "jsonl", "parquet", "datasets", "mds", "indexed")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
KIND_OF_SUFFIX = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".arrow": "datasets",
    ".idx": "indexed",
}
PARTNERS = (".bin", ".crc", ".lock")  # belong to another file
# named on the command line, these are not taken for texts: somebody meant their content
STRUCTURED = (".json", ".csv", ".tsv", ".xml", ".zstd", ".bz2", ".xz", ".zip", ".tar", ".bin")
COMPRESSIBLE = ("text", "jsonl")
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


def list_inputs(inputs: Sequence[str], format_name: str) -> tuple[list[InputFile], list[str]]:
    """Every file to read, in order, and the files that were passed over in directories: those that are empty, those of
    unknown kinds, and texts in or above a directory of other formats, which are a repository's README."""
    if format_name not in FORMATS:
        raise UserError(f"--format: {format_name!r}{nearest(format_name, FORMATS)}; allowed: {', '.join(FORMATS)}")
    files: list[InputFile] = []
    passed_over: list[str] = []
    taken: dict[str, int] = {}
    for given in map(canonical, inputs):
        label = base_name(given)
        taken[label] = taken.get(label, 0) + 1
        source = label if taken[label] == 1 else f"{label}#{taken[label]}"
        found = list(files_of_input(given, source, format_name, passed_over))
        described = described_folders(found) if format_name == "auto" else set()
        for file in found:
            is_readme = file.kind == "text" and parent_of(file.url) in described
            if file.kind in COMPRESSIBLE and (not file.bytes or is_readme):
                passed_over.append(file.url)
            else:
                files.append(file)
    if not files:
        known = " ".join((*KIND_OF_SUFFIX, ".jsonl.gz", ".jsonl.zst", *CONTAINERS))
        raise UserError(f"no input documents in {', '.join(inputs)}; looked for files that are not empty: {known}")
    return files, passed_over


def described_folders(files: list[InputFile]) -> set[str]:
    """The directories that hold files of other formats than text and JSON lines, and those above them."""
    folders: set[str] = set()
    for file in files:
        folder = parent_of(file.url)
        while file.kind not in COMPRESSIBLE and folder not in folders:
            folders.add(folder)
            folder = parent_of(folder)
    return folders


def files_of_input(given: str, source: str, format_name: str, passed_over: list[str]) -> Iterator[InputFile]:
    entry = find(given)
    if entry is None:
        pair = pair_at(given, source, source) if format_name in ("auto", "indexed") else None
        if pair is None:
            raise UserError(f"{given}: no such file or directory")
        yield pair
    elif entry.is_directory:
        yield from directory_files(given, source, format_name, passed_over)
    elif base_name(given) in CONTAINERS and (
        found := container_files(parent_of(given), [entry], source, source, format_name)
    ):
        yield from found
    else:
        yield explicit_file(entry, source, format_name)


def directory_files(folder: str, source: str, format_name: str, passed_over: list[str]) -> Iterator[InputFile]:
    """Files under a directory whose names or indices say that they are wanted; the others go to `passed_over`."""
    for here, folders, files in walk(folder):
        within = here.removeprefix(folder).strip("/")
        name = f"{source}/{within}" if within else source
        contained = container_files(here, files, name, source, format_name)
        if contained is not None:
            folders.clear()
            yield from contained
            continue
        for entry in files:
            file = found_file(entry, f"{name}/{base_name_of(entry)}", source, format_name)
            if file is not None:
                yield file
            elif not entry.url.endswith(PARTNERS):
                passed_over.append(entry.url)


def base_name_of(entry: Entry) -> str:
    """Of a listed file: the name it is listed by, also where it is a link."""
    return entry.url.rpartition("/")[2]


def container_files(
    folder: str, files: list[Entry], name: str, source: str, format_name: str
) -> list[InputFile] | None:
    """The files of a directory that is one corpus, None where it is not. `files`: what lies in it, as listed."""
    listed = {base_name_of(entry): entry for entry in files}
    for marker, (kind, list_files) in CONTAINERS.items():
        if marker in listed and format_name in ("auto", kind):
            found = list_files(folder, listed, name, source)
            if found is not None:
                return found
    loose = next((n for n in listed if n.endswith((".mds", ".mds.zstd"))), None)
    if loose is not None and format_name in ("auto", "mds") and "index.json" not in listed:
        raise UserError(f"{folder}: holds MDS shards ({loose}) but no index.json, without which they cannot be read")
    return None


def kind_of(name: str) -> tuple[str | None, str | None]:
    """(kind, compression) by a file's extensions; kind is None where they do not tell."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    kind = KIND_OF_SUFFIX.get(os.path.splitext(stem)[1] if compression else suffix)
    return (kind if compression is None or kind in COMPRESSIBLE else None), compression


def found_file(entry: Entry, name: str, source: str, format_name: str) -> InputFile | None:
    """A file found in a directory: None unless its extension says that it is wanted."""
    file_name = base_name_of(entry)
    kind, compression = kind_of(file_name)
    if kind is None or (kind == "text" and compression) or format_name not in ("auto", kind):
        return None
    if kind == "datasets" and file_name.startswith("cache-"):  # what `datasets` keeps of a map or a filter
        return None
    if kind == "indexed":
        return pair_of(entry, name, source, strict=format_name == "indexed")
    return InputFile(entry.url, name, source, kind, compression, entry.bytes, entry.modified)


def explicit_file(entry: Entry, source: str, format_name: str) -> InputFile:
    """A file named on the command line: --format decides, else its extension, else it is text."""
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
    if format_name == "auto" and kind is None and entry.url.lower().endswith(STRUCTURED):
        known = ", ".join(FORMATS[1:])
        raise UserError(f"{entry.url}: its extension does not say what is in it; say so with --format ({known})")
    kind = (kind or "text") if format_name == "auto" else format_name
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
