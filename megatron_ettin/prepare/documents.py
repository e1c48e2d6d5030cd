"""The documents of a segment, whatever its format: one table from kind to reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_ettin.base.errors import UserError
from megatron_ettin.prepare.filesystem import local_path, unreachable
from megatron_ettin.prepare.input_file import Segment
from megatron_ettin.prepare.readers.arrow import arrow_documents
from megatron_ettin.prepare.readers.document import Document, ReadOptions
from megatron_ettin.prepare.readers.indexed import indexed_documents
from megatron_ettin.prepare.readers.lines import json_documents, text_document
from megatron_ettin.prepare.readers.mds import mds_documents
from megatron_ettin.prepare.readers.parquet import parquet_documents

READERS: dict[str, Callable[[Segment, ReadOptions], Iterator[Document]]] = {
    "text": text_document,
    "jsonl": json_documents,
    "parquet": parquet_documents,
    "datasets": arrow_documents,
    "mds": mds_documents,
    "indexed": indexed_documents,
}


def read_documents(segment: Segment, options: ReadOptions) -> Iterator[Document]:
    """The documents of a segment in order, empty ones included."""
    url = segment.file.url
    try:
        yield from READERS[segment.file.kind](segment, options)
    except UserError:
        raise
    except Exception as error:
        if local_path(url) is None:  # each remote file system has exceptions of its own
            raise unreachable(url, error) from None
        if isinstance(error, OSError):
            raise UserError(f"{url}: {error.strerror or error}") from None
        raise
