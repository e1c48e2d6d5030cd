"""One task of `ettin prepare`: read, split off the held-out documents, tokenize in batches, cut, write one shard.

Runs in a worker process that loaded the tokenizer once. A task depends on its input and the settings only and ends by
writing its record, so a task with a record is done, whichever process did it and whatever was killed since."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import connection, parent_process
from pathlib import Path

import numpy as np

from megatron_ettin.data.ingest.chunking import ChunkRule
from megatron_ettin.data.ingest.documents import Document, read_documents
from megatron_ettin.data.ingest.inputs import Task
from megatron_ettin.data.ingest.shards import ShardWriter
from megatron_ettin.data.manifest import write_json_durably
from megatron_ettin.data.tokenizer import Tokenizer, load_tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1_024
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class IngestSettings:
    """What a worker needs to know."""

    work: Path  # tasks/ and tokenizer/ are in here
    rule: ChunkRule
    dtype: str
    text_key: str
    id_key: str
    add_prefix_space: bool
    holdout: float


@dataclass
class Worker:
    settings: IngestSettings
    tokenizer: Tokenizer


_worker: Worker | None = None  # of this process; a pool gives its initializer no other place to leave things


def start_worker(settings: IngestSettings) -> None:
    """Process initializer: one tokenizer, one thread of work, and an end when the parent ends."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    _worker = Worker(settings, load_tokenizer(settings.work / "tokenizer"))
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=leave_with, args=(parent.sentinel,), daemon=True).start()


def leave_with(sentinel: int) -> None:
    """A worker whose parent was killed would wait for work for ever: its siblings hold the queue open."""
    connection.wait([sentinel])
    os._exit(1)


def run_task_in_worker(task: Task) -> int:
    """Entry point in a pool; returns the number of tokens written."""
    assert _worker is not None
    return run_task(task, _worker.settings, _worker.tokenizer)


def run_task(task: Task, settings: IngestSettings, tokenizer: Tokenizer) -> int:
    folder = settings.work / "tasks"
    dtype, ends = np.dtype(settings.dtype), (tokenizer.cls_id, tokenizer.sep_id)
    writers = {
        split: ShardWriter(folder / f"{split}_{task.index:05d}", settings.rule, dtype, *ends)
        for split in (SPLITS if settings.holdout else SPLITS[:1])
    }
    empty_documents = 0
    try:
        for batch in batches(task, settings):
            texts = [document.text for document in batch]
            for document, ids in zip(batch, tokenizer.encode_batch(texts, settings.add_prefix_space), strict=True):
                if not ids:
                    empty_documents += 1
                    continue
                key = document_key(document.text)
                split = "heldout" if is_held_out(key, settings.holdout) else "train"
                writers[split].add(document.file.source, document.file.name, document.id, ids, key)
        record: dict[str, object] = {"empty_documents": empty_documents}
        for split, writer in writers.items():
            files = {suffix: asdict(file) for suffix, file in writer.finish().items()}
            record[split] = {**writer.counts, "sources": writer.sources, "files": files}
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    write_json_durably(record_path(settings.work, task.index), record)
    return sum(writer.counts["tokens"] for writer in writers.values())


def record_path(work: Path, task_index: int) -> Path:
    return work / "tasks" / f"task_{task_index:05d}.json"


def batches(task: Task, settings: IngestSettings) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for segment in task.segments:
        for document in read_documents(segment, settings.text_key, settings.id_key):
            batch.append(document)
            characters += len(document.text)
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def document_key(text: str) -> str:
    """The document's hash: equal texts are cut alike and fall on one side of a held-out split."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def is_held_out(key: str, fraction: float) -> bool:
    return int(key[:16], 16) < int(fraction * (1 << 64))
