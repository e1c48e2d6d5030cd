"""Megatron's .bin/.idx pairs and this package's own dataset directories, as inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import checked_digest
from megatron_ettin.data.indexed import MAGIC
from megatron_ettin.data.manifest import FORMAT, VERSION, manifest_from
from megatron_ettin.prepare.filesystem import Entry, find, joined, joined_in, open_input
from megatron_ettin.prepare.input_file import InputFile
from megatron_ettin.prepare.readers.arrow_directory import json_object


def pair_at(given: str, name: str, source: str) -> InputFile | None:
    """The pair that a prefix, an .idx or a .bin names; None where there is no .idx."""
    prefix = given[:-4] if given.endswith((".idx", ".bin")) else given
    index = find(prefix + ".idx")
    return None if index is None else pair_of(index, name, source, strict=True)


def pair_of(index: Entry, name: str, source: str, strict: bool) -> InputFile | None:
    """The pair of an .idx file. One that is not Megatron's is None, or an error where the user asked for it."""
    with open_input(index.url) as stream:
        magic = stream.read(len(MAGIC))
    if magic != MAGIC:
        if strict:
            raise UserError(f"{index.url}: not a Megatron index: begins with {magic!r}, not {MAGIC!r}")
        return None
    tokens = find(index.url[:-4] + ".bin")
    if tokens is None:
        raise UserError(f"{index.url}: no .bin of that name beside it")
    detail = json.dumps({"index_bytes": index.bytes})
    changed = f"{index.modified} {tokens.modified}".strip()
    return InputFile(tokens.url, name.removesuffix(".idx"), source, "indexed", None, tokens.bytes, changed, detail)


def own_dataset_files(folder: str, listed: Mapping[str, Entry], name: str, source: str) -> list[InputFile] | None:
    """The shards of a dataset that `ettin prepare` made, in order; None where manifest.json is something else. Its
    held-out part is a dataset of its own and not part of it.
    """
    path = joined(folder, "manifest.json")
    raw = json_object(path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        return None
    if raw.get("version") != VERSION:
        raise UserError(f"{path}: {FORMAT} version {raw.get('version')}; this package reads version {VERSION}")
    try:
        manifest = manifest_from(checked_digest(raw))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged manifest ({type(error).__name__}: {error})") from None
    files = []
    for shard in manifest.shards:
        found = {
            suffix: find(joined_in(folder, shard.name + suffix, path))
            for suffix in (".bin", ".idx", ".documents.arrow")
        }
        for suffix, entry in found.items():
            expected = shard.files[suffix].bytes
            if entry is None:
                raise UserError(f"{path}: names {shard.name}{suffix}, which is not there")
            if entry.bytes != expected:
                raise UserError(f"{entry.url}: {entry.bytes} bytes, the manifest says {expected}")
        tokens, index = found[".bin"], found[".idx"]
        assert tokens is not None and index is not None
        detail = {"index_bytes": index.bytes, "tokenizer": manifest.tokenizer.fingerprint, "documents": True}
        file_name = f"{name}/{shard.name}"
        files.append(
            InputFile(tokens.url, file_name, source, "indexed", None, tokens.bytes, tokens.modified, json.dumps(detail))
        )
    return files
