"""Write a planned checkpoint in the background while training goes on.

A thread of every rank writes and hashes this rank's files, from copies in host memory, and leaves a mark file next to
them. A thread of rank 0 finishes once all marks are there. After the planning nothing is collective, so training never
waits for other ranks' writes: marks are files, on the checkpoint's file system. Threads are used and not processes,
because a process would outlive a killed rank and copy its memory once more. The slow operations (writing, forcing to
the disk, hashing) release Python's global lock.

With `checkpoint.staging`, files are written to a folder on the host's own disk before they are copied. The folder that
a user names may be shared: by the ranks of a host, by both runs of a pair, by a job array. So each save of each process
makes a subfolder, locked while the process lives, and removes it afterwards, also after an error. The subfolder of a
killed process is no longer locked, and the next save of any process removes it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from megatron_ettin.base.digests import Entry, integrity_entry
from megatron_ettin.base.errors import first_line
from megatron_ettin.base.files import LockHeldError, fsync, try_lock, write_atomically
from megatron_ettin.checkpoint.weights_writer import save_tensor

# name of a rank's mark file, without the rank at its end
MARK = ".written-"
POLL_SECONDS = 0.05


class NotWrittenError(Exception):
    """A checkpoint could not be written; the message is one line with the rank and the file."""


@dataclass
class Plan:
    """The files that this rank writes into `folder`. `writer` and `metadata` are core's; only rank 0 has `metadata`."""

    folder: Path
    rank: int
    world: int
    writer: Any
    metadata: Any
    at: Path | None = None
    """The file or folder that is being written, for error messages."""

    @property
    def buckets(self) -> list[Any]:
        """Path, name and (byte items, tensor items) of each file."""
        return self.writer.write_buckets or []

    def copy_tensors(self, live: set[int] | None, synchronize: Callable[[], None]) -> None:
        """Replace the tensors that training will change in place by copies in host memory.

        Args:
            live: addresses of the host storages that training changes; None: all. Other tensors in host memory are
                copies already, which core made of views. Tensors on a device are always copied.
            synchronize: waits for copies from the device.
        """

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_cpu:
                is_live = live is None or tensor.untyped_storage().data_ptr() in live
                return tensor.clone() if is_live else tensor
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return host.copy_(tensor, non_blocking=True)

        self.writer.write_buckets = [
            (path, name, (items, [(item, copied(tensor)) for item, tensor in tensors]))
            for path, name, (items, tensors) in self.buckets
        ]
        synchronize()

    def write(self, local: Path | None = None) -> None:
        """Write this rank's files and its mark, which holds the error if one occurred.

        Args:
            local: a folder on this host's own disk where the files are written first.
        """
        mark: dict[str, Any] = {"files": {}, "stored": []}
        first: contextlib.AbstractContextManager[Path] = contextlib.nullcontext(self.folder)
        if local is not None:
            first = staging_folder(local, self.folder.absolute().parents[1].name)
        self.at = local or self.folder
        try:
            with first as folder:
                self._write_files(folder, mark)
        except Exception as error:
            mark = {"error": f"rank {self.rank}: {self.at}: {_cause(error)}"}
            # the files are of no use, and the mark needs room
            for path, _, _ in self.buckets:
                Path(path).unlink(missing_ok=True)
        # the copies are no longer needed
        self.writer.write_buckets = None
        _write_mark(self.folder / f"{MARK}{self.rank}", mark)

    def _write_files(self, first: Path, mark: dict[str, Any]) -> None:
        """Write and hash each file in the folder `first`, and move it to its final folder if that is another."""
        for path, name, (items, tensors) in self.buckets:
            written, final = first / name, Path(path)
            self.at = written
            # state.py leaves pickled entries out of a checkpoint
            assert not items, "pickled entries"
            mark["stored"] += _write_file(written, name, tensors)
            # hashed before it is copied: a digest of the copy would fit a damaged copy too
            mark["files"][name] = integrity_entry(written)
            if written != final:
                self.at = final
                _move(written, final, mark["files"][name])

    def finish(self, given_up: Callable[[], bool]) -> dict[str, Entry]:
        """Wait on rank 0 for all marks, and write the files that core leaves to the coordinator.

        Returns the integrity entries of all ranks' files by name. Raises NotWrittenError if a rank could not write its
        files, or had not when `given_up` returned True, and OSError if rank 0 cannot write the coordinator's files.
        """
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

        marks = [self._mark_of(rank, given_up) for rank in range(self.world)]
        failed = [mark["error"] for mark in marks if "error" in mark]
        if failed:
            raise NotWrittenError(failed[0])
        self.writer.finish(self.metadata, [[_result(*stored) for stored in mark["stored"]] for mark in marks])
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
        for rank in range(self.world):
            (self.folder / f"{MARK}{rank}").unlink()
        return {name: entry for mark in marks for name, entry in mark["files"].items()}

    def _mark_of(self, rank: int, given_up: Callable[[], bool]) -> dict[str, Any]:
        path = self.folder / f"{MARK}{rank}"
        while not path.exists():
            if given_up():
                raise NotWrittenError(f"rank {rank} had not written its part when the run ended")
            time.sleep(POLL_SECONDS)
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if text else {"error": f"rank {rank}: ENOSPC, the disk is full"}


def _write_file(path: Path, name: str, tensors: list[Any]) -> list[list[Any]]:
    """Write one file of tensors and force it to the disk.

    Returns where each tensor lies: name, offset and index of the shard (as in MetadataIndex), file, first byte, bytes.
    """
    stored = []
    with open(path, "wb") as stream:
        for item, tensor in tensors:
            first = stream.tell()
            save_tensor(tensor, stream)
            offset = None if item.index.offset is None else list(item.index.offset)
            stored.append([item.index.fqn, offset, item.index.index, name, first, stream.tell() - first])
        os.fsync(stream.fileno())
    return stored


def _result(fqn: str, offset: Any, number: Any, name: str, first: int, length: int) -> WriteResult:
    """Return a WriteResult, as core expects it."""
    index = MetadataIndex(fqn, None if offset is None else torch.Size(offset), number)
    return WriteResult(index=index, size_in_bytes=length, storage_data=_StorageInfo(name, first, length))


def _move(source: Path, target: Path, written: Entry) -> None:
    """Copy a file to another file system and remove the original. Raises OSError if the copy differs."""
    shutil.copyfile(source, target)
    fsync(target)
    if integrity_entry(target) != written:
        raise OSError(errno.EIO, f"the copy is not what was written to {source}")
    source.unlink()


def _cause(error: BaseException) -> str:
    """Return the text of the OSError behind an error: torch reports a full disk as an error of its zip writer."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return f"{errno.errorcode.get(seen.errno or 0, 'error')}, {seen.strerror or seen}"
        seen = seen.__context__
    return first_line(error)


def _write_mark(path: Path, mark: dict[str, Any]) -> None:
    """Write a mark. If a full disk refuses even that, leave an empty file, which takes no block."""
    try:
        write_atomically(path, json.dumps(mark), durable=False)
    except OSError:
        path.unlink(missing_ok=True)
        path.touch()


PREFIX = ".ettin-staging-"
_OURS = re.compile(re.escape(PREFIX) + r"[\w.-]*-\d+-\w+", re.ASCII)
_STAGED = re.compile(r"__\d+_\d+\.distcp", re.ASCII)
ATTEMPTS = 100


@contextlib.contextmanager
def staging_folder(root: Path, run: str) -> Iterator[Path]:
    """Yield a new folder below `root` that no other save writes to, and remove it and its files after the block.

    Args:
        root: the folder of `checkpoint.staging`, made if need be.
        run: name of the run, a part of the folder's name, for people who look at the disk.

    Raises:
        OSError: the disk refuses.
    """
    root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    name = re.sub(r"[^\w.-]", "_", f"{run[:40]}-{platform.node()[:40]}", flags=re.ASCII)
    folder, lock = _locked_folder(root, f"{PREFIX}{name}-{os.getpid()}-")
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def remove_leftovers(root: Path) -> None:
    """Remove the staging folders below `root` whose processes have ended."""
    for folder in root.iterdir():
        if not _OURS.fullmatch(folder.name) or folder.is_symlink():
            continue
        # the folder may be another user's, or was just removed
        with contextlib.suppress(OSError, LockHeldError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if try_lock(lock) is None:
                    _remove(folder)
            finally:
                os.close(lock)


def _locked_folder(root: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder and lock it; if another process removes it as a leftover before it is locked, make another one."""
    for _ in range(ATTEMPTS):
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        lock = None
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            # if the file system has no locks, no process removes folders as leftovers
            try_lock(lock)
        except (LockHeldError, FileNotFoundError):
            pass
        else:
            if folder.is_dir():
                return folder, lock
        if lock is not None:
            os.close(lock)
    raise FileExistsError(f"{root}: no folder of its own in {ATTEMPTS} attempts")


def _remove(folder: Path) -> None:
    """Remove a staging folder with the files that a save writes; anything else in it stays, and so does the folder."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _STAGED.fullmatch(path.name):
                path.unlink(missing_ok=True)
        folder.rmdir()
