"""A prepared dataset, opened for reading: chunks by one global number over all shards, memory-mapped.

Opening costs one stat per file and no reads: sizes are checked, contents only by `verify`. Shards are mapped when first
touched and the least recently used are closed again, since a large corpus has more shards than a process may hold
files open. Memory is O(shards), whatever the number of chunks."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.config.errors import UserError
from megatron_ettin.data.indexed import Shard, index_file_bytes, open_shard
from megatron_ettin.data.manifest import Manifest, check_file, read_manifest

OPEN_SHARDS = 128  # two file descriptors each
OPEN_SIDECARS = 4  # document tables are whole in memory


class Dataset:
    """See `open_dataset`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.num_chunks = manifest.chunks
        self.num_documents = manifest.documents
        self.num_tokens = manifest.tokens
        self.fingerprint = manifest.fingerprint
        self.dtype = np.dtype(manifest.dtype)
        self._first_chunk = np.cumsum([0] + [shard.chunks for shard in manifest.shards])
        self._first_document = np.cumsum([0] + [shard.documents for shard in manifest.shards])
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        self._documents = lru_cache(maxsize=OPEN_SIDECARS)(self._read_documents)
        self._starts = lru_cache(maxsize=OPEN_SHARDS)(self._open_starts)

    def __repr__(self) -> str:
        return f"Dataset({str(self.path)!r}, {self.num_chunks} chunks, {self.num_tokens} tokens)"

    def __getstate__(self) -> dict[str, Any]:  # the maps and caches do not travel to other processes
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["manifest"])  # type: ignore[misc]

    def chunk(self, i: int) -> npt.NDArray[np.integer]:
        """The tokens of chunk `i`, [CLS] to [SEP]: a read-only view of the memory map."""
        shard, local = self._place(i)
        return self._shard(shard).chunk(local)

    @property
    def chunk_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of every chunk, in order: 4 bytes a chunk of memory."""
        parts = [self._shard(shard).chunk_lengths for shard in range(len(self.manifest.shards))]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def lengths_of(self, chunks: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Tokens of the chunks named, reading only the shards they are in."""
        wanted = np.asarray(chunks, dtype=np.int64)
        lengths = np.empty(wanted.shape, np.int64)
        shards = np.searchsorted(self._first_chunk, wanted, side="right") - 1
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            lengths[chosen] = self._shard(shard).chunk_lengths[wanted[chosen] - self._first_chunk[shard]]
        return lengths

    def document_of(self, i: int) -> tuple[str, str, int, int]:
        """Source file, document id, first token of chunk `i` within the document's tokens, global document number."""
        shard, local = self._place(i)
        boundaries = self._shard(shard).document_indices
        document = int(np.searchsorted(boundaries, local, side="right")) - 1
        sources, ids = self._documents(shard)
        start = int(self._starts(shard)[local])
        return sources[document].as_py(), ids[document].as_py(), start, int(self._first_document[shard]) + document

    def verify(self) -> None:
        """Read every byte; UserError names the first file that is not what the manifest says."""
        for name, record in self.manifest.tokenizer_files.items():
            check_file(self.path / "tokenizer" / name, record, content=True)
        for shard in self.manifest.shards:
            for suffix, record in shard.files.items():
                check_file(self.path / (shard.name + suffix), record, content=True)

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self.num_chunks:
            raise IndexError(f"chunk {i} of {self.num_chunks}")
        shard = int(np.searchsorted(self._first_chunk, i, side="right")) - 1
        return shard, int(i) - int(self._first_chunk[shard])

    def _open_shard(self, shard: int) -> Shard:
        record = self.manifest.shards[shard]
        return open_shard(self.path / record.name)

    def _open_starts(self, shard: int) -> npt.NDArray[np.int64]:
        return np.load(self.path / f"{self.manifest.shards[shard].name}.starts.npy", mmap_mode="r")

    def _read_documents(self, shard: int) -> tuple[Any, Any]:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(self.path / f"{self.manifest.shards[shard].name}.documents.parquet")
        return table.column("source"), table.column("document_id")


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset directory. A missing, truncated or grown file is refused by name before anything reads it."""
    folder = Path(path)
    manifest = read_manifest(folder)
    width = np.dtype(manifest.dtype).itemsize
    for shard in manifest.shards:
        for suffix, record in shard.files.items():
            check_file(folder / (shard.name + suffix), record, content=False)
        told = (shard.files[".bin"].bytes, shard.files[".idx"].bytes)
        if told != (width * shard.tokens, index_file_bytes(shard.chunks, shard.documents)):
            raise UserError(f"dataset {folder}: manifest.json contradicts itself about {shard.name}")
    return Dataset(folder, manifest)
