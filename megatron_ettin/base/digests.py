"""sha256 of files: of a small one whole, of a large one block by block.

sha256 is sequential, and a rank writes one large file: hashed whole it keeps one processor busy for longer than a load
takes. Blocks are hashed by as many threads as there are processors, are shared over ranks, and say where a file has
changed. hashlib lets go of the interpreter's lock, for which it then queues again: what is read at once is large, so
that a thread which hashes beside one that runs Python queues rarely.

Checksums of a file: sha256 of the whole, and a short one of every MiB, so that damage can be told by its place.

The sha256 stands in the manifest and decides. The blocks' digests stand in a sidecar that is read only when a file's
sha256 is wrong: 19 bytes a MiB."""

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
from typing import Any

from megatron_ettin.base.parsing import load_json

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


SHARD_BLOCK_BYTES = 1 << 20
DIGEST_BYTES = 8  # of a block: it has to tell damage from none, not to withstand an attack


@dataclass(frozen=True)
class FileDigest:
    bytes: int
    sha256: str
    blocks: tuple[str, ...]  # blake2b of each SHARD_BLOCK_BYTES, hexadecimal


def digest_of(path: Path) -> FileDigest:
    """Read `path` once. Raises OSError."""
    whole = hashlib.sha256()
    size, blocks = 0, []
    with open(path, "rb") as stream:
        while block := stream.read(SHARD_BLOCK_BYTES):
            whole.update(block)
            blocks.append(hashlib.blake2b(block, digest_size=DIGEST_BYTES).hexdigest())
            size += len(block)
    return FileDigest(size, whole.hexdigest(), tuple(blocks))


def write_blocks(path: Path, digests: Mapping[str, FileDigest]) -> None:
    """The sidecar of a shard: for each of its files, by suffix, the digests of its blocks."""
    content = {
        name: {"block_bytes": SHARD_BLOCK_BYTES, "blocks": list(digest.blocks)} for name, digest in digests.items()
    }
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="ascii")


def read_blocks(path: Path) -> dict[str, tuple[str, ...]]:
    """What `write_blocks` wrote, by suffix. Raises OSError, ValueError, KeyError, TypeError where it is damaged."""
    raw = load_json(path.read_text(encoding="ascii"))
    return {name: tuple(entry["blocks"]) for name, entry in raw.items()}


def damaged_ranges(expected: tuple[str, ...], found: FileDigest) -> Iterator[tuple[int, int]]:
    """[first, end) bytes of each run of blocks that are not what they were; bytes that should not be there count."""
    wrong = [i for i, digest in enumerate(found.blocks) if i >= len(expected) or digest != expected[i]]
    while wrong:
        run = 1
        while run < len(wrong) and wrong[run] == wrong[0] + run:
            run += 1
        yield wrong[0] * SHARD_BLOCK_BYTES, min((wrong[0] + run) * SHARD_BLOCK_BYTES, found.bytes)
        wrong = wrong[run:]
