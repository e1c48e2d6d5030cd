"""Directories that `datasets` saved to disk: state.json names a split's Arrow files, dataset_dict.json the splits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import load_json
from megatron_ettin.prepare.filesystem import Entry, entries, joined, joined_in, read_whole
from megatron_ettin.prepare.input_file import InputFile


def saved_dataset_files(
    folder: str, listed: Mapping[str, Entry], name: str, source: str, required: bool = False
) -> list[InputFile] | None:
    """The data files of a saved dataset in the order of its state.json; None where state.json is something else,
    which `required` makes an error.
    """
    path = joined(folder, "state.json")
    raw = json_object(path)
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
    """The data files of every split, in the order of dataset_dict.json; None where that file is something else."""
    path = joined(folder, "dataset_dict.json")
    raw = json_object(path)
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


def json_object(url: str) -> Any:
    """The parsed content, None where it is not JSON."""
    try:
        return load_json(read_whole(url))
    except ValueError:
        return None
