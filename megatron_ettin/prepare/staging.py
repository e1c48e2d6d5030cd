"""Turn the records of finished tasks into a complete dataset directory, still under its temporary name.

Shards get their numbers here, in the order of the tasks; those without documents are left out. Files are moved by
renames and may be interrupted anywhere: a file already moved is left where it is.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import fsync, write_json
from megatron_ettin.base.parsing import with_digest
from megatron_ettin.data.indexed import token_dtype
from megatron_ettin.data.manifest import (
    FILE_NAME,
    FileRecord,
    Manifest,
    ShardRecord,
    SourceRecord,
    TokenizerRecord,
    record_of,
)
from megatron_ettin.data.tokenizer import Tokenizer
from megatron_ettin.prepare.request import PrepareRequest
from megatron_ettin.prepare.task import SPLITS, record_path


class NoDocumentsError(UserError):
    """All tasks are done, and none has a document to train on."""


def read_task_records(work: Path, num_tasks: int) -> list[dict[str, Any]]:
    """Read the records of all tasks, in order."""
    return [json.loads(record_path(work, i).read_text(encoding="utf-8")) for i in range(num_tasks)]


def stage(
    work: Path, records: list[dict[str, Any]], request: PrepareRequest, tokenizer: Tokenizer, settings_sha256: str
) -> Path:
    """Move the shards into `work/dataset` (and `heldout` in it), and return its path. Raises NoDocumentsError."""
    if not any(record["train"]["documents"] for record in records):
        held_out = sum(record.get("heldout", {}).get("documents", 0) for record in records)
        detail = f"all {held_out} are held out by --holdout {request.holdout}" if held_out else "every text is empty"
        raise NoDocumentsError(f"no input documents left in {', '.join(request.inputs)}: {detail}")
    staged = work / "dataset"
    for split in SPLITS:
        if any(record.get(split, {}).get("documents") for record in records):
            stage_split(work, split, records, request, tokenizer, settings_sha256)
    return staged


def stage_split(
    work: Path,
    split: str,
    records: list[dict[str, Any]],
    request: PrepareRequest,
    tokenizer: Tokenizer,
    settings_sha256: str,
) -> None:
    """Move the shards of one split to their names, and write its tokenizer and manifest."""
    folder = work / "dataset" if split == "train" else work / "dataset" / split
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[ShardRecord] = []
    parts = [record[split] for record in records]
    for i, part in enumerate(parts):
        if not part["documents"]:
            continue
        name = f"shard_{len(shards):05d}"
        for suffix in part["files"]:
            move(work / "tasks" / f"{split}_{i:05d}{suffix}", folder / (name + suffix), record_path(work, i))
        files = {suffix: FileRecord(**file) for suffix, file in part["files"].items()}
        shards.append(ShardRecord(name, part["documents"], part["chunks"], part["tokens"], files))
    shutil.copytree(work / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    copied = sorted((folder / "tokenizer").iterdir())
    for path in (*copied, folder / "tokenizer"):
        fsync(path)
    manifest = Manifest(
        tokenizer=TokenizerRecord(**{field.name: getattr(tokenizer, field.name) for field in fields(TokenizerRecord)}),
        dtype=token_dtype(tokenizer.vocab_size).name,
        **asdict(request.rule),
        add_prefix_space=request.add_prefix_space,
        holdout=request.holdout,
        documents=sum(part["documents"] for part in parts),
        chunks=sum(part["chunks"] for part in parts),
        tokens=sum(part["tokens"] for part in parts),
        longest_chunk_tokens=max(part["longest_chunk_tokens"] for part in parts),
        dropped_tokens=sum(part["dropped_tokens"] for part in parts),
        empty_documents=sum(record["empty_documents"] for record in records) if split == "train" else 0,
        sources=source_totals(parts),
        shards=shards,
        tokenizer_files={file.name: record_of(file) for file in copied},
        settings_sha256=settings_sha256,
    )
    write_json(folder / FILE_NAME, with_digest(asdict(manifest.with_fingerprint())))


def move(source: Path, target: Path, record: Path) -> None:
    """Move a file to `target`, unless it is there already.

    Raises:
        UserError: the file is missing. `record`, its task's record, is removed, so that the task runs again.
    """
    if source.exists():
        os.replace(source, target)
    elif not target.exists():
        record.unlink(missing_ok=True)
        raise UserError(f"{source}: missing from the unfinished dataset; run the same command again to make it anew")


def source_totals(parts: list[dict[str, Any]]) -> list[SourceRecord]:
    """Add up the counts of each INPUT, in the order in which their documents come."""
    totals: dict[str, list[int]] = {}
    for part in parts:
        for source, counts in part["sources"].items():
            known = totals.setdefault(source, [0, 0, 0])
            totals[source] = [a + b for a, b in zip(known, counts, strict=True)]
    return [SourceRecord(source, *counts) for source, counts in totals.items()]
