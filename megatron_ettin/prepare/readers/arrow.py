"""Arrow IPC files as `datasets` writes them (streams), and the file format; read a record batch at a time.

A segment takes the record batches that begin in it. A stream has no index, so the batches before are passed over by
walking; a local file is memory-mapped for that, which touches their headers only. Memory is bounded by one batch
(`datasets` writes 1,000 rows).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.prepare.filesystem import local_path, open_input
from megatron_ettin.prepare.input_file import InputFile, Segment
from megatron_ettin.prepare.readers.columns import batch_documents, choose_columns
from megatron_ettin.prepare.readers.document import Document, ReadOptions

FILE_MAGIC = b"ARROW1"
STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def arrow_documents(segment: Segment, options: ReadOptions) -> Iterator[Document]:
    import pyarrow

    file = segment.file
    row = 0
    columns = None
    try:
        with opened(file) as stream:
            for begin, batch in batches(stream, file):
                if columns is None:
                    columns = choose_columns(batch.schema, options, file.url)
                if segment.start <= begin < segment.end:
                    yield from batch_documents(batch, row, columns, file, options)
                row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.url}#{row}: broken Arrow data, or truncated ({first_line(error)})") from None


def opened(file: InputFile) -> Any:
    import pyarrow

    path = local_path(file.url)
    if path is None:
        return pyarrow.PythonFile(open_input(file.url), mode="r")
    if file.bytes == 0:
        raise UserError(f"{path}: the file is empty")
    return pyarrow.memory_map(path)


def batches(stream: Any, file: InputFile) -> Iterator[tuple[int, Any]]:
    """(offset of its message, record batch), in order. An empty dataset has a schema and no batch."""
    import pyarrow.ipc

    if stream.read(len(FILE_MAGIC)) == FILE_MAGIC:
        reader = pyarrow.ipc.open_file(stream)
        for i in range(reader.num_record_batches):  # without offsets: spread evenly over the bytes
            yield file.bytes * i // reader.num_record_batches, reader.get_batch(i)
        return
    stream.seek(max(file.bytes - len(STREAM_END), 0))
    if stream.read(len(STREAM_END)) != STREAM_END:
        raise UserError(f"{file.url}: does not end as an Arrow stream does, at byte {file.bytes}: truncated?")
    stream.seek(0)
    reader = pyarrow.ipc.open_stream(stream)
    while True:
        begin = stream.tell()
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        yield begin, batch
