"""Folders on a machine's own disk (`checkpoint.staging`) in which files are written before they are copied.

The folder that a user names may be shared: by the ranks of a machine, by both runs of a pair, by a job array. So each
save of each process makes one of its own in it, locked for as long as the process lives, and removes it whatever
happens. What a killed process left has no lock any more, and goes at the next save of anyone."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_ettin.base.locks import LockHeld, try_lock

PREFIX = ".ettin-staging-"
_OURS = re.compile(re.escape(PREFIX) + r"[\w.-]*-\d+-\w+", re.ASCII)
_STAGED = re.compile(r"__\d+_\d+\.distcp", re.ASCII)
ATTEMPTS = 100


@contextlib.contextmanager
def staging_folder(root: Path, run: str) -> Iterator[Path]:
    """Make an empty folder below `root` that no other save writes to, and remove it with what is in it.

    Args:
        root: the folder of `checkpoint.staging`, made if need be.
        run: name of the run, a part of the folder's name for whoever looks at the disk.

    Raises:
        OSError: where the disk refuses.
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
        with contextlib.suppress(OSError, LockHeld):  # another user's, or one that has just gone
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if try_lock(lock) is None:
                    _remove(folder)
            finally:
                os.close(lock)


def _locked_folder(root: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder and lock it. Another process may take it for a leftover between the two: then make the next."""
    for _ in range(ATTEMPTS):
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        lock = None
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            # without locks nothing there is taken for a leftover
            try_lock(lock)
        except (LockHeld, FileNotFoundError):
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
