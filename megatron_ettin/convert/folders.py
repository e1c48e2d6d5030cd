"""Make output folders that get their name when they are complete, and join file names to Hugging Face folders.

A conversion that is killed leaves nothing under the name of its output.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import LockHeldError, try_lock
from megatron_ettin.base.paths import path_in

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG}


def resolve_output(out: Path) -> Path:
    """Return the path of an output folder with links followed, because a folder cannot be renamed onto a link."""
    try:
        return Path(out).resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


@contextlib.contextmanager
def staging_dir(out: Path) -> Iterator[Path]:
    """Yield an empty folder below `.tmp-NAME/` next to `out`, for the body to rename to `out`.

    `.tmp-NAME/` is removed at the end, with all that the body has not renamed. A lock keeps other processes out.

    Raises:
        UserError: `out` is not a new or an empty folder, cannot be written, or another process is writing it.
    """
    out = resolve_output(out)
    _check_free(out)
    work = out.with_name(f".tmp-{out.name}")
    with _locked(work, out):
        # another conversion may have completed `out` before this process got the lock
        _check_free(out)
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
def _locked(work: Path, out: Path) -> Iterator[None]:
    """Make the folder `work` and lock it for this process if the file system has locks; remove it at the end."""
    ended = UserError(f"{out}: another conversion to it has just ended; start again")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w", encoding="utf-8")  # noqa: SIM115 (open until the end)
    except FileNotFoundError:
        raise ended from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            try_lock(lock.fileno())
        except LockHeldError:
            raise UserError(f"{out}: another process is writing it; wait for it or name another folder") from None
        # the process that held the lock may have ended just now and removed the folder
        if not (work / "lock").exists():
            raise ended
        try:
            yield
        finally:
            shutil.rmtree(work, ignore_errors=True)


def hf_file(folder: Path, name: object, named_by: Path | None = None) -> Path:
    """Join a file's name to a Hugging Face folder.

    In the hub's cache (`models--X/snapshots/REVISION`) files are links to `models--X/blobs`; those links are allowed.

    Args:
        folder: the Hugging Face folder.
        name: the file's name, as a file of the folder may give it.
        named_by: the file that gives the name, for the message; None: the folder.

    Raises:
        UserError: the name or a link leads out of the folder.
    """
    here = folder.absolute()
    is_cached = here.parent.name == "snapshots"
    return path_in(folder, name, named_by or folder, root=here.parents[1] if is_cached else None)
