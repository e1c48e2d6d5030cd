"""Read and write manifest.json: what a dataset holds, how it was made, and the sha256 of every file.

The fingerprint covers the tokens, the chunk boundaries (.bin and .idx) and the tokenizer, not the names of the sources:
two datasets with one fingerprint train the same model. The manifest is written last, so a directory without one is not
a dataset.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.digests import sha256
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import checked_digest, load_json
from megatron_ettin.base.paths import Links, checked_name, checked_sha256, path_in

FILE_NAME = "manifest.json"
# file with the names, sizes and times of a dataset's inputs
INPUTS_FILE = "inputs.json"
FORMAT = "megatron_ettin.dataset"
VERSION = 2
CHECKSUMS_SUFFIX = ".checksums.json"
# annotation of a field -> types that its value may have
FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "str": (str,),
    "bool": (bool,),
    "float": (float, int),
}
TOKEN_DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "int64")
SHARD_NAME = re.compile(r"shard_\d{5,}", re.ASCII)
SHARD_SUFFIXES = (".bin", ".idx", ".documents.arrow", ".starts.npy", CHECKSUMS_SUFFIX)


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """One shard of a dataset."""

    name: str
    """Name of the files without suffix, such as `shard_00000`."""
    documents: int
    chunks: int
    tokens: int
    files: dict[str, FileRecord]
    """Its files by suffix."""


@dataclass(frozen=True)
class SourceRecord:
    """One INPUT of `ettin prepare`."""

    name: str
    documents: int
    chunks: int
    tokens: int


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that a dataset was made with."""

    name: str
    fingerprint: str
    vocab_size: int
    special_ids: tuple[int, ...]
    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int | None


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    tokenizer: TokenizerRecord
    dtype: str
    chunk_tokens: int
    min_chunk_tokens: int
    skip_tokens: int
    end_token: str
    """Chunks of a document that end in [SEP]: "every", "last" or "none"."""
    add_prefix_space: bool
    holdout: float
    """Value of `--holdout`, the fraction of held-out documents. A held-out dataset has the same value."""
    documents: int
    chunks: int
    tokens: int
    longest_chunk_tokens: int
    dropped_tokens: int
    """Tokens of pieces that were too short to keep."""
    empty_documents: int
    sources: list[SourceRecord]
    shards: list[ShardRecord]
    tokenizer_files: dict[str, FileRecord]
    settings_sha256: str
    """sha256 of the settings and of the inputs' names and sizes, which decide the output."""
    fingerprint: str = ""
    format: str = FORMAT
    version: int = VERSION

    def with_fingerprint(self) -> Manifest:
        """Return the manifest with the fingerprint of its content."""
        content = [self.tokenizer.fingerprint, self.dtype]
        content += [shard.files[suffix].sha256 for shard in self.shards for suffix in (".bin", ".idx")]
        return dataclasses.replace(self, fingerprint=hashlib.sha256(":".join(content).encode("ascii")).hexdigest())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a dataset. Raises UserError."""
    path = folder / FILE_NAME
    if not path.is_file():
        what = "no such directory" if not folder.is_dir() else f"not a dataset: no {FILE_NAME}"
        raise UserError(f"dataset {folder}: {what} (make one with `ettin prepare`)")
    try:
        raw: dict[str, Any] = load_json(path.read_text(encoding="utf-8"))
        if raw.get("format") != FORMAT or raw.get("version") != VERSION:
            other = f"{raw.get('format')} version {raw.get('version')}"
            raise UserError(f"{path}: {other}; this package reads {FORMAT} version {VERSION}")
        return manifest_from(checked_digest(raw))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged manifest ({type(error).__name__}: {error})") from None


def manifest_from(raw: dict[str, Any]) -> Manifest:
    """Build a manifest from parsed JSON.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: `raw` is no valid manifest, or has a name that leads out of the
            dataset's folder.
    """
    tokenizer = {**raw["tokenizer"], "special_ids": tuple(raw["tokenizer"]["special_ids"])}
    shards = [ShardRecord(**{**shard, "files": file_records(shard["files"])}) for shard in raw["shards"]]
    for shard in shards:
        if not SHARD_NAME.fullmatch(checked_name(shard.name)):
            raise ValueError(f"{shard.name[:80]!r} is not the name of a shard")
        if other := sorted(set(shard.files) - set(SHARD_SUFFIXES)):
            raise ValueError(f"{other[0][:80]!r} is not a file of a shard")
        if missing := sorted({".bin", ".idx"} - set(shard.files)):
            raise ValueError(f"{shard.name} has no {missing[0]}")
    checked_sha256(raw["fingerprint"])
    checked_sha256(tokenizer["fingerprint"])
    known = {
        "tokenizer": TokenizerRecord(**tokenizer),
        "shards": shards,
        "sources": [SourceRecord(**source) for source in raw["sources"]],
        "tokenizer_files": file_records(raw["tokenizer_files"]),
    }
    manifest = Manifest(**{**raw, **known})
    for record in (manifest, manifest.tokenizer, *manifest.sources, *shards):
        check_field_types(record)
    if manifest.dtype not in TOKEN_DTYPES:
        raise ValueError(f"tokens of type {manifest.dtype[:80]!r}; known: {', '.join(TOKEN_DTYPES)}")
    for count in ("documents", "chunks", "tokens"):
        if getattr(manifest, count) != sum(getattr(shard, count) for shard in shards):
            raise ValueError(f"its {count} are not those of its shards")
    return manifest


def check_field_types(record: Any) -> None:
    """Raise ValueError if a field has another type than its annotation, or an integer is negative or above 63 bits."""
    for field in dataclasses.fields(record):
        types = FIELD_TYPES.get(str(field.type))
        value = getattr(record, field.name)
        if types is not None and type(value) not in types:
            raise ValueError(f"{field.name} is a {type(value).__name__}, not {field.type}")
        if type(value) is int and not 0 <= value < 1 << 63:
            raise ValueError(f"{field.name} is not a count")


def file_records(raw: dict[str, Any]) -> dict[str, FileRecord]:
    """Build name or suffix -> record from JSON. Raises ValueError, TypeError or AttributeError if it is invalid."""
    records = {checked_name(name): FileRecord(**record) for name, record in raw.items()}
    for record in records.values():
        checked_sha256(record.sha256)
        if type(record.bytes) is not int or record.bytes < 0:
            raise ValueError("a file whose `bytes` are not a count")
    return records


def shard_file(folder: Path, shard: ShardRecord, suffix: str, links: Links = Links.INSIDE) -> Path:
    """Return the path of a shard's file. Raises UserError if it leads out of the dataset's folder."""
    return path_in(folder, shard.name + suffix, folder / FILE_NAME, links=links)


def record_of(path: Path) -> FileRecord:
    """Return size and sha256 of a file."""
    return FileRecord(bytes=path.stat().st_size, sha256=sha256(path))


def check_size(path: Path, record: FileRecord) -> None:
    """Raise UserError if a file is missing or has another size."""
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"{path}: missing (the manifest lists it with {record.bytes} bytes)") from None
    if size != record.bytes:
        damage = "truncated" if size < record.bytes else "changed"
        raise UserError(f"{path}: {damage}, {size} bytes, the manifest says {record.bytes}")
