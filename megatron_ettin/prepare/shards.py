"""Write one shard: tokens as they come, then the index, the documents table and each chunk's start in its document.

Files are written under a temporary name, fsynced and renamed, all of them before the caller hears of them. The
documents table is an uncompressed Arrow file: a reader maps it and looks up any document at once.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.digests import shard_digest, write_checksums
from megatron_ettin.base.files import fsync
from megatron_ettin.data.indexed import index_bytes, narrowed, token_dtype
from megatron_ettin.data.manifest import CHECKSUMS_SUFFIX, SHARD_SUFFIXES, FileRecord, record_of
from megatron_ettin.data.tokenizer import Tokenizer
from megatron_ettin.prepare.chunking import ChunkRule, chunk_lengths, framed, piece_bounds


class ShardWriter:
    """Writer of one shard: documents in, a .bin/.idx pair and its sidecars out. Ends with `finish` or `discard`."""

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
        """Add a document of at least one token. `document_key` decides what the recipe leaves to chance."""
        bounds = piece_bounds(len(ids), self.rule, document_key)
        known = narrowed(np.asarray(ids), self.dtype, f"{name}: {document_id}: token id")
        tokens = framed(known, bounds, self.tokenizer.cls_id, self.tokenizer.sep_id, self.rule.end_token)
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
        """Return the counts of what was added so far."""
        longest = max(self._lengths, default=0)
        return {
            "documents": len(self._ids),
            "chunks": len(self._lengths),
            "tokens": self._tokens,
            "longest_chunk_tokens": longest,
            "dropped_tokens": self.dropped_tokens,
        }

    def finish(self) -> dict[str, FileRecord]:
        """Close, name and checksum the files; a shard without documents leaves none."""
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
