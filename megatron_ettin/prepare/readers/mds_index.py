"""Read index.json of an MDS directory (mosaicml-streaming's format, version 2): its shards and their columns.

The shards that the index names are read, in its order, and no other file of the directory. A root index may name shards
in sub-directories ("a/shard.00000.mds"), as merged indices do; the sub-directories' own indices, which name the same
shards, are then ignored. Without a root index every sub-directory with an index is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.prepare.filesystem import Entry, entries, find, joined, joined_in, parent_of, read_json
from megatron_ettin.prepare.input_file import InputFile

INDEX_NAME = "index.json"
FORMAT_VERSION = 2
READ_COMPRESSION = "zstd"


@dataclass(frozen=True)
class MdsShard:
    """Shard as the index describes it. It has no path, because a dataset does not depend on its inputs' paths."""

    file_name: str
    """Name of the file that is read, as in the index."""
    samples: int
    columns: tuple[tuple[str, str, int | None], ...]
    """Name, encoding and size in bytes of each column; None if the size varies."""
    raw_bytes: int
    raw_hashes: dict[str, str]
    """Algorithm -> hexadecimal digest of the uncompressed shard."""
    file_hashes: dict[str, str]
    """Algorithm -> hexadecimal digest of the file that is read, which may be compressed."""

    def to_json(self) -> str:
        """Return the shard as a JSON text."""
        return json.dumps(asdict(self), separators=(",", ":"))


def index_of(file: InputFile) -> str:
    """Return the path of the index.json that names a shard."""
    return file.url.removesuffix(json.loads(file.detail)["file_name"]) + INDEX_NAME


def shard_from_json(text: str) -> MdsShard:
    """Return the shard that `to_json` wrote."""
    raw = json.loads(text)
    return MdsShard(**{**raw, "columns": tuple(tuple(column) for column in raw["columns"])})


def mds_files(folder: str, listed: Mapping[str, Entry], name: str, source: str) -> list[InputFile] | None:
    """Return the shards in the index's order, sizes checked; None if index.json is not an index of shards.

    `listed` holds the folder's entries by file name; `name` is the folder's name in the dataset, `source` its INPUT.

    Raises:
        UserError: the index is damaged, or a shard is missing or has another size.
    """
    path = joined(folder, INDEX_NAME)
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("shards"), list):
        if any(file.endswith((".mds", ".mds.zstd")) for file in listed):
            raise UserError(f"{path}: not an MDS index: no list of shards in it")
        return None
    if raw.get("version") != FORMAT_VERSION:
        raise UserError(f"{path}: MDS version {raw.get('version')}; version {FORMAT_VERSION} is read")
    present = {folder: {entry.url: entry for entry in listed.values()}} if len(listed) > 1 else {}
    return [mds_file(folder, number, shard, present, name, source) for number, shard in enumerate(raw["shards"])]


def mds_file(
    folder: str, number: int, shard: Any, present: dict[str, dict[str, Entry]], name: str, source: str
) -> InputFile:
    """Return the file of shard `number`: the uncompressed one if it exists, else the compressed one. Raises UserError.

    `shard` is its entry in index.json. `present` is the cache of `entry_in`.
    """
    path = joined(folder, INDEX_NAME)
    try:
        if (shard["format"], shard["version"]) != ("mds", FORMAT_VERSION):
            described = f"format {shard['format']!r} version {shard['version']}"
            raise UserError(f"{path}: shard {number} is {described}; 'mds' version {FORMAT_VERSION} is read")
        raw = stored_file(shard["raw_data"])
        zipped = stored_file(shard["zip_data"]) if shard["zip_data"] else None
        fields = (shard["column_names"], shard["column_encodings"], shard["column_sizes"])
        columns = tuple(zip(*fields, strict=True))
        samples = int(shard["samples"])
        if samples < 0 or raw.bytes < 0 or not all(_is_column(*column) for column in columns):
            raise ValueError("a column or a count that is none")
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UserError(f"{path}: shard {number} is damaged ({type(error).__name__}: {error})") from None
    entry, compression, chosen = entry_in(folder, raw.name, path, present), None, raw
    if entry is None and zipped:
        entry, compression, chosen = entry_in(folder, zipped.name, path, present), READ_COMPRESSION, zipped
    if entry is None:
        names = " or ".join(repr(str(file.name)) for file in (raw, zipped) if file)
        raise UserError(f"{path}: names the shard {names}, which is not there")
    algorithm = str(shard.get("compression") or "").partition(":")[0]
    if compression and algorithm != READ_COMPRESSION:
        raise UserError(f"{entry.url}: compressed by {algorithm!r}; {READ_COMPRESSION} and uncompressed are read")
    if entry.bytes != chosen.bytes:
        what = "truncated" if entry.bytes < chosen.bytes else "changed"
        raise UserError(f"{entry.url}: {what}, {entry.bytes} bytes, {path} says {chosen.bytes}")
    detail = MdsShard(str(chosen.name), samples, columns, raw.bytes, raw.hashes, chosen.hashes).to_json()
    return InputFile(entry.url, f"{name}/{raw.name}", source, "mds", compression, entry.bytes, entry.modified, detail)


@dataclass(frozen=True)
class StoredFile:
    """A shard's file as its index describes it."""

    name: object
    """Name as in the index, unchecked; `entry_in` refuses an invalid one."""
    bytes: int
    hashes: dict[str, str]


def stored_file(described: Any) -> StoredFile:
    """Build the file from JSON. Raises KeyError, TypeError, ValueError, OverflowError or AttributeError if invalid."""
    return StoredFile(described["basename"], int(described["bytes"]), dict(described.get("hashes") or {}))


def _is_column(name: Any, encoding: Any, size: Any) -> bool:
    fits = size is None or (isinstance(size, int) and not isinstance(size, bool) and size >= 0)
    return isinstance(name, str) and isinstance(encoding, str) and fits


def entry_in(folder: str, file_name: object, path: str, present: dict[str, dict[str, Entry]]) -> Entry | None:
    """Return the entry of a file that the index `path` names, None if absent. Raises UserError for an invalid name.

    `present` caches each directory's listing: directory -> URL -> entry.
    """
    url = joined_in(folder, file_name, path, nested=True)
    inside = parent_of(url)
    if inside not in present:
        present[inside] = {entry.url: entry for entry in entries(inside)} if find(inside) else {}
    return present[inside].get(url)
