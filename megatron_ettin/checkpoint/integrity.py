"""Write and check integrity.json: size and sha256 of every file of a checkpoint.

It is written when a checkpoint is sealed and checked when the checkpoint is used. A checkpoint is many files from many
ranks; a torn or flipped one would load without complaint as wrong numbers. Hashing costs one more read of what was just
written, in threads. The first damage found is reported by file; nothing is repaired.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_ettin.base import digests
from megatron_ettin.base.digests import Block, Entry, sha256
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import fsync, write_atomically
from megatron_ettin.base.parsing import DIGEST, checked_digest, load_json, with_digest
from megatron_ettin.base.paths import checked_name, path_in, refuse_links

INTEGRITY = "integrity.json"
# format 1 has a digest for each file, but none for blocks and none for integrity.json itself
FORMATS = (1, 2)


def _files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).as_posix() != INTEGRITY
    )


def seal(folder: Path, known: Mapping[str, Entry] | None = None) -> None:
    """Force everything in a folder to the disk and write its integrity.json, the last file of a checkpoint.

    Args:
        folder: the checkpoint, not yet published.
        known: entries, by name, of files that were hashed when they were written.
    """

    def entry(path: Path) -> tuple[str, Entry]:
        name = path.relative_to(folder).as_posix()
        return name, (known or {}).get(name) or digests.integrity_entry(path)

    paths = _files(folder)
    # one pool forces files to the disk while the other hashes them
    with ThreadPoolExecutor(digests.THREADS) as disk:
        forced = [disk.submit(fsync, path) for path in paths]
        files = dict(digests.in_threads(entry, paths))
        for future in forced:
            future.result()
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        fsync(inner)
    content = with_digest({"format": FORMATS[-1], "files": files})
    write_atomically(folder / INTEGRITY, json.dumps(content, indent=1) + "\n")


def read_entries(folder: Path) -> dict[str, Entry]:
    """Return the entry of every file. Raises UserError if integrity.json is missing, torn or of another format."""
    path = folder / INTEGRITY
    try:
        raw = load_json(path.read_text(encoding="utf-8"))
        if raw["format"] not in FORMATS:
            raise ValueError(f"it is of format {raw['format']!r}, this version reads {FORMATS[0]} to {FORMATS[-1]}")
        if raw["format"] > 1 and DIGEST not in raw:
            raise ValueError(f"it has no {DIGEST}")
        entries: dict[str, Entry] = checked_digest(raw)["files"]
        for name, entry in entries.items():
            checked_name(name, nested=True)
            digests.blocks_of(name, entry)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the checkpoint was never finished, or is not one of ours") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: unreadable ({error}); the checkpoint cannot be trusted") from None
    return entries


def file_of(folder: Path, name: str) -> Path:
    """Return the path of a file in integrity.json. Raises UserError if it leads out of the checkpoint."""
    return path_in(folder, name, folder / INTEGRITY, nested=True)


def verify(
    folder: Path, checksums: bool = True, which: Callable[[str], bool] | None = None, background: bool = False
) -> None:
    """Raise UserError naming the first missing, truncated or changed file of a checkpoint.

    Args:
        folder: the checkpoint.
        checksums: whether sha256 are compared, after the presence and sizes of all files.
        which: returns whether the sha256 of the named file is compared; None: of all files.
        background: whether the hashing threads get a lower priority.
    """
    entries = read_entries(folder)
    for name, entry in entries.items():
        path = file_of(folder, name)
        if not path.is_file():
            raise UserError(f"{path}: missing; integrity.json lists it with {entry['bytes']:,} bytes")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(f"{path}: {size:,} bytes, but {entry['bytes']:,} were written; the file is torn")
    if checksums:
        names = [name for name in entries if which is None or which(name)]
        blocks = [block for name in names for block in digests.blocks_of(name, entries[name])]
        verify_blocks(folder, blocks, background)


def check_nothing_else(folder: Path) -> None:
    """Raise UserError naming the first link or unlisted file of a checkpoint folder.

    Only what was written, and is listed in integrity.json, may be published of a checkpoint.
    """
    refuse_links(folder)
    listed = read_entries(folder)
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        # files that begin with a dot are made by file systems and desktops, and no export copies them
        if name not in listed and not path.name.startswith("."):
            raise UserError(f"{path}: not in {INTEGRITY}: it came after the checkpoint was written; refused, remove it")


def verify_blocks(folder: Path, blocks: Sequence[Block], background: bool = False) -> None:
    """Raise UserError naming the first of `blocks` whose bytes changed. `background`: hash at a lower priority."""

    def check(block: Block) -> None:
        path = file_of(folder, block.name)
        try:
            actual = sha256(path, block.first, block.size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        if actual != block.sha256:
            written = f"{block.prefix}sha256 {actual[:12]}..., but {block.sha256[:12]}... was written"
            raise UserError(f"{path}: {written}; it has changed")

    digests.in_threads(check, blocks, background)
