"""sha256 of files: of a small one whole, of a large one block by block.

sha256 is sequential, and a rank writes one large file: hashed whole it keeps one processor busy for longer than a load
takes. Blocks are hashed by as many threads as there are processors, are shared over ranks, and say where a file has
changed. hashlib lets go of the interpreter's lock, for which it then queues again: what is read at once is large, so
that a thread which hashes beside one that runs Python queues rarely."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Entry = dict[str, Any]  # of a file: `bytes`, and `sha256` or `block_bytes` and `blocks`, hex digests in order

BLOCK_BYTES = 16 << 20
THREADS = 8
_READ_BYTES = 4 << 20
_NICENESS = 19  # of threads that hash beside something that is waited for


@dataclass(frozen=True)
class Block:
    """Bytes of a file, and the digest they had when they were written."""

    name: str
    first: int
    size: int
    sha256: str
    is_whole: bool

    @property
    def words(self) -> str:
        """Which bytes, for messages; nothing for a whole file."""
        return "" if self.is_whole else f"bytes {self.first:,} to {self.first + self.size - 1:,}: "


def sha256(path: Path, first: int = 0, size: int | None = None) -> str:
    """Hex digest of one file, or of `size` bytes of it from `first` on."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size - first if size is None else size
        memory = memoryview(bytearray(min(max(left, 1), _READ_BYTES)))
        file.seek(first)
        while left > 0 and (read := file.readinto(memory[: min(left, len(memory))])):
            digest.update(memory[:read])
            left -= read
    return digest.hexdigest()


def digest(path: Path) -> Entry:
    """What integrity.json says of a file that is there in full."""
    size = path.stat().st_size
    if size <= BLOCK_BYTES:
        return {"bytes": size, "sha256": sha256(path)}
    blocks = [sha256(path, first, min(BLOCK_BYTES, size - first)) for first in range(0, size, BLOCK_BYTES)]
    return {"bytes": size, "block_bytes": BLOCK_BYTES, "blocks": blocks}


def blocks_of(name: str, entry: Entry) -> list[Block]:
    """What there is to hash of a file, in order. Raises ValueError, TypeError and KeyError for an entry that does not
    say it."""
    size = entry["bytes"]
    if type(size) is not int or size < 0:
        raise ValueError(f"{name!r} has {size!r} bytes")
    if "blocks" not in entry:
        return [Block(name, 0, size, entry["sha256"] + "", True)]
    step, listed = entry["block_bytes"], entry["blocks"]
    if type(step) is not int or step < 1 or type(listed) is not list or len(listed) != -(-size // step):
        raise ValueError(f"{name!r} has not a digest for each block of its {size} bytes")
    firsts = range(0, size, step)
    return [Block(name, at, min(step, size - at), one + "", False) for at, one in zip(firsts, listed, strict=True)]


def in_threads(function: Callable[[Any], Any], items: Iterable[Any], beside: bool = False) -> list[Any]:
    """`function` of each item, in order. Raises what the first failing item raised, leaving out those not begun.

    `beside`: something is waited for meanwhile, which goes first where processors are few."""
    threads = min(THREADS, os.cpu_count() or 1) if beside else THREADS
    pool = ThreadPoolExecutor(threads, "sha256", initializer=_step_back if beside else None)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)


def _step_back() -> None:
    """Linux has a niceness for each thread; elsewhere it would be the whole process's."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox that does not allow it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
