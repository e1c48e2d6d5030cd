"""Run one task: read, split off the held-out documents, tokenize in batches, cut, write one shard of each split.

A task depends only on its input and the settings. It writes its record last, so a task with a record is done, whichever
process ran it. A shard's tokens are written as they come, and at its end the index, the documents table and each
chunk's start in its document.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.digests import shard_digest, write_checksums
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import fsync, write_json
from megatron_ettin.data.indexed import index_bytes, narrowed, token_dtype
from megatron_ettin.data.manifest import CHECKSUMS_SUFFIX, SHARD_SUFFIXES, FileRecord, record_of
from megatron_ettin.data.tokenizer import Tokenizer
from megatron_ettin.prepare.chunking import ChunkRule, add_special_tokens, chunk_lengths, piece_bounds
from megatron_ettin.prepare.filesystem import local_path, unreachable
from megatron_ettin.prepare.input_file import Segment
from megatron_ettin.prepare.inputs import Task
from megatron_ettin.prepare.readers.arrow import arrow_documents
from megatron_ettin.prepare.readers.columns import parquet_documents
from megatron_ettin.prepare.readers.document import Document, ReadOptions
from megatron_ettin.prepare.readers.indexed import indexed_documents
from megatron_ettin.prepare.readers.lines import json_documents, text_document
from megatron_ettin.prepare.readers.mds import mds_documents
from megatron_ettin.prepare.request import PrepareRequest

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
    """Run a task and write its record. Returns the number of tokens written."""
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
    """Return the paths of a task's shards in the order of SPLITS, without their suffixes."""
    return [work / "tasks" / f"{split}_{task_index:05d}" for split in SPLITS]


def record_path(work: Path, task_index: int) -> Path:
    """Return the path of a task's record."""
    return work / "tasks" / f"task_{task_index:05d}.json"


def batches(task: Task, options: ReadOptions) -> Iterator[list[Document]]:
    """Yield documents in order, in lists that end at BATCH_CHARACTERS characters (or tokens) or BATCH_DOCUMENTS."""
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
        # each remote file system has its own exceptions
        if local_path(url) is None:
            raise unreachable(url, error) from None
        if isinstance(error, OSError):
            raise UserError(f"{url}: {error.strerror or error}") from None
        raise


def tokenized(
    batch: list[Document], tokenizer: Tokenizer, add_prefix_space: bool
) -> Iterator[tuple[Document, npt.NDArray[np.uint32]]]:
    """Yield each document with its token ids: those of a text from the tokenizer, those of token inputs unchanged."""
    texts = [document.text for document in batch if document.tokens is None]
    encoded = tokenizer.encode_arrays(texts, add_prefix_space)
    for document in batch:
        yield document, next(encoded) if document.tokens is None else document.tokens


def document_key(document: Document) -> str:
    """Return the sha256 of a document's UTF-8 text, or of its token ids as little-endian uint32.

    It decides the cut and the split, so equal documents are cut alike and are in the same split.
    """
    content = document.text.encode("utf-8") if document.tokens is None else document.tokens.astype("<u4").tobytes()
    return hashlib.sha256(content).hexdigest()


def is_held_out(key: str, fraction: float) -> bool:
    """Return whether the document with this key belongs to the held-out fraction."""
    return int(key[:16], 16) < int(fraction * (1 << 64))


class ShardWriter:
    """Writer of one shard: a .bin/.idx pair and its sidecars. The caller ends it by `finish` or `discard`.

    `finish` syncs the temporary files to disk and renames them. The documents table is an uncompressed Arrow file, so
    that a reader can map it and look up any document without reading the others.
    """

    def __init__(self, prefix: Path, rule: ChunkRule, tokenizer: Tokenizer) -> None:
        self.prefix = prefix
        self.rule = rule
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.dropped_tokens = 0
        # source -> [documents, chunks, tokens]
        self.sources: dict[str, list[int]] = {}
        self._tokens = 0
        self._lengths: list[int] = []
        self._starts: list[int] = []
        self._document_indices = [0]
        self._names: list[str] = []
        self._ids: list[str] = []
        self._document_tokens: list[int] = []
        self._stream = open(self._temporary(".bin"), "wb", buffering=1 << 20)  # noqa: SIM115 (finish or discard closes)

    def add(
        self, source: str, name: str, document_id: str, ids: list[int] | npt.NDArray[np.integer], document_key: str
    ) -> None:
        """Add a document of at least one token.

        Args:
            source: the INPUT that the document belongs to, for the counts of each INPUT.
            name: the name of its file in the dataset.
            document_id: its id in that file.
            ids: its token ids, without special ones around them.
            document_key: seeds the boundary before a short last piece, which the recipe draws at random.
        """
        bounds = piece_bounds(len(ids), self.rule, document_key)
        known = narrowed(np.asarray(ids), self.dtype, f"{name}: {document_id}: token id")
        tokens = add_special_tokens(known, bounds, self.tokenizer.cls_id, self.tokenizer.sep_id, self.rule.end_token)
        self._stream.write(tokens.tobytes())
        self._lengths += chunk_lengths(bounds, self.rule.end_token)
        self._starts += [start for start, _ in bounds]
        self._document_indices.append(len(self._lengths))
        self._names.append(name)
        self._ids.append(document_id)
        self._document_tokens.append(len(ids))
        self._tokens += len(tokens)
        self.dropped_tokens += len(ids) - bounds[-1][1]
        totals = self.sources.setdefault(source, [0, 0, 0])
        for i, amount in enumerate((1, len(bounds), len(tokens))):
            totals[i] += amount

    @property
    def counts(self) -> dict[str, int]:
        """Return the counts of the documents, chunks and tokens added so far."""
        longest = max(self._lengths, default=0)
        return {
            "documents": len(self._ids),
            "chunks": len(self._lengths),
            "tokens": self._tokens,
            "longest_chunk_tokens": longest,
            "dropped_tokens": self.dropped_tokens,
        }

    def finish(self) -> dict[str, FileRecord]:
        """Write the files and return suffix -> record. A shard without documents has no files."""
        self._stream.close()
        if not self._ids:
            self._temporary(".bin").unlink()
            return {}
        content = index_bytes(np.asarray(self._lengths), np.asarray(self._document_indices), self.dtype)
        self._temporary(".idx").write_bytes(content)
        with open(self._temporary(".starts.npy"), "wb") as stream:
            np.save(stream, np.asarray(self._starts, dtype="<i8"))
        self._write_documents(self._temporary(".documents.arrow"))
        described = [suffix for suffix in SHARD_SUFFIXES if suffix != CHECKSUMS_SUFFIX]
        digests = {suffix: shard_digest(self._temporary(suffix)) for suffix in described}
        write_checksums(self._temporary(CHECKSUMS_SUFFIX), digests)
        records = {suffix: FileRecord(digest.bytes, digest.sha256) for suffix, digest in digests.items()}
        records[CHECKSUMS_SUFFIX] = record_of(self._temporary(CHECKSUMS_SUFFIX))
        for suffix in SHARD_SUFFIXES:
            temporary = self._temporary(suffix)
            fsync(temporary)
            os.replace(temporary, self.prefix.with_name(self.prefix.name + suffix))
        return records

    def discard(self) -> None:
        """Remove the unfinished files."""
        self._stream.close()
        for suffix in SHARD_SUFFIXES:
            self._temporary(suffix).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> Path:
        return self.prefix.with_name(f".tmp-{os.getpid()}-{self.prefix.name}{suffix}")

    def _write_documents(self, path: Path) -> None:
        import pyarrow
        import pyarrow.ipc

        columns = {
            "source": pyarrow.array(self._names, pyarrow.string()).dictionary_encode(),
            "document_id": pyarrow.array(self._ids, pyarrow.large_string()),
            "tokens": pyarrow.array(self._document_tokens, pyarrow.int64()),
        }
        batch = pyarrow.record_batch(columns)
        with pyarrow.OSFile(str(path), "wb") as stream, pyarrow.ipc.new_file(stream, batch.schema) as writer:
            writer.write_batch(batch)
