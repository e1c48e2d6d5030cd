"""Checksums of a file: sha256 of the whole, and a short one of every MiB, so that damage can be told by its place.

The sha256 stands in the manifest and decides. The blocks' digests stand in a sidecar that is read only when a file's
sha256 is wrong: 19 bytes a MiB."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.base.json_reading import load_json

BLOCK_BYTES = 1 << 20
DIGEST_BYTES = 8  # of a block: it has to tell damage from none, not to withstand an attack


@dataclass(frozen=True)
class FileDigest:
    bytes: int
    sha256: str
    blocks: tuple[str, ...]  # blake2b of each BLOCK_BYTES, hexadecimal


def digest_of(path: Path) -> FileDigest:
    """Read `path` once. Raises OSError."""
    whole = hashlib.sha256()
    size, blocks = 0, []
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            whole.update(block)
            blocks.append(hashlib.blake2b(block, digest_size=DIGEST_BYTES).hexdigest())
            size += len(block)
    return FileDigest(size, whole.hexdigest(), tuple(blocks))


def write_blocks(path: Path, digests: Mapping[str, FileDigest]) -> None:
    """The sidecar of a shard: for each of its files, by suffix, the digests of its blocks."""
    content = {name: {"block_bytes": BLOCK_BYTES, "blocks": list(digest.blocks)} for name, digest in digests.items()}
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
        yield wrong[0] * BLOCK_BYTES, min((wrong[0] + run) * BLOCK_BYTES, found.bytes)
        wrong = wrong[run:]
