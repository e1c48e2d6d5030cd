"""Check whether a folder's file system does what checkpoints rely on, and measure its speed and free space.

Checkpoints rely on atomic renames, on fsync of files and folders, and on locks between processes.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_ettin.base.errors import first_line
from megatron_ettin.base.files import fsync
from megatron_ettin.doctor.findings import Finding, note, ok, problem, warning

MIB, GIB = 1 << 20, 1 << 30
LEAST_FREE, LOW_FREE = 1 * GIB, 20 * GIB
FEWEST_INODES = 10_000
PROBE_BYTES = 64 * MIB
# MB per second, at which a checkpoint of the 1b (12 GB) takes two minutes
SLOW_MB = 100.0
SLOW_SYNC_SECONDS = 0.25


def file_findings(folder: Path, quick: bool, probe_bytes: int = PROBE_BYTES) -> list[Finding]:
    """Check the file system of a folder. Files that are written for it are removed.

    Args:
        folder: the folder; if it does not exist yet, its nearest existing parent is checked.
        quick: whether to skip the speed.
        probe_bytes: size of the file that measures the speed.
    """
    name = f"files in {folder}"
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return [problem(name, f"{existing} is not a folder", "name a folder")]
    findings = [_room(f"room in {folder}", existing)]
    try:
        with tempfile.TemporaryDirectory(
            prefix=".tmp-ettin-doctor-", dir=existing, ignore_cleanup_errors=True
        ) as temporary:
            probe = Path(temporary)
            findings.append(_behaviour(name, probe))
            if not quick:
                findings.append(_speed(f"speed in {folder}", probe, probe_bytes))
    except OSError as error:
        todo = "choose another folder, or fix its permissions"
        findings.append(problem(name, f"cannot be written ({first_line(error)})", todo))
    return findings


def _room(name: str, folder: Path) -> Finding:
    status = os.statvfs(folder)
    free, inodes = status.f_bavail * status.f_frsize, status.f_favail
    # btrfs and some network file systems count no inodes
    counted = status.f_files > 0
    text = f"{free / GIB:,.1f} GiB free" + (f", {inodes:,} inodes" if counted else "")
    figures = {"free_bytes": free, "free_inodes": inodes if counted else None}
    if free < LEAST_FREE:
        return problem(name, text, "make room; a checkpoint of the 17m alone takes 0.2 GiB", **figures)
    if counted and inodes < FEWEST_INODES:
        return problem(name, text, "remove small files", **figures)
    if free < LOW_FREE:
        return warning(name, text, "make room: a checkpoint of the 1b takes 12 GiB, and some are kept", **figures)
    return ok(name, text, **figures)


def _behaviour(name: str, probe: Path) -> Finding:
    """Try the operations of PROMISES: if a needed one fails, it is a problem; if another one fails, a warning."""
    missing = []
    for what, attempt, needed in PROMISES:
        try:
            done = attempt(probe)
        except OSError as error:
            done, what = False, f"{what} ({first_line(error)})"
        if not done and needed:
            todo = "keep runs and datasets on another file system: interrupted checkpoints could be lost on this one"
            return problem(name, f"does not: {what}", todo)
        if not done:
            missing.append(what)
    if missing:
        todo = "never start one run twice at a time here; some mounts have locks as an option (lustre: flock)"
        return warning(name, f"does not: {', '.join(missing)}", todo)
    return ok(name, "rename replaces files and publishes folders, fsync of files and folders, locks: all work")


def _replaces_a_file(probe: Path) -> bool:
    """Return whether rename replaces a file, while an open reader keeps the old content."""
    old, new = probe / "latest", probe / "latest.new"
    old.write_text("old")
    new.write_text("new")
    with old.open() as reader:
        os.replace(new, old)
        return reader.read() == "old" and old.read_text() == "new" and not new.exists()


def _publishes_a_folder(probe: Path) -> bool:
    """Return whether one rename publishes a folder, and refuses to replace one that has files."""
    staged, published = probe / "step.tmp", probe / "step"
    staged.mkdir()
    (staged / "weights").write_text("w")
    os.rename(staged, published)
    other = probe / "other.tmp"
    other.mkdir()
    try:
        os.rename(other, published)
    except OSError:
        return (published / "weights").read_text() == "w" and not staged.exists()
    return False


def _syncs(probe: Path) -> bool:
    file = probe / "synced"
    file.write_bytes(b"1")
    fsync(file)
    fsync(probe)
    return True


def _locks(probe: Path) -> bool:
    """Return whether a locked file refuses a second exclusive lock."""
    with (probe / "lock").open("w") as first, (probe / "lock").open("w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


PROMISES: tuple[tuple[str, Callable[[Path], bool], bool], ...] = (
    ("replace a file by rename", _replaces_a_file, True),
    ("publish a folder by rename", _publishes_a_folder, True),
    ("fsync a file and a folder", _syncs, True),
    ("keep a second process off by flock", _locks, False),
)


def _speed(name: str, probe: Path, size: int) -> Finding:
    """Measure large writes with fsync, uncached reads, and small writes with fsync (such as a step's record)."""
    block, path = os.urandom(min(MIB, size)), probe / "large"
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(max(size // len(block), 1)):
            file.write(block)
        os.fsync(file.fileno())
        written = file.tell() / (time.perf_counter() - began) / 1e6
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        read = sum(len(chunk) for chunk in iter(lambda: file.read(MIB), b"")) / (time.perf_counter() - began) / 1e6
    syncs = []
    with (probe / "record").open("ab", buffering=0) as file:
        for _ in range(5):
            began = time.perf_counter()
            file.write(b"x" * 400)
            os.fsync(file.fileno())
            syncs.append(time.perf_counter() - began)
    sync = sorted(syncs)[2]
    text = f"{written:,.0f} MB/s written with fsync, {read:,.0f} MB/s read, {sync * 1e3:.1f} ms for a small fsync"
    figures = {"write_mb_per_second": round(written, 1), "read_mb_per_second": round(read, 1), "fsync_seconds": sync}
    if written < SLOW_MB or sync > SLOW_SYNC_SECONDS:
        return note(name, f"{text}: slow; checkpoints take long (they are written in the background)", **figures)
    return ok(name, text, **figures)
