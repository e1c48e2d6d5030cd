"""Read documents from the columns of Arrow record batches, as saved datasets have them, and parquet files.

Documents are the texts of a text column or, if there is none, the token ids of a column of lists of integers. A segment
of a parquet file takes the row groups that begin in it. They are read in batches of pages. So memory is bounded by a
batch and a page of each of the two columns, not by the file or its row groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError, first_line, nearest
from megatron_ettin.prepare.filesystem import BUFFER_BYTES, open_input
from megatron_ettin.prepare.input_file import InputFile, Segment
from megatron_ettin.prepare.readers.document import Document, ReadOptions, document_tokens

# bytes of rows that are converted to Python objects at a time
BATCH_BYTES = 8 << 20
BATCH_ROWS = 1_024
COLUMNS_SHOWN = 20


@dataclass(frozen=True)
class Columns:
    """Columns of a file that are read."""

    content: str
    """Name of the column with texts (`is_text`) or token ids."""
    is_text: bool
    id: str | None
    """Name of the column with document ids; None if there is none."""

    @property
    def names(self) -> list[str]:
        """Return the names of the columns."""
        return [self.content] if self.id is None else [self.content, self.id]


def is_text(column: Any) -> bool:
    """Return whether a column type is a string."""
    from pyarrow import types

    if types.is_dictionary(column):
        return is_text(column.value_type)
    return bool(types.is_string(column) or types.is_large_string(column) or types.is_string_view(column))


def is_token_list(column: Any) -> bool:
    """Return whether a column type is a list of integers."""
    from pyarrow import types

    is_list = types.is_list(column) or types.is_large_list(column) or types.is_fixed_size_list(column)
    return bool(is_list and types.is_integer(column.value_type))


def choose_columns(
    types: Mapping[str, Any],
    options: ReadOptions,
    where: str,
    is_text: Callable[[Any], bool] = is_text,
    is_tokens: Callable[[Any], bool] = is_token_list,
) -> Columns:
    """Return the text column, else the token column; with `tokens_first` the other way round.

    `is_text` and `is_tokens` tell which types of columns are texts and token ids. `where` names the file in messages.

    Raises:
        UserError: neither column is there, or it has the wrong type.
    """
    text, tokens = options.text_key, options.tokens_key
    id_key = options.id_key if options.id_key in types else None
    if text in types and not (options.tokens_first and tokens in types):
        if not is_text(types[text]):
            raise UserError(f"{where}: column {text!r} is {types[text]}, not a string")
        return Columns(text, True, id_key)
    if tokens in types:
        if not is_tokens(types[tokens]):
            raise UserError(f"{where}: column {tokens!r} is {types[tokens]}, not a list of integers")
        return Columns(tokens, False, id_key)
    shown = ", ".join(f"{name} ({type_})" for name, type_ in list(types.items())[:COLUMNS_SHOWN])
    more = ", ..." if len(types) > COLUMNS_SHOWN else ""
    raise UserError(
        f"{where}: no text column {text!r}{nearest(text, types)} and no token column {tokens!r}; columns found: "
        f"{shown or 'none'}{more} (choose with --text-key or --tokens-key)"
    )


def batch_documents(
    batch: Any, first_row: int, columns: Columns, file: InputFile, options: ReadOptions
) -> Iterator[Document]:
    """Yield a document for each row of a record batch.

    `first_row` is the number of its first row within the file, from 0.
    """
    rows = rows_at_once(batch.nbytes, batch.num_rows)
    for start in range(0, batch.num_rows, rows):
        part = batch.slice(start, rows)
        content = part.column(part.schema.get_field_index(columns.content))
        names = row_names(part, first_row + start, columns, file)
        if columns.is_text:
            values = texts(content, first_row + start, columns.content, file)
            yield from (Document(file, name, text=text) for name, text in zip(names, values, strict=True))
        else:
            ids = token_arrays(content, first_row + start, columns.content, file, options)
            yield from (Document(file, name, tokens=tokens) for name, tokens in zip(names, ids, strict=True))


def row_names(part: Any, first_row: int, columns: Columns, file: InputFile) -> list[str]:
    """Return the document id of each row: from the id column, or "file#row" without one or for a null."""
    numbered = [f"{file.name}#{first_row + i}" for i in range(part.num_rows)]
    if columns.id is None:
        return numbered
    given = part.column(part.schema.get_field_index(columns.id)).to_pylist()
    return [number if name is None else str(name) for number, name in zip(numbered, given, strict=True)]


def rows_at_once(total_bytes: int, rows: int) -> int:
    """Return the number of rows to convert to Python objects at a time, at most BATCH_ROWS or BATCH_BYTES."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(total_bytes, 1)))


def texts(column: Any, first_row: int, name: str, file: InputFile) -> Iterator[str]:
    """Yield the texts of a column. Raises UserError for a null or a text that is not UTF-8."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [value_at(column, i, f"{file.url}#{first_row + i}", name) for i in range(len(column))]
    for i, value in enumerate(values):
        if value is None:
            raise UserError(f"{file.url}#{first_row + i}: {name!r} is null, not a string")
        yield value


def value_at(column: Any, i: int, where: str, name: str) -> str | None:
    """Return text `i` of a column, None for a null. Raises UserError if it is not UTF-8."""
    try:
        value: str | None = column[i].as_py()
        return value
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {name!r} is not UTF-8, byte {error.start} of it") from None


def token_arrays(
    column: Any, first_row: int, name: str, file: InputFile, options: ReadOptions
) -> Iterator[npt.NDArray[np.uint32]]:
    """Yield the token ids of each row by `document_tokens`. Raises UserError for a null or an invalid id."""
    assert options.tokenizer is not None
    for i in range(len(column)):
        where = f"{file.url}#{first_row + i}"
        ids = column[i].values
        if ids is None:
            raise UserError(f"{where}: {name!r} is null, not a list of token ids")
        if ids.null_count:
            raise UserError(f"{where}: {name!r} has a null among its token ids")
        yield document_tokens([ids.to_numpy(zero_copy_only=False)], where, options.tokenizer)


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
        schema = parquet.schema_arrow
        columns = choose_columns(dict(zip(schema.names, schema.types, strict=True)), options, file.url)
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
