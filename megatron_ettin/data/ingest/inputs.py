"""Which files `ettin prepare` reads and how the reading is cut into tasks, from names and sizes alone.

A task is about TASK_BYTES of input: some small files, or a range of one large .jsonl. The cut does not look at the
number of workers, so neither does the output. A compressed file cannot be entered in the middle and is not split.
Small corpora get smaller tasks, so that there is something to share; very large ones get larger tasks, because a task
is a shard and 100,000 shards help nobody."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.config.errors import UserError, nearest

TASK_BYTES = 16 << 20
SMALLEST_TASK_BYTES = 4 << 20
LARGEST_TASK_BYTES = 1 << 30
FEWEST_TASKS = 64  # tasks shrink below TASK_BYTES before there are fewer
MOST_TASKS = 1_024  # and grow beyond it before there are more
COMPRESSED_GROWTH = 4  # a compressed byte counts as so many
FORMATS = ("auto", "text", "jsonl")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
JSONL_SUFFIXES = (".jsonl",)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class InputFile:
    path: Path
    name: str  # what the dataset calls it: the INPUT's own name, then the path within it
    source: str  # the INPUT it came by
    kind: str  # "text" or "jsonl"
    compression: str | None
    bytes: int

    @property
    def weight_bytes(self) -> int:
        return self.bytes * (COMPRESSED_GROWTH if self.compression else 1)


@dataclass(frozen=True)
class Segment:
    """The lines of a file that begin in [start, end); text and compressed files are whole."""

    file: InputFile
    start: int
    end: int
    first_line: int = 1  # number of the line at or after `start`

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.end == self.file.bytes


@dataclass(frozen=True)
class Task:
    index: int
    segments: tuple[Segment, ...]


def list_inputs(inputs: Sequence[str], format_name: str) -> tuple[list[InputFile], list[str]]:
    """Every file to read, in order, and the empty files that were passed over in directories."""
    if format_name not in FORMATS:
        raise UserError(f"--format: {format_name!r}{nearest(format_name, FORMATS)}; allowed: {', '.join(FORMATS)}")
    files: list[InputFile] = []
    empty: list[str] = []
    taken: dict[str, int] = {}
    for given in inputs:
        path = Path(given)
        label = path.resolve().name or "root"
        taken[label] = taken.get(label, 0) + 1
        source = label if taken[label] == 1 else f"{label}#{taken[label]}"
        if path.is_dir():
            for found in walk(path):
                file = input_file(found, f"{source}/{found.relative_to(path).as_posix()}", source, format_name)
                if file is not None and file.bytes:
                    files.append(file)
                elif file is not None:
                    empty.append(str(found))
        else:
            files.append(explicit_file(path, source, format_name))
    if not files:
        known = " ".join((*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".jsonl.gz", ".jsonl.zst"))
        raise UserError(f"no input documents in {', '.join(inputs)}; looked for files that are not empty: {known}")
    return files, empty


def walk(folder: Path) -> Iterator[Path]:
    """Files under a directory in sorted order, hidden ones left out; links to directories are followed once."""
    visited: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def kind_of(path: Path) -> tuple[str | None, str | None]:
    """(kind, compression) by the file's extensions; kind is None where they do not tell."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    kind = "text" if suffix in TEXT_SUFFIXES else "jsonl" if suffix in JSONL_SUFFIXES else None
    return kind, compression


def input_file(path: Path, name: str, source: str, format_name: str) -> InputFile | None:
    """A file found in a directory: None unless its extension says that it is wanted."""
    kind, compression = kind_of(path)
    if kind is None or (kind == "text" and compression) or format_name not in ("auto", kind):
        return None
    return InputFile(path, name, source, kind, compression, path.stat().st_size)


def explicit_file(path: Path, source: str, format_name: str) -> InputFile:
    """A file named on the command line: --format decides, else its extension, else it is text."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if not path.is_file():
        raise UserError(f"{path}: neither a file nor a directory")
    kind, compression = kind_of(path)
    if format_name == "auto" and compression and kind != "jsonl":
        raise UserError(f"{path}: compressed, not .jsonl{path.suffix}; say what is in it with --format")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: the file is empty")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read (permissions)")
    kind = (kind or "text") if format_name == "auto" else format_name
    return InputFile(path, source, source, kind, compression, size)


def task_bytes(total_bytes: int) -> int:
    """How much input a task takes, given all of it."""
    usual = min(TASK_BYTES, max(SMALLEST_TASK_BYTES, total_bytes // FEWEST_TASKS))
    return max(usual, min(LARGEST_TASK_BYTES, total_bytes // MOST_TASKS))


def cut_tasks(files: Iterable[InputFile]) -> list[Task]:
    """Whole small files together, large plain .jsonl in ranges as long as a task."""
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
        splittable = file.kind == "jsonl" and file.compression is None and file.bytes > limit
        step = limit if splittable else file.bytes
        for start in range(0, file.bytes, step):
            end = min(start + step, file.bytes)
            size = (end - start) if splittable else file.weight_bytes
            if weight + size > limit:
                close()
            gathered.append(Segment(file, start, end))
            weight += size
    close()
    return tasks
