"""Source checkpoints that are damaged, do not match their configuration, or have padded vocabularies."""

from __future__ import annotations

import shutil

import pytest
import torch

from megatron_ettin.checkpoint.directory import seal_and_rename
from megatron_ettin.checkpoint.integrity import seal
from megatron_ettin.checkpoint.reader import CheckpointReader
from megatron_ettin.checkpoint.weights_writer import write_weights
from megatron_ettin.convert.to_hf import ExportOptions, to_hf
from tests.convert.folders import refused, same_bits, tensors


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "common.pt", "config.yaml", "progress.json"])
def test_to_hf_damaged_checkpoint_file_is_named(checkpoint, tmp_path, capsys, name):
    file = checkpoint / name
    intact = file.read_bytes()
    flipped = bytearray(intact)
    flipped[len(intact) // 2] ^= 4
    file.write_bytes(flipped)
    refused(capsys, tmp_path, "to-hf", checkpoint, f"{name}: sha256")
    file.write_bytes(intact[:-1])
    refused(capsys, tmp_path, "to-hf", checkpoint, f"{name}: {len(intact) - 1:,} bytes")
    file.unlink()
    refused(capsys, tmp_path, "to-hf", checkpoint, f"{name}: missing")


def test_to_hf_checkpoint_unlike_its_config_is_refused(checkpoint, tmp_path, capsys):
    path = checkpoint / "config.yaml"
    text = path.read_text()
    for old, new, message in (
        ("ffn_hidden_size: 96", "ffn_hidden_size: 48", "linear_fc1.weight is (192, 64)"),
        ("num_layers: 4", "num_layers: 5", "no tensor transformer.layers.4."),
        ("vocab_size: 320", "vocab_size: 321", "embedding.word_embeddings.weight is (320, 64)"),
        ("objective: mlm", "objective: sft", "run.objective is 'sft'"),
        ("  hidden_size: 64\n", "", "hidden_size"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        seal(checkpoint)
        refused(capsys, tmp_path, "to-hf", checkpoint, message)


def test_to_hf_padded_vocabulary_is_stripped(sources, tmp_path):
    """Tensor parallelism of degree 3 pads 320 rows to 321; the export must not contain the padding."""
    reader = CheckpointReader(sources / "checkpoint")
    padded = {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118
    for key in ("embedding.word_embeddings.weight", "output_layer.bias"):
        padded[key] = torch.cat([padded[key], torch.full_like(padded[key][:1], 1e9)])
    staging = tmp_path / "staging"
    write_weights(staging, padded.items(), {"progress": {}})
    for name in ("config.yaml", "progress.json"):
        shutil.copy(sources / "checkpoint" / name, staging)
    seal_and_rename(staging, tmp_path / "padded")
    to_hf(tmp_path / "padded", tmp_path / "out", ExportOptions(verify=True))
    assert same_bits(tensors(sources / "whole"), tensors(tmp_path / "out"))
