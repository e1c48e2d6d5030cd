"""Read parquet files, row group by row group. A segment takes the row groups that begin in it.

Read in batches of pages, so that memory is bounded by a batch and a page of each of the two columns, not by the file or
its row groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.prepare.filesystem import BUFFER_BYTES, open_input
from megatron_ettin.prepare.input_file import Segment
from megatron_ettin.prepare.readers.columns import Columns, batch_documents, choose_columns, rows_at_once
from megatron_ettin.prepare.readers.document import Document, ReadOptions


def parquet_documents(segment: Segment, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of the row groups that begin in a segment. Raises UserError."""
    import pyarrow
    import pyarrow.parquet

    file = segment.file
    with open_input(file.url) as stream:
        try:
            parquet = pyarrow.parquet.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            reason = f"not a parquet file, or truncated: {file.bytes} bytes, {first_line(error)}"
            raise UserError(f"{file.url}: {reason}") from None
        columns = choose_columns(parquet.schema_arrow, options, file.url)
        first_row = 0
        for group in range(parquet.metadata.num_row_groups):
            described = parquet.metadata.row_group(group)
            if segment.start <= group_start(described) < segment.end:
                yield from group_documents(parquet, group, first_row, columns, segment, options)
            first_row += described.num_rows


def group_start(described: Any) -> int:
    """Return the offset of a row group's first byte in its file."""
    if described.num_columns == 0:
        return 0
    starts: list[int] = []
    for i in range(described.num_columns):
        column = described.column(i)
        dictionary = column.dictionary_page_offset if column.has_dictionary_page else None
        starts.append(column.data_page_offset if not dictionary else min(dictionary, column.data_page_offset))
    return min(starts)


def group_documents(
    parquet: Any, group: int, first_row: int, columns: Columns, segment: Segment, options: ReadOptions
) -> Iterator[Document]:
    """Yield the documents of one row group, in batches of pages."""
    import pyarrow

    file, described = segment.file, parquet.metadata.row_group(group)
    wanted = {i: described.column(i) for i in range(described.num_columns)}
    used = [c for c in wanted.values() if c.path_in_schema.partition(".")[0] in columns.names]
    rows = rows_at_once(sum(column.total_uncompressed_size for column in used), max(described.num_rows, 1))
    row = first_row
    batches = parquet.iter_batches(batch_size=rows, row_groups=[group], columns=columns.names)
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file.url}#{row}: damaged parquet data ({first_line(error)})") from None
        if batch is None:
            break
        yield from batch_documents(batch, row, columns, file, options)
        row += batch.num_rows
    if row - first_row != described.num_rows:
        raise UserError(f"{file.url}#{row}: damaged parquet data (row group {group} ends before its last row)")
