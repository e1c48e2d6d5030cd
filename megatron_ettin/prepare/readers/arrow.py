"""Read Arrow IPC files as `datasets` writes them (streams), the file format, and directories that `datasets` saved.

A segment takes the record batches that begin in it. A stream has no index, so its messages are read from the start; a
local file is memory-mapped, so that only the headers of the batches before the segment are read. Memory is bounded by
one batch (`datasets` writes 1,000 rows). In a saved directory, state.json names a split's Arrow files and
dataset_dict.json the splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.prepare.filesystem import Entry, entries, joined, joined_in, local_path, open_input, read_json
from megatron_ettin.prepare.input_file import InputFile, Segment
from megatron_ettin.prepare.readers.columns import batch_documents, choose_columns
from megatron_ettin.prepare.readers.document import Document, ReadOptions

FILE_MAGIC = b"ARROW1"
STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def arrow_documents(segment: Segment, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of the record batches that begin in a segment. Raises UserError."""
    import pyarrow

    file = segment.file
    row = 0
    columns = None
    try:
        with opened(file) as stream:
            for begin, batch in batches(stream, file):
                if columns is None:
                    types = dict(zip(batch.schema.names, batch.schema.types, strict=True))
                    columns = choose_columns(types, options, file.url)
                if segment.start <= begin < segment.end:
                    yield from batch_documents(batch, row, columns, file, options)
                row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.url}#{row}: broken Arrow data, or truncated ({first_line(error)})") from None


def opened(file: InputFile) -> Any:
    """Open an Arrow file, memory-mapped if it is local. Raises UserError if it is empty."""
    import pyarrow

    path = local_path(file.url)
    if path is None:
        return pyarrow.PythonFile(open_input(file.url), mode="r")
    if file.bytes == 0:
        raise UserError(f"{path}: the file is empty")
    return pyarrow.memory_map(path)


def batches(stream: Any, file: InputFile) -> Iterator[tuple[int, Any]]:
    """Yield (byte offset, record batch) in order; nothing for an empty dataset. Raises UserError if truncated."""
    import pyarrow.ipc

    if stream.read(len(FILE_MAGIC)) == FILE_MAGIC:
        reader = pyarrow.ipc.open_file(stream)
        # the reader gives no offsets, so the batches count as spread evenly over the file
        for i in range(reader.num_record_batches):
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


def saved_dataset_files(
    folder: str, listed: Mapping[str, Entry], name: str, source: str, required: bool = False
) -> list[InputFile] | None:
    """Return the data files of a saved dataset in the order of its state.json. Raises UserError.

    If state.json is something else, return None, or with `required` raise UserError. `listed` holds the folder's
    entries by file name; `name` is the folder's name in the dataset, `source` its INPUT.
    """
    path = joined(folder, "state.json")
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("_data_files"), list):
        if required:
            raise UserError(f"{path}: not the state of a saved dataset: no list '_data_files'")
        return None
    if raw.get("_indices_files") or raw.get("_indices_data_files"):
        how = "datasets.load_from_disk(DIR).flatten_indices().save_to_disk(NEW)"
        raise UserError(f"{folder}: saved with an indices mapping, which is not read; flatten it first: {how}")
    files = []
    for number, data in enumerate(raw["_data_files"]):
        file_name = data.get("filename") if isinstance(data, dict) else None
        if not isinstance(file_name, str):
            raise UserError(f"{path}: data file {number} has no 'filename'")
        if file_name not in listed:
            listed = {entry.url.rpartition("/")[2]: entry for entry in entries(folder)}
        if file_name not in listed:
            raise UserError(f"{path}: names the data file {file_name!r}, which is not there")
        entry = listed[file_name]
        files.append(InputFile(entry.url, f"{name}/{file_name}", source, "datasets", None, entry.bytes, entry.modified))
    return files


def dataset_dict_files(folder: str, listed: Mapping[str, Entry], name: str, source: str) -> list[InputFile] | None:
    """Return the data files of every split, in the order of dataset_dict.json; None if that is something else.

    The arguments are those of `saved_dataset_files`. Raises UserError if a split is missing.
    """
    path = joined(folder, "dataset_dict.json")
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("splits"), list):
        return None
    files: list[InputFile] = []
    for split in map(str, raw["splits"]):
        inside = joined_in(folder, split, path)
        held = {entry.url.rpartition("/")[2]: entry for entry in entries(inside)}
        if "state.json" not in held:
            raise UserError(f"{path}: names the split {split!r}, but {inside} has no state.json")
        files += saved_dataset_files(inside, held, f"{name}/{split}", source, required=True) or []
    return files
