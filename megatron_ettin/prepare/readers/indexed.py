"""Read Megatron datasets and this package's: a document is the sequences between two entries of `document_indices`.

A segment [start, end) of a .bin of n bytes takes documents [d * start / n, d * end / n) of the d documents in the
index. So every document is read once, in order, and planning needs no look into the index. The index is read in blocks
of documents, from a local or remote file, so neither file is in memory as a whole.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import checked_digest
from megatron_ettin.data import manifest as own_dataset
from megatron_ettin.data.indexed import HEADER, MAGIC, IndexHeader, parse_header
from megatron_ettin.data.tokenizer import Tokenizer
from megatron_ettin.prepare.filesystem import Entry, find, joined, joined_in, local_path, open_input, read_json
from megatron_ettin.prepare.input_file import InputFile, Segment
from megatron_ettin.prepare.readers.document import Document, ReadOptions, document_tokens

DOCUMENTS_AT_ONCE = 4_096


def indexed_documents(segment: Segment, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of a segment of a Megatron dataset. Raises UserError."""
    file, tokenizer = segment.file, options.tokenizer
    assert tokenizer is not None
    detail = json.loads(file.detail)
    made_by = detail.get("tokenizer")
    if made_by not in (None, tokenizer.fingerprint):
        wanted = f"{tokenizer.fingerprint[:12]}... is asked for; give the dataset's own directory as --tokenizer"
        raise UserError(f"{file.url}: made with another tokenizer: {made_by[:12]}..., {wanted}")
    prefix = file.url.removesuffix(".bin")
    with open_input(prefix + ".idx") as index_stream, open_input(file.url) as tokens:
        index = read_header(index_stream, prefix + ".idx", detail["index_bytes"])
        first, end = (index.documents * offset // max(file.bytes, 1) for offset in (segment.start, segment.end))
        with contextlib.ExitStack() as stack:
            named = stack.enter_context(open_names(prefix)) if detail.get("documents") else None
            for begin in range(first, end, DOCUMENTS_AT_ONCE):
                stop = min(begin + DOCUMENTS_AT_ONCE, end)
                numbered = [f"{file.name}#{i}" for i in range(begin, stop)]
                ids = numbered if named is None else names(named, begin, stop)
                documents = block_tokens(index, index_stream, tokens, file, range(begin, stop), tokenizer)
                yield from (Document(file, name, tokens=content) for name, content in zip(ids, documents, strict=True))


def read_header(stream: IO[bytes], path: str, index_bytes: int) -> IndexHeader:
    """Read and check the header of an .idx file of `index_bytes` bytes. Raises UserError."""
    index = parse_header(stream.read(HEADER.size), path, index_bytes)
    if index.boundaries:
        ends = [int(read_array(stream, index.documents_at + 8 * i, "<i8", 1)[0]) for i in (0, index.boundaries - 1)]
        if ends != [0, index.sequences]:
            spanned = f"sequences {ends[0]} to {ends[1]}, not 0 to {index.sequences}"
            raise UserError(f"{path}: its documents span {spanned}")
    return index


def read_array(stream: IO[bytes], offset: int, dtype: Any, count: int) -> npt.NDArray[Any]:
    """Read `count` values of `dtype` at a byte offset of a file."""
    stream.seek(offset)
    return np.frombuffer(stream.read(count * np.dtype(dtype).itemsize), dtype=dtype)


def block_tokens(
    index: IndexHeader,
    index_stream: IO[bytes],
    tokens: IO[bytes],
    file: InputFile,
    documents: range,
    tokenizer: Tokenizer,
) -> Iterator[npt.NDArray[np.uint32]]:
    """Yield the token ids of consecutive documents. Raises UserError if index or tokens are damaged."""
    begin = documents.start
    bounds = read_array(index_stream, index.documents_at + 8 * begin, "<i8", len(documents) + 1)
    if np.any(np.diff(bounds) < 0) or bounds[0] < 0 or bounds[-1] > index.sequences:
        wrong = begin + int(np.flatnonzero(np.diff(bounds) < 0)[0]) if np.any(np.diff(bounds) < 0) else begin
        raise UserError(f"{index.path}: damaged at document {wrong}: its sequences do not ascend")
    first, count = int(bounds[0]), int(bounds[-1] - bounds[0])
    lengths = read_array(index_stream, HEADER.size + 4 * first, "<i4", count).astype(np.int64)
    pointers = read_array(index_stream, index.pointers_at + 8 * first, "<i8", count)
    ends = pointers + lengths * index.dtype.itemsize
    wrong_at = np.flatnonzero((lengths < 0) | (pointers < 0) | (ends > file.bytes))
    if len(wrong_at):
        i = int(wrong_at[0])
        extent = f"sequence {first + i} lies in bytes {pointers[i]} to {ends[i]}"
        raise UserError(f"{file.url}: truncated, {file.bytes} bytes, but by its index {extent}")
    for number in range(len(documents)):
        low, high = int(bounds[number]) - first, int(bounds[number + 1]) - first
        sequences = document_sequences(tokens, index.dtype, pointers[low:high], lengths[low:high])
        where = f"{file.url}: document {begin + number}"
        yield document_tokens(sequences, where, tokenizer)


def document_sequences(
    tokens: IO[bytes], dtype: np.dtype, pointers: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> list[npt.NDArray[np.integer]]:
    """Return the sequences of one document, with a single read if they are contiguous in the file."""
    if not len(pointers):
        return []
    if np.array_equal(pointers[1:], pointers[:-1] + lengths[:-1] * dtype.itemsize):
        whole = read_array(tokens, int(pointers[0]), dtype, int(lengths.sum()))
        return np.split(whole, np.cumsum(lengths[:-1])) if len(lengths) > 1 else [whole]
    return [read_array(tokens, int(p), dtype, int(n)) for p, n in zip(pointers, lengths, strict=True)]


@contextlib.contextmanager
def open_names(prefix: str) -> Iterator[Any]:
    """Yield the record batch of the documents table of a shard by `ettin prepare`. Raises UserError if damaged."""
    import pyarrow
    import pyarrow.ipc

    url = prefix + ".documents.arrow"
    path = local_path(url)
    try:
        with pyarrow.memory_map(path) if path is not None else open_input(url) as stream:
            yield pyarrow.ipc.open_file(stream).get_batch(0)
    except pyarrow.ArrowException as error:
        raise UserError(f"{url}: damaged documents table ({error})") from None


def names(table: Any, begin: int, end: int) -> list[str]:
    """Return the ids of documents [begin, end)."""
    column = table.column(table.schema.get_field_index("document_id"))
    return [str(name) for name in column.slice(begin, end - begin).to_pylist()]


def pair_at(given: str, name: str, source: str) -> InputFile | None:
    """Return the .bin/.idx pair that `given` names: its prefix, its .idx or its .bin. None if there is no .idx."""
    prefix = given[:-4] if given.endswith((".idx", ".bin")) else given
    index = find(prefix + ".idx")
    return None if index is None else pair_of(index, name, source, strict=True)


def pair_of(index: Entry, name: str, source: str, strict: bool) -> InputFile | None:
    """Return the .bin/.idx pair of an .idx file. Raises UserError if the .bin is missing.

    If the file is not a Megatron index, return None, or with `strict` raise UserError.
    """
    with open_input(index.url) as stream:
        magic = stream.read(len(MAGIC))
    if magic != MAGIC:
        if strict:
            raise UserError(f"{index.url}: not a Megatron index: begins with {magic!r}, not {MAGIC!r}")
        return None
    tokens = find(index.url[:-4] + ".bin")
    if tokens is None:
        raise UserError(f"{index.url}: no .bin of that name in its folder")
    detail = json.dumps({"index_bytes": index.bytes})
    changed = f"{index.modified} {tokens.modified}".strip()
    return InputFile(tokens.url, name.removesuffix(".idx"), source, "indexed", None, tokens.bytes, changed, detail)


def own_dataset_files(folder: str, listed: Mapping[str, Entry], name: str, source: str) -> list[InputFile] | None:
    """Return the shards of a dataset that `ettin prepare` made, in order. Raises UserError.

    Returns None if manifest.json is something else. The held-out part is another dataset and is not included. `name`
    is the folder's name in the dataset to be made, `source` its INPUT.
    """
    path = joined(folder, "manifest.json")
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != own_dataset.FORMAT:
        return None
    if raw.get("version") != own_dataset.VERSION:
        version, known = raw.get("version"), own_dataset.VERSION
        raise UserError(f"{path}: {own_dataset.FORMAT} version {version}; this package reads version {known}")
    try:
        manifest = own_dataset.manifest_from(checked_digest(raw))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged manifest ({type(error).__name__}: {error})") from None
    files = []
    for shard in manifest.shards:
        present = {
            suffix: find(joined_in(folder, shard.name + suffix, path))
            for suffix in (".bin", ".idx", ".documents.arrow")
        }
        for suffix, entry in present.items():
            expected = shard.files[suffix].bytes
            if entry is None:
                raise UserError(f"{path}: names {shard.name}{suffix}, which is not there")
            if entry.bytes != expected:
                raise UserError(f"{entry.url}: {entry.bytes} bytes, the manifest says {expected}")
        tokens, index = present[".bin"], present[".idx"]
        assert tokens is not None and index is not None
        detail = {"index_bytes": index.bytes, "tokenizer": manifest.tokenizer.fingerprint, "documents": True}
        file_name = f"{name}/{shard.name}"
        files.append(
            InputFile(tokens.url, file_name, source, "indexed", None, tokens.bytes, tokens.modified, json.dumps(detail))
        )
    return files
