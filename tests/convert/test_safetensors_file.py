"""Files of weights that are missing, damaged or of another format."""

from __future__ import annotations

import json
import struct

import pytest
import torch

from tests.convert.folders import refused


def test_from_hf_missing_shard_is_named(theirs, tmp_path, capsys):
    name = sorted(theirs.glob("model-*.safetensors"))[1]
    name.unlink()
    refused(capsys, tmp_path, "from-hf", theirs, f"{name.name}: missing")


@pytest.mark.parametrize("keep_bytes", [0, 4, 100, -1])
def test_from_hf_truncated_shard_is_named(theirs, tmp_path, capsys, keep_bytes):
    file = sorted(theirs.glob("model-*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:keep_bytes])
    refused(capsys, tmp_path, "from-hf", theirs, f"{file.name}: truncated")


def test_from_hf_shard_header_longer_than_file_is_refused(theirs, tmp_path, capsys):
    file = sorted(theirs.glob("model-*.safetensors"))[0]
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])
    refused(capsys, tmp_path, "from-hf", theirs, f"{file.name}: truncated")


def test_from_hf_wrong_shard_index_is_refused(theirs, tmp_path, capsys):
    path = theirs / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.embeddings.norm.weight"] = files[-1]
    path.write_text(json.dumps(index))
    refused(capsys, tmp_path, "from-hf", theirs, f"{files[-1]}: lacks model.embeddings.norm.weight")
    index["weight_map"]["model.embeddings.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    refused(capsys, tmp_path, "from-hf", theirs, "leads out of its folder")
    path.write_text("[")
    refused(capsys, tmp_path, "from-hf", theirs, "index.json: unreadable")


def test_from_hf_pickled_weights_are_refused(theirs, tmp_path, capsys):
    for file in theirs.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, theirs / "pytorch_model.bin")
    refused(capsys, tmp_path, "from-hf", theirs, "pytorch_model.bin is a pickle")
