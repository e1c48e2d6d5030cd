"""Run one task: read, split off the held-out documents, tokenize in batches, cut, write one shard of each split.

A task depends on its input and the settings only and ends by writing its record, so a task with a record is done,
whichever process did it and whatever was killed since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_json
from megatron_ettin.data.tokenizer import Tokenizer
from megatron_ettin.prepare.filesystem import local_path, unreachable
from megatron_ettin.prepare.input_file import Segment
from megatron_ettin.prepare.inputs import Task
from megatron_ettin.prepare.readers.arrow import arrow_documents
from megatron_ettin.prepare.readers.document import Document, ReadOptions
from megatron_ettin.prepare.readers.indexed import indexed_documents
from megatron_ettin.prepare.readers.lines import json_documents, text_document
from megatron_ettin.prepare.readers.mds import mds_documents
from megatron_ettin.prepare.readers.parquet import parquet_documents
from megatron_ettin.prepare.request import PrepareRequest
from megatron_ettin.prepare.shards import ShardWriter

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1_024
SPLITS = ("train", "heldout")
READERS: dict[str, Callable[[Segment, ReadOptions], Iterator[Document]]] = {
    "text": text_document,
    "jsonl": json_documents,
    "parquet": parquet_documents,
    "datasets": arrow_documents,
    "mds": mds_documents,
    "indexed": indexed_documents,
}


def run_task(task: Task, request: PrepareRequest, tokenizer: Tokenizer) -> int:
    """Run a task and write its record. Returns the tokens written."""
    prefixes = dict(zip(SPLITS, shard_prefixes(request.work, task.index), strict=True))
    writers = {
        split: ShardWriter(prefixes[split], request.rule, tokenizer)
        for split in (SPLITS if request.holdout else SPLITS[:1])
    }
    options = ReadOptions(
        request.text_key, request.id_key, request.tokens_key, tokenizer, request.tokens_first, request.format == "text"
    )
    empty_documents = 0
    try:
        for batch in batches(task, options):
            for document, ids in tokenized(batch, tokenizer, request.add_prefix_space):
                if not len(ids):
                    empty_documents += 1
                    continue
                key = document_key(document)
                split = "heldout" if is_held_out(key, request.holdout) else "train"
                writers[split].add(document.file.source, document.file.name, document.id, ids, key)
        record: dict[str, object] = {"empty_documents": empty_documents}
        for split, writer in writers.items():
            files = {suffix: asdict(file) for suffix, file in writer.finish().items()}
            record[split] = {**writer.counts, "sources": writer.sources, "files": files}
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    write_json(record_path(request.work, task.index), record)
    return sum(writer.counts["tokens"] for writer in writers.values())


def shard_prefixes(work: Path, task_index: int) -> list[Path]:
    """Return the paths of a task's shards, by split, without their suffixes."""
    return [work / "tasks" / f"{split}_{task_index:05d}" for split in SPLITS]


def record_path(work: Path, task_index: int) -> Path:
    """Return the path of a task's record."""
    return work / "tasks" / f"task_{task_index:05d}.json"


def batches(task: Task, options: ReadOptions) -> Iterator[list[Document]]:
    """Yield documents in order, in lists of BATCH_CHARACTERS or one document."""
    batch: list[Document] = []
    size = 0
    for segment in task.segments:
        for document in read_documents(segment, options):
            batch.append(document)
            size += document.size
            if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def read_documents(segment: Segment, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of a segment in order, empty ones included. Raises UserError."""
    url = segment.file.url
    try:
        yield from READERS[segment.file.format](segment, options)
    except UserError:
        raise
    except Exception as error:
        # each remote file system has exceptions of its own
        if local_path(url) is None:
            raise unreachable(url, error) from None
        if isinstance(error, OSError):
            raise UserError(f"{url}: {error.strerror or error}") from None
        raise


def tokenized(
    batch: list[Document], tokenizer: Tokenizer, add_prefix_space: bool
) -> Iterator[tuple[Document, npt.NDArray[np.uint32]]]:
    """Yield each document with its ids: a text's from the tokenizer, token inputs as they are."""
    texts = [document.text for document in batch if document.tokens is None]
    encoded = tokenizer.encode_arrays(texts, add_prefix_space)
    for document in batch:
        yield document, next(encoded) if document.tokens is None else document.tokens


def document_key(document: Document) -> str:
    """Hash a document's content: equal documents are cut alike and fall on one side of a held-out split.

    The content of tokens is their ids as little-endian uint32.
    """
    content = document.text.encode("utf-8") if document.tokens is None else document.tokens.astype("<u4").tobytes()
    return hashlib.sha256(content).hexdigest()


def is_held_out(key: str, fraction: float) -> bool:
    """Return whether a document belongs to the held-out fraction."""
    return int(key[:16], 16) < int(fraction * (1 << 64))
