"""Write and read release.json of a revision, which lists its source, and every file with its size and sha256.

A second `ettin release` reads it to keep finished revisions. A user who downloads a revision can check its files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.digests import sha256
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import fsync
from megatron_ettin.base.parsing import read_json_object
from megatron_ettin.base.paths import path_in
from megatron_ettin.checkpoint.integrity import INTEGRITY
from megatron_ettin.release.chain import Revision

RECORD = "release.json"
WORK = ".work"
"""Folder in the release for unfinished revisions; it is removed at the end."""
FORMAT = 2
"""Version of the format of a revision's content; a revision of another version is made again."""


@dataclass(frozen=True)
class ReleaseOptions:
    """Options that, together with the checkpoint, decide the bytes of a revision."""

    name: str
    dtype: str = "float32"
    max_shard_bytes: int = 5_000_000_000
    licence: str | None = None
    """SPDX identifier."""


def source_identity(revision: Revision) -> str:
    """Return a digest that identifies the content of a revision's checkpoint.

    It is the sha256 of integrity.json, which holds the sha256 of every file. A revision of the initial weights has no
    checkpoint, so its digest is that of the seed, the shape and the other keys that decide the weights.

    Raises:
        UserError: integrity.json is not readable.
    """
    if revision.checkpoint is None:
        run, model = revision.run.config, revision.run.config.model
        shape = (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads)
        drawn = (run.run.seed, *shape, model.vocab_size, model.init_std, model.output_bias_init)
        return hashlib.sha256(f"initial {drawn} {run.precision.name}".encode()).hexdigest()
    path = revision.checkpoint / INTEGRITY
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror or error})") from None


def expected_record(revision: Revision, options: ReleaseOptions) -> dict[str, Any]:
    """Return the record that the revision should have, without the list of files."""
    return {
        **{"format": FORMAT, "revision": revision.name, "phase": revision.phase, "step": revision.step},
        **{"tokens": revision.tokens, "total_tokens": revision.total_tokens, "source": source_identity(revision)},
        **{"name": options.name, "dtype": options.dtype, "max_shard_bytes": options.max_shard_bytes},
        "licence": options.licence,
    }


def write_record(folder: Path, expected: dict[str, Any]) -> None:
    """Write the record of a finished folder, with the list of its files, and force all files to the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }
    (folder / RECORD).write_text(json.dumps({**expected, "files": files}, indent=1) + "\n", encoding="utf-8")
    for path in (*paths, folder / RECORD, folder):
        fsync(path)


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a released folder; empty if it has no readable one."""
    record = read_json_object(folder / RECORD)
    return record if isinstance(record.get("files"), dict) else {}


def is_complete(folder: Path, record: dict[str, Any], checksums: bool) -> bool:
    """Return whether every file of the record exists with its size and, if `checksums` is set, with its sha256."""
    for name, entry in record["files"].items():
        path = path_in(folder, name, folder / RECORD, nested=True)
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        if checksums and sha256(path) != entry["sha256"]:
            return False
    return True


def is_released(folder: Path, expected: dict[str, Any], checksums: bool) -> bool:
    """Return whether `folder` is the expected revision, verified against transformers, and complete."""
    record = read_record(folder)
    same = bool(record) and {key: record.get(key) for key in expected} == expected
    return same and "parity.json" in record["files"] and is_complete(folder, record, checksums)
