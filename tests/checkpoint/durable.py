"""Record fsyncs and renames, to find files that a power failure could tear: those renamed before they were synced."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Rename:
    """One rename.

    Attributes:
        target: the new name.
        unforced: paths below the target, relative to it, whose content was not synced before the rename.
        unnamed: folders that hold an earlier new name and were not synced before this rename.
    """

    target: Path
    unforced: list[str]
    unnamed: list[Path]


@dataclass
class Watched:
    """Record of the renames in a folder.

    Attributes:
        renames: all renames below the folder, oldest first.
        unnamed: folders that hold a new name and have not been synced since.
    """

    folder: Path
    renames: list[Rename] = field(default_factory=list)
    unnamed: list[Path] = field(default_factory=list)
    forced: dict[int, bytes] = field(default_factory=dict)

    def force(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if self.folder in path.parents or path == self.folder:
            self.forced[os.fstat(handle).st_ino] = state_of(path)
            if path in self.unnamed:
                self.unnamed.remove(path)

    def rename(self, source: Path, target: Path) -> None:
        if self.folder not in target.parents:
            return
        paths = [source, *sorted(source.rglob("*"))] if source.is_dir() else [source]
        # empty files (locks) have nothing to lose
        changed = [
            path
            for path in paths
            if (path.is_dir() or path.stat().st_size) and self.forced.get(path.stat().st_ino) != state_of(path)
        ]
        self.renames.append(Rename(target, [str(path.relative_to(source)) for path in changed], list(self.unnamed)))
        if target.parent not in self.unnamed:
            self.unnamed.append(target.parent)


def state_of(path: Path) -> bytes:
    """Return what an fsync of this path makes durable: a file's sha256, or a folder's names and inodes."""
    if path.is_dir():
        return repr(sorted((entry.name, entry.inode()) for entry in os.scandir(path))).encode()
    return hashlib.sha256(path.read_bytes()).digest()


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    """Record what this process syncs and renames below a folder while the body runs."""
    seen = Watched(folder.resolve())
    fsync = os.fsync

    def forcing(handle: Any) -> None:
        fsync(handle)
        seen.force(handle if isinstance(handle, int) else handle.fileno())

    def renaming(real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any) -> None:
            seen.rename(Path(source).absolute(), Path(target).absolute())
            real(source, target)

        return rename

    with (
        mock.patch.object(os, "fsync", forcing),
        mock.patch.object(os, "rename", renaming(os.rename)),
        mock.patch.object(os, "replace", renaming(os.replace)),
    ):
        yield seen
