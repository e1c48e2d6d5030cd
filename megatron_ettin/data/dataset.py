"""Open a prepared dataset and read its chunks, memory-mapped, by one global number over all shards.

Opening reads the manifest and checks the size of each file; `verify` checks the contents. Shards are mapped when they
are first read, and the least recently used are closed. Memory is O(shards), whatever the number of chunks.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.paths import Links, refuse_links
from megatron_ettin.data.indexed import MappedShard, index_file_bytes, map_npy, open_shard
from megatron_ettin.data.manifest import FileRecord, Manifest, ShardRecord, check_size, read_manifest, shard_file
from megatron_ettin.data.verify import dataset_files, verify_files

# limit on open files to request: a fourth of the memory maps that Linux allows a process by default
MAX_FILES = 16_384
# open files per cache entry: an entry holds two at most, and the other half is left to the rest of the process
FILES_PER_ENTRY = 4
# threads that check sizes: on a parallel file system each check takes a millisecond
CHECKED_AT_ONCE = 16


@dataclass(frozen=True)
class DocumentSpans:
    """Origin of n chunks."""

    source: list[str]
    """File of each chunk's document, as "INPUT/path/within/it"."""
    document_id: list[str]
    start_token: npt.NDArray[np.int64]
    """First token of the chunk among the document's own tokens."""
    document: npt.NDArray[np.int64]
    """Number of the document within the dataset."""
    special_tokens: npt.NDArray[np.int64]
    """Number of special tokens of the chunk: 2, or 1 if it has no end token."""


class Dataset:
    """A prepared dataset; `open_dataset` opens one. Its pickle is small, because it has no memory maps.

    Args:
        path: folder of the dataset.
        manifest: the content of its manifest.json.
    """

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
        # links are refused when the dataset is opened; a prefix is not a file
        self._prefixes = [str(shard_file(path, shard, "", Links.UNCHECKED)) for shard in manifest.shards]
        self._contents = ["".join(record.sha256[:16] for record in shard.files.values()) for shard in manifest.shards]

    def __repr__(self) -> str:
        return f"Dataset({str(self.path)!r}, {self.num_chunks} chunks, {self.num_tokens} tokens)"

    def __reduce__(self) -> tuple[type[Dataset], tuple[Path, Manifest]]:
        return type(self), (self.path, self.manifest)

    def chunk(self, i: int) -> npt.NDArray[np.integer]:
        """Return the tokens of chunk `i`, [CLS] to [SEP]: a read-only view of the memory map."""
        shard, local = self._locate(i)
        return self._shard(shard).chunk(local)

    def lengths_of(self, chunks: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each chunk, special tokens included. Only the chunks' shards are opened."""
        wanted = np.asarray(chunks, dtype=np.int64)
        lengths = np.empty(wanted.shape, np.int64)
        for shard, chosen, local in self._by_shard(wanted):
            lengths[chosen] = self._shard(shard).chunk_lengths[local]
        return lengths

    def documents_of(self, chunks: npt.ArrayLike) -> DocumentSpans:
        """Return sources, document ids and spans of the chunks [n], shard by shard and without reading tokens."""
        wanted = np.asarray(chunks, dtype=np.int64)
        sources: npt.NDArray[np.object_] = np.empty(wanted.shape, object)
        ids: npt.NDArray[np.object_] = np.empty(wanted.shape, object)
        start, number = np.empty(wanted.shape, np.int64), np.empty(wanted.shape, np.int64)
        specials = np.full(wanted.shape, 1 if self.manifest.end_token == "none" else 2, np.int64)
        for shard, chosen, local in self._by_shard(wanted):
            boundaries = self._shard(shard).document_indices
            document = np.searchsorted(boundaries, local, side="right") - 1
            table = self._documents(shard)
            wanted_rows = arrow_integers(document)
            sources[chosen] = table["source"].take(wanted_rows).to_pylist()
            ids[chosen] = table["document_id"].take(wanted_rows).to_pylist()
            start[chosen] = self._starts(shard)[local]
            number[chosen] = int(self._first_document[shard]) + document
            if self.manifest.end_token == "last":
                specials[chosen] = 1 + (boundaries[document + 1] == local + 1)
        return DocumentSpans(sources.tolist(), ids.tolist(), start, number, specials)

    def document_of(self, i: int) -> tuple[str, str, int, int]:
        """Return source file, document id, first token within the document, and document number of chunk `i`."""
        # raises IndexError
        self._locate(i)
        spans = self.documents_of([i])
        return spans.source[0], spans.document_id[0], int(spans.start_token[0]), int(spans.document[0])

    def verify(self) -> None:
        """Read every byte, also of the held-out part. Raises UserError naming the first file that is damaged."""
        verified = verify_files(list(dataset_files(self.path, self.manifest)))
        if verified.problems:
            raise UserError(verified.problems[0])

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self.num_chunks:
            raise IndexError(f"chunk {i} of {self.num_chunks}")
        shard = int(np.searchsorted(self._first_chunk, i, side="right")) - 1
        return shard, int(i) - int(self._first_chunk[shard])

    def _by_shard(
        self, chunks: npt.NDArray[np.int64]
    ) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Yield (shard, indices into `chunks`, chunk numbers within the shard) for each shard that is touched."""
        if chunks.size and not (int(chunks.min()) >= 0 and int(chunks.max()) < self.num_chunks):
            raise IndexError(f"chunks {int(chunks.min())} to {int(chunks.max())} of {self.num_chunks}")
        shards = np.searchsorted(self._first_chunk, chunks, side="right") - 1
        order = np.argsort(shards, kind="stable")
        present, begins = np.unique(shards[order], return_index=True)
        for shard, chosen in zip(present.tolist(), np.split(order, begins[1:]), strict=False):
            yield shard, chosen, chunks[chosen] - self._first_chunk[shard]

    def _shard(self, shard: int) -> MappedShard:
        opened: MappedShard = open_files()("shard", self._prefixes[shard], self._contents[shard])
        return opened

    def _starts(self, shard: int) -> npt.NDArray[np.int64]:
        opened: npt.NDArray[np.int64] = open_files()("starts", self._prefixes[shard], self._contents[shard])
        return opened

    def _documents(self, shard: int) -> dict[str, Any]:
        opened: dict[str, Any] = open_files()("documents", self._prefixes[shard], self._contents[shard])
        return opened


def open_starts(prefix: Path) -> npt.NDArray[np.int64]:
    """Map a shard's array of each chunk's first token within its document. `prefix` is the path without suffix."""
    return map_npy(prefix.with_name(f"{prefix.name}.starts.npy"))


def open_documents(prefix: Path) -> dict[str, Any]:
    """Map the columns `source` and `document_id` of a shard's documents table. Raises UserError if it is damaged."""
    import pyarrow
    import pyarrow.ipc

    path = prefix.with_name(f"{prefix.name}.documents.arrow")
    try:
        batch = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).get_batch(0)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: damaged ({error}); `ettin inspect --verify` tells where") from None
    return {name: batch.column(name) for name in ("source", "document_id")}


OPENERS: dict[str, Callable[[Path], Any]] = {"shard": open_shard, "starts": open_starts, "documents": open_documents}


@lru_cache(maxsize=1)
def open_files() -> Callable[[str, str, str], Any]:
    """Return the cached function (key of OPENERS, shard's path without suffix, its checksums) -> mapped files.

    All datasets of this process share the cache. A map holds a file descriptor, and a mixture of large corpora has more
    shards than a process may have open files. So the process's limit is raised (`raise_file_limit`), and the least
    recently used shards are closed.
    """

    def opened(opener: str, prefix: str, checksums: str) -> Any:
        return OPENERS[opener](Path(prefix))

    return lru_cache(maxsize=raise_file_limit() // FILES_PER_ENTRY)(opened)


def raise_file_limit() -> int:
    """Raise this process's limit on open files to MAX_FILES if possible. Returns the limit, at most MAX_FILES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return wanted if soft == resource.RLIM_INFINITY else min(soft, MAX_FILES)


def arrow_integers(values: npt.NDArray[np.int64]) -> Any:
    """Convert integers to an Arrow array. pyarrow's own conversion imports pandas if installed, which takes 0.2 s."""
    import pyarrow

    content = pyarrow.py_buffer(np.ascontiguousarray(values, np.int64))
    return pyarrow.Array.from_buffers(pyarrow.int64(), len(values), [None, content])


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset directory. Raises UserError naming a missing, truncated or grown file before anything reads it."""
    folder = Path(path)
    manifest = read_manifest(folder)
    # the tokenizer's files are copied into checkpoints and published models; a link could bring in any other file
    refuse_links(folder / "tokenizer")
    width = np.dtype(manifest.dtype).itemsize
    checks: list[tuple[ShardRecord, str, FileRecord]] = []
    for shard in manifest.shards:
        checks += [(shard, suffix, record) for suffix, record in shard.files.items()]
        recorded = (shard.files[".bin"].bytes, shard.files[".idx"].bytes)
        if recorded != (width * shard.tokens, index_file_bytes(shard.chunks, shard.documents)):
            raise UserError(f"dataset {folder}: manifest.json contradicts itself about {shard.name}")
    with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
        # reading the results raises the first UserError, in the order of the files
        list(pool.map(lambda check: check_size(shard_file(folder, *check[:2]), check[2]), checks))
    return Dataset(folder, manifest)
