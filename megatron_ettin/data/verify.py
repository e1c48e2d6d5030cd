"""Read every byte of a dataset again and report which files differ from the manifest, and where.

Files are hashed by several threads (hashlib and reads release the interpreter's lock). All bad files are reported, not
only the first: a file system that lost one file has often lost more.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.base.digests import damaged_ranges, in_threads, read_checksums, shard_digest
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import DIGEST, checked_digest, load_json
from megatron_ettin.base.paths import path_in
from megatron_ettin.data.manifest import (
    CHECKSUMS_SUFFIX,
    FILE_NAME,
    INPUTS_FILE,
    FileRecord,
    Manifest,
    read_manifest,
    shard_file,
)
from megatron_ettin.data.row_files import UNREADABLE, OrderRecord, PackingRecord, read_record

RANGES_SHOWN = 4
REBUILD = " (remove its folder: it is built again)"


@dataclass(frozen=True)
class Expected:
    """One file, with the size and sha256 that it must have."""

    path: Path
    record: FileRecord
    blocks: Path | None = None
    """Sidecar file with the digests of its blocks; None if it has none."""
    remedy: str = ""
    """Advice for the end of a message about damage."""
    problem: str = ""
    """Damage that is known before the file is read."""


@dataclass(frozen=True)
class Verified:
    """Result of a verification."""

    problems: list[str]
    """One line for each bad file."""
    files: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        speed = self.bytes / max(self.seconds, 1e-9) / 1e6
        return f"{self.files} files, {self.bytes:,} bytes in {self.seconds:.1f} s ({speed:,.0f} MB/s)"


def verify_files(expected: list[Expected]) -> Verified:
    """Read the files and compare them with their records."""
    began = time.monotonic()
    problems = [problem for problem in in_threads(problem_of, expected) if problem]
    size = sum(file.record.bytes for file in expected)
    return Verified(problems, len(expected), size, time.monotonic() - began)


def dataset_files(folder: Path, manifest: Manifest | None = None) -> Iterator[Expected]:
    """Yield the files of a dataset and of its held-out part. Raises UserError if a manifest cannot be read."""
    manifest = manifest or read_manifest(folder)
    for name, record in manifest.tokenizer_files.items():
        yield Expected(path_in(folder / "tokenizer", name, folder / FILE_NAME), record)
    for shard in manifest.shards:
        blocks = shard_file(folder, shard, CHECKSUMS_SUFFIX)
        for suffix, record in shard.files.items():
            yield Expected(shard_file(folder, shard, suffix), record, blocks if suffix != CHECKSUMS_SUFFIX else None)
    if (folder / "heldout").is_dir():
        yield from dataset_files(folder / "heldout")


def unlisted_files(folder: Path) -> Iterator[Expected]:
    """Yield the files of a dataset that its manifest does not list: packing indices and compiled orders.

    inputs.json is yielded if it is damaged.
    """
    yield from damaged_input_list(folder)
    packing = [(PackingRecord, path) for path in sorted(folder.glob(f"*_*/{PackingRecord.FILE}"))]
    orders = [(OrderRecord, path) for path in sorted(folder.glob(f"order_*/{OrderRecord.FILE}"))]
    for record_class, path in (*packing, *orders):
        try:
            files = read_record(record_class, path.parent).files
            paths = {name: path_in(path.parent, name, path) for name in files}
        except UNREADABLE as error:
            problem = str(error) if isinstance(error, UserError) else f"damaged ({type(error).__name__})"
            yield Expected(path, FileRecord(0, ""), remedy=REBUILD, problem=problem)
            continue
        yield from (Expected(paths[name], record, remedy=REBUILD) for name, record in files.items())


def damaged_input_list(folder: Path) -> Iterator[Expected]:
    """Yield inputs.json of a dataset if it cannot be read or its digest is wrong. It may be absent."""
    path = folder / INPUTS_FILE
    try:
        raw = load_json(path.read_text(encoding="utf-8"))
        if DIGEST not in raw:
            raise ValueError(f"it has no {DIGEST}")
        checked_digest(raw)
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, AttributeError) as error:
        remedy = " (remove it: `ettin prepare` then compares names and sizes of its inputs alone)"
        yield Expected(path, FileRecord(0, ""), remedy=remedy, problem=f"damaged ({error})")


def problem_of(file: Expected) -> str | None:
    """Return a message with the path and the damaged bytes of one file; None if the file is sound."""
    path, record = file.path, file.record
    if file.problem:
        return f"{path}: {file.problem}{file.remedy}"
    try:
        size = path.stat().st_size
        if size == record.bytes:
            is_sound = shard_digest(path).sha256 == record.sha256
            return None if is_sound else f"{path}: damaged{ranges(file)}{file.remedy}"
    except FileNotFoundError:
        return f"{path}: missing (the manifest lists it with {record.bytes} bytes){file.remedy}"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if size < record.bytes:
        return f"{path}: truncated, bytes {size} to {record.bytes - 1} are missing{file.remedy}"
    return f"{path}: changed, {size} bytes, the manifest says {record.bytes}{file.remedy}"


def ranges(file: Expected) -> str:
    """Return `, within bytes A to B` of the damaged blocks; without a usable sidecar, that the sha256 differs."""
    if file.blocks is None:
        return ", its sha256 is not the manifest's"
    suffix = file.path.name.removeprefix(file.blocks.name.removesuffix(CHECKSUMS_SUFFIX))
    try:
        damaged = list(damaged_ranges(read_checksums(file.blocks)[suffix], shard_digest(file.path)))
    except (OSError, ValueError, KeyError, TypeError):
        return f", its sha256 is not the manifest's ({file.blocks.name}, which lists its blocks, is damaged too)"
    if not damaged:
        return ", its sha256 is not the manifest's"
    shown = ", ".join(f"{first} to {end - 1}" for first, end in damaged[:RANGES_SHOWN])
    more = f" and {len(damaged) - RANGES_SHOWN} more ranges" if len(damaged) > RANGES_SHOWN else ""
    return f", within bytes {shown}{more}"
