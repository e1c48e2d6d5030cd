"""Copy a mixture's datasets to the host's own disk (`data.local_copy`), so that no rows are read over a network.

One process per host copies, the others wait for its lock. A file is hashed while it is copied and gets its name only
when its sha256 is the manifest's; a dataset gets its name when all of its files are there. So a killed copy is
continued, and later runs find the copy by the dataset's fingerprint. The order of a run stays the same, because it
depends on fingerprints, not on paths. Held-out parts and unused packing indices are not copied.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import atomic_path, file_lock, fsync, publish_folder
from megatron_ettin.base.log import log_info, log_when_slow
from megatron_ettin.base.paths import Links, path_in
from megatron_ettin.data.blended_dataset import BlendedDataset
from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.manifest import FILE_NAME, FileRecord
from megatron_ettin.data.packing_index import PackingIndex
from megatron_ettin.data.row_files import PackingRecord

COPIED_AT_ONCE = 8
BLOCK_BYTES = 8 << 20
KEY = "data.local_copy"


@dataclass(frozen=True)
class FolderCopy:
    """A folder that is copied as a whole or not at all."""

    source: Path
    target: Path
    files: dict[str, FileRecord]
    last: str
    """Name of the file that lists the others; it is copied after them."""

    @property
    def staging(self) -> Path:
        """Return the folder that the files are copied to before it gets its name."""
        return self.target.with_name(f".tmp-{self.target.name}")

    def source_file(self, name: str) -> Path:
        """Return the path of a file to copy. Raises UserError for a link, which could lead to any file."""
        return path_in(self.source, name, self.source / self.last, nested=True, links=Links.NONE)

    def staged(self, name: str) -> Path:
        """Return the path of a file's copy before the folder gets its name."""
        return path_in(self.staging, name, self.source / self.last, nested=True, links=Links.NONE)

    def missing(self) -> Iterator[tuple[str, FileRecord]]:
        """Yield (name, record) of the files that are not in the staging folder with their full size yet."""
        for name, record in self.files.items():
            try:
                whole = self.staged(name).stat().st_size == record.bytes
            except OSError:
                whole = False
            if not whole:
                yield name, record


def open_local_copy(corpus: BlendedDataset, folder: str, log: Callable[[str], None] = log_info) -> BlendedDataset:
    """Return the same rows, read from copies of the datasets under `folder`. Missing copies are made first.

    Raises:
        UserError: there is no room, a file is damaged, or `folder` cannot be written.
    """
    root = Path(folder).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            with log_when_slow(f"{KEY}: waiting for another process, which copies to {root}"):
                held.enter_context(file_lock(root / ".lock"))
            # one per fingerprint, so that a repeated dataset is copied once
            used = {dataset.fingerprint: i for i, dataset in reversed(list(enumerate(corpus.datasets)))}
            units = [
                unit
                for i in sorted(used.values())
                for unit in units_to_copy(corpus.datasets[i], corpus.packing_indices[i : i + 1], root)
            ]
            if units:
                copy(units, root, log)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{error.strerror}; what was copied is kept: make room and start again to go on"
            raise UserError(f"{KEY}: {root}: {reason}") from None
        raise UserError(f"{KEY}: {error.filename or root}: {error.strerror or error}") from None
    datasets = [open_dataset(copy_path(dataset, root)) for dataset in corpus.datasets]
    copies = []
    # a recorded order has no packing indices
    for index, dataset in zip(corpus.packing_indices, datasets, strict=False):
        path = dataset.path / index.folder.name
        copied = PackingIndex.open(path, dataset, index.seq_len, index.batching)
        if copied is None or copied.fingerprint != index.fingerprint:
            raise UserError(f"{KEY}: {path}: changed while it was opened; start again")
        copies.append(copied)
    return replace(corpus, datasets=datasets, packing_indices=copies)


def copy_path(dataset: Dataset, root: Path) -> Path:
    """Return the folder of a dataset's copy, which does not depend on the dataset's own path."""
    return path_in(root, f"dataset-{dataset.fingerprint[:32]}", dataset.path / FILE_NAME)


def units_to_copy(dataset: Dataset, indices: Sequence[PackingIndex], root: Path) -> Iterator[FolderCopy]:
    """Yield the folders of a dataset and its packing index that are not copied to `root` yet.

    A copy that lost a file is renamed to its staging folder, so that only this file is copied again.
    """
    target = copy_path(dataset, root)
    names = {f"{shard.name}{suffix}": r for shard in dataset.manifest.shards for suffix, r in shard.files.items()}
    names |= {f"tokenizer/{name}": record for name, record in dataset.manifest.tokenizer_files.items()}
    whole = FolderCopy(dataset.path, target, names, FILE_NAME)
    try:
        copied = open_dataset(target)
    except UserError:
        copied = None
        if target.exists():
            shutil.rmtree(whole.staging, ignore_errors=True)
            os.rename(target, whole.staging)
        yield whole
    for index in indices:
        path = target / index.folder.name
        existing = copied and PackingIndex.open(path, copied, index.seq_len, index.batching)
        if not existing or existing.fingerprint != index.fingerprint:
            yield FolderCopy(index.folder, path, index.record.files, PackingRecord.FILE)


def copy(units: Sequence[FolderCopy], root: Path, log: Callable[[str], None]) -> None:
    """Copy the folders in order, and log size and speed. Raises UserError if there is no room for them."""
    jobs = {unit.target: list(unit.missing()) for unit in units}
    needed = sum(record.bytes for missing in jobs.values() for _, record in missing)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{KEY}: {root} has {format_bytes(free)} free, the data of this run needs {format_bytes(needed)} more;"
            " make room, name another folder, or leave the key out"
        )
    began, names = time.monotonic(), sorted({unit.source.name for unit in units})
    log(f"{KEY}: copying {format_bytes(needed)} to {root} ({', '.join(names)})")
    for unit in units:
        copy_unit(unit, jobs[unit.target])
    seconds = max(time.monotonic() - began, 1e-3)
    log(f"{KEY}: copied in {seconds:,.1f} s, {format_bytes(needed / seconds)}/s, every sha256 checked")


def copy_unit(unit: FolderCopy, missing: Sequence[tuple[str, FileRecord]]) -> None:
    """Copy the missing files to the staging folder in several threads, and rename it to the target."""
    if unit.last == PackingRecord.FILE and unit.source.is_symlink():
        raise UserError(f"{KEY}: {unit.source}: a link below a dataset is not copied; put the folder itself there")
    for folder in {unit.staging, *(unit.staged(name).parent for name in unit.files)}:
        folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    with ThreadPoolExecutor(COPIED_AT_ONCE) as pool:
        try:
            copies = [
                pool.submit(copy_file, unit.source_file(name), unit.staged(name), record, stop)
                for name, record in missing
            ]
            for future in copies:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    with atomic_path(unit.staged(unit.last)) as part:
        shutil.copyfile(unit.source_file(unit.last), part)
    fsync(unit.staging)
    shutil.rmtree(unit.target, ignore_errors=True)
    publish_folder(unit.staging, unit.target)


def copy_file(source: Path, target: Path, record: FileRecord, stop: threading.Event) -> None:
    """Copy and hash a file. The target gets its name only when it is complete.

    Raises:
        UserError: the file has another sha256.
        CancelledError: `stop` was set.
    """
    digest = hashlib.sha256()
    with open(source, "rb") as reading, atomic_path(target) as part, open(part, "wb") as writing:
        while block := reading.read(BLOCK_BYTES):
            if stop.is_set():
                raise CancelledError
            digest.update(block)
            writing.write(block)
        if digest.hexdigest() != record.sha256:
            raise UserError(f"{source}: damaged, its sha256 is not the manifest's {record.sha256[:16]}...")


def format_bytes(count: float) -> str:
    """Format a size for people: 1.2 TB, 34.5 GB, 12 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
