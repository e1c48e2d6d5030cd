"""Hash files: sha256 of whole files and of blocks, and the checksums stored with dataset shards.

A checkpoint's large files are hashed block by block, because sha256 is sequential: hashed whole, one large file keeps
one processor busy for longer than a load takes. Blocks are hashed in several threads, are shared out over ranks, and
show where a file has changed. hashlib releases the interpreter's lock and then queues for it
again, so reads are large: a hashing thread then rarely waits for a thread that runs Python.

The manifest holds the sha256 of a shard, which decides whether the shard is intact. A sidecar file holds a short digest
of each MiB (19 bytes a MiB). It is read only when the sha256 is wrong, to show where the damage is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_ettin.base.parsing import load_json

Entry = dict[str, Any]
"""A file's record in integrity.json: `bytes`, and `sha256` or `block_bytes` and `blocks` (hex digests in order)."""

BLOCK_BYTES = 16 << 20
THREADS = 8
_READ_BYTES = 4 << 20
_BACKGROUND_NICENESS = 19

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Block:
    """A range of bytes of a file, and the digest that they had when they were written."""

    name: str
    first: int
    size: int
    sha256: str
    is_whole: bool

    @property
    def prefix(self) -> str:
        """Return the text that begins a message with the byte range; empty if the block is the whole file."""
        return "" if self.is_whole else f"bytes {self.first:,} to {self.first + self.size - 1:,}: "


def sha256(path: Path, first: int = 0, size: int | None = None) -> str:
    """Return the hex digest of a file, or of `size` bytes of it starting at `first`."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        remaining = os.fstat(file.fileno()).st_size - first if size is None else size
        memory = memoryview(bytearray(min(max(remaining, 1), _READ_BYTES)))
        file.seek(first)
        while remaining > 0 and (read := file.readinto(memory[: min(remaining, len(memory))])):
            digest.update(memory[:read])
            remaining -= read
    return digest.hexdigest()


def integrity_entry(path: Path) -> Entry:
    """Hash a finished file and return its record for integrity.json."""
    size = path.stat().st_size
    if size <= BLOCK_BYTES:
        return {"bytes": size, "sha256": sha256(path)}
    blocks = [sha256(path, first, min(BLOCK_BYTES, size - first)) for first in range(0, size, BLOCK_BYTES)]
    return {"bytes": size, "block_bytes": BLOCK_BYTES, "blocks": blocks}


def blocks_of(name: str, entry: Entry) -> list[Block]:
    """Return the blocks that a file's record in integrity.json lists, in order.

    Raises:
        ValueError, TypeError, KeyError: the record is malformed.
    """
    size = entry["bytes"]
    if type(size) is not int or size < 0:
        raise ValueError(f"{name!r} has {size!r} bytes")
    if "blocks" not in entry:
        return [Block(name, 0, size, entry["sha256"] + "", True)]
    step, listed = entry["block_bytes"], entry["blocks"]
    if type(step) is not int or step < 1 or type(listed) is not list or len(listed) != -(-size // step):
        raise ValueError(f"{name!r} has not a digest for each block of its {size} bytes")
    firsts = range(0, size, step)
    return [
        Block(name, first, min(step, size - first), digest + "", False)
        for first, digest in zip(firsts, listed, strict=True)
    ]


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], background: bool = False) -> list[Result]:
    """Apply a function to each item in threads and return the results in order.

    Args:
        function: a function that runs mostly without the interpreter's lock.
        items: the arguments, one for each call.
        background: whether the threads get a lower priority, because the caller has other work to do meanwhile.

    Raises:
        The error of the first item that failed. Items that have not begun by then are dropped.
    """
    threads = min(THREADS, os.cpu_count() or 1) if background else THREADS
    pool = ThreadPoolExecutor(threads, "sha256", initializer=_lower_priority if background else None)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)


def _lower_priority() -> None:
    """Lower this thread's priority, on Linux only: elsewhere setpriority would apply to the whole process."""
    if sys.platform == "linux":
        # a sandbox may not allow it
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)


SHARD_BLOCK_BYTES = 1 << 20
# short, because the digest of a block has to detect damage and not to withstand an attack
DIGEST_BYTES = 8


@dataclass(frozen=True)
class FileDigest:
    """Checksums of one file of a shard."""

    bytes: int
    sha256: str
    blocks: tuple[str, ...]
    """blake2b of each `SHARD_BLOCK_BYTES`, hexadecimal."""


def shard_digest(path: Path) -> FileDigest:
    """Read a file once and return its checksums. Raises OSError."""
    whole = hashlib.sha256()
    size, blocks = 0, []
    with open(path, "rb") as stream:
        while block := stream.read(SHARD_BLOCK_BYTES):
            whole.update(block)
            blocks.append(hashlib.blake2b(block, digest_size=DIGEST_BYTES).hexdigest())
            size += len(block)
    return FileDigest(size, whole.hexdigest(), tuple(blocks))


def write_checksums(path: Path, digests: Mapping[str, FileDigest]) -> None:
    """Write the sidecar of a shard. `digests` maps the suffix of each of its files to the checksums."""
    content = {
        name: {"block_bytes": SHARD_BLOCK_BYTES, "blocks": list(digest.blocks)} for name, digest in digests.items()
    }
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="ascii")


def read_checksums(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the block digests in a shard's sidecar, for each file of the shard by its suffix.

    Raises:
        OSError, ValueError, KeyError, TypeError: the sidecar is damaged.
    """
    raw = load_json(path.read_text(encoding="ascii"))
    return {name: tuple(entry["blocks"]) for name, entry in raw.items()}


def damaged_ranges(expected: tuple[str, ...], actual: FileDigest) -> Iterator[tuple[int, int]]:
    """Yield (first, end) bytes of each run of changed blocks. Blocks beyond the expected end count as changed."""
    wrong = [i for i, digest in enumerate(actual.blocks) if i >= len(expected) or digest != expected[i]]
    while wrong:
        run = 1
        while run < len(wrong) and wrong[run] == wrong[0] + run:
            run += 1
        yield wrong[0] * SHARD_BLOCK_BYTES, min((wrong[0] + run) * SHARD_BLOCK_BYTES, actual.bytes)
        wrong = wrong[run:]
