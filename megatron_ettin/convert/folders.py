"""Output folders written beside and renamed when whole: a conversion that was killed leaves nothing under its name.

Files of a Hugging Face folder, which may have been made by anyone."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import LockHeld, try_lock
from megatron_ettin.base.paths import path_in

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG}


def resolved(out: Path) -> Path:
    """Return where the output will lie, links followed: a rename onto a link fails, after all the work."""
    try:
        return Path(out).resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """An empty folder below `.tmp-NAME/` beside `out`, removed on the way out if the body has not renamed it. Held by
    one process: another one that is asked for the same `out` raises UserError at once."""
    out = resolved(out)
    _check_free(out)
    work = out.with_name(f".tmp-{out.name}")
    with _held(work, out):
        _check_free(out)  # another conversion may have been renamed to it since
        staging = work / out.name
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
        except OSError as error:
            if error.errno not in _DISK:
                raise
            raise UserError(f"{out}: cannot be written ({error.strerror}); nothing was left there") from None


def _check_free(out: Path) -> None:
    try:
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out}: not empty; name a new folder")
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: a file is there; name a new folder")
    except OSError as error:
        raise UserError(f"{out!s:.80}: cannot be written ({error.strerror})") from None
    if out == Path.cwd() or os.path.ismount(out):
        what = "a mount point" if os.path.ismount(out) else "the current directory"
        raise UserError(f"{out}: is {what}; name a new folder in it")


@contextlib.contextmanager
def _held(work: Path, out: Path) -> Iterator[None]:
    """Make `work` and hold it alone; removed at the end. Where the file system has no locks, nothing is held."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w", encoding="utf-8")  # noqa: SIM115 (held until the end)
    except FileNotFoundError:
        raise UserError(f"{out}: another conversion to it has just ended; start again") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            try_lock(lock.fileno())
        except LockHeld:
            raise UserError(f"{out}: another process is writing it; wait for it or name another folder") from None
        if not (work / "lock").exists():  # whoever held it has just ended, and removed the folder
            raise UserError(f"{out}: another conversion to it has just ended; start again")
        try:
            yield
        finally:
            shutil.rmtree(work, ignore_errors=True)


def hf_file(folder: Path, name: object, named_by: Path | None = None) -> Path:
    """Join a file's name to a Hugging Face folder. Raises UserError for a name or link that leads out of it.

    In the hub's cache (`models--X/snapshots/REVISION`) files are links to `models--X/blobs`: those are followed."""
    here = folder.absolute()
    cached = here.parent.name == "snapshots"
    return path_in(folder, name, named_by or folder, root=here.parents[1] if cached else None)
