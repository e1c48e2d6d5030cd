"""Write files and folders so that they are whole or absent, and lock them against other processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"


def fsync(path: Path) -> None:
    """Force one file's content, or the names in one folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_path(path: Path, durable: bool = True, per_process: bool = False) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` at the end of the block, or is removed if the block raises.

    Args:
        path: the file to write.
        durable: whether to force the content, and then the new name, to the disk.
        per_process: whether several processes may write the same file at the same time.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}" if per_process else f".tmp-{path.name}")
    try:
        yield temporary
        if durable:
            fsync(temporary)
        os.replace(temporary, path)
        if durable:
            fsync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, content: str | bytes, durable: bool = True, per_process: bool = False) -> None:
    """Replace a file's content so that a reader finds the old or the new one, even after a crash.

    The arguments are those of `atomic_path`.
    """
    with atomic_path(path, durable, per_process) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_json(path: Path, content: Any) -> None:
    """Replace a file by the content as indented JSON; several processes may do so at the same time."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", per_process=True)


def publish_folder(staging: Path, final: Path, aside: Path | None = None) -> None:
    """Rename a finished folder to its final name, and force the name to the disk.

    Args:
        staging: the finished folder, whose content has been forced to the disk.
        final: the new path. Without `aside` it must not exist, or be an empty folder.
        aside: path to which an existing folder at `final` is moved first. That folder is removed last, so that one of
            the two is whole at any instant.
    """
    if aside is not None and final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(staging, final)
    fsync(final.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `path` at the end of the block, or is removed if the block raises.

    Killed processes leave folders whose names begin with `.tmp-NAME-` and `.tmp-stale-NAME-`.
    """
    # tempfile.mkdtemp would make it private, but other users may read the finished folder
    building = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    building.mkdir()
    try:
        yield building
        fsync(building)
        stale = building.with_name(f"{TEMPORARY}stale-{building.name.removeprefix(TEMPORARY)}")
        publish_folder(building, path, aside=stale)
    finally:
        shutil.rmtree(building, ignore_errors=True)


class LockHeldError(Exception):
    """Another process has the lock."""


def try_lock(handle: int) -> str | None:
    """Lock an open file or folder for this process alone, without waiting.

    Returns:
        None if this process has the lock now, else the reason why the file system cannot lock (Lustre without
        `-o flock`, and other mounts). That reason is no sign of another process: a caller continues, and warns once
        that a second process is not kept out.

    Raises:
        LockHeldError: another process has the lock.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # NFS answers EACCES for a lock that is held
    except (BlockingIOError, PermissionError):
        raise LockHeldError from None
    except OSError as error:
        return error.strerror or str(error)
    return None


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[bool]:
    """Wait for a lock file and hold it. Yield False if the file system has no locks, else True."""
    with open(path, "a") as stream:
        held = False
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
            held = True
        yield held
