"""Folders with a config.json that transformers 4 wrote for ModernBERT are imported with their thetas, window and names,
and can be trained further."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_ettin.checkpoint.directory import latest, read_config
from tests.convert.folders import TINY, command, load, logits, make_model, same_bits, tensors
from tests.train.runs import command as train_command, read

LAYERS = 4
# hidden, inner, heads, the size's name in our recipes
SHAPES = {"tiny": (64, 96, 4, "17m"), "base": (768, 1152, 12, "150m"), "large": (1024, 2624, 16, "400m")}


def folder_of(folder, name):
    """Make a folder like answerdotai's ModernBERT, with seeded random weights."""
    hidden, inner, heads, _ = SHAPES[name]
    shape = {**TINY, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads}
    make_model("mlm", {**shape, "num_hidden_layers": LAYERS}).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("rope_parameters", "layer_types", "dtype"):
        config.pop(key, None)
    config |= {"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0, "local_attention": 16}
    config |= {"global_attn_every_n_layers": 3, "transformers_version": "4.47.0.dev0", "torch_dtype": "float32"}
    path.write_text(json.dumps(config))
    return folder


def imported(tmp_path, capsys, name):
    """Import a folder, check settings, tensors and logits, and return (their folder, our checkpoint)."""
    theirs, ours = folder_of(tmp_path / "theirs", name), tmp_path / "ours"
    status, _, err = command(capsys, "from-hf", theirs, ours, "--json")
    assert status == 0, err
    model = read_config(ours)["model"]
    assert (model["global_rope_theta"], model["local_rope_theta"]) == (160_000, 10_000)
    assert (model["encoder_window"], model["global_attention_every"], model["vocab_size"]) == (8, 3, 320)
    assert command(capsys, "to-hf", ours, tmp_path / "again", "--no-verify")[0] == 0
    assert same_bits(tensors(theirs), tensors(tmp_path / "again"))
    assert torch.equal(logits(load(theirs, "mlm"), 100), logits(load(tmp_path / "again", "mlm"), 100))
    return theirs, ours


@pytest.mark.full
def test_from_hf_modernbert_large_keeps_bits(tmp_path, capsys):
    imported(tmp_path, capsys, "large")


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["tiny", pytest.param("base", marks=pytest.mark.full)])
def test_from_hf_modernbert_keeps_bits_and_trains(pool, corpus, tmp_path, capsys, name):
    hidden, inner, heads, size = SHAPES[name]
    _, ours = imported(tmp_path, capsys, name)
    arguments = [f"model.hidden_size={hidden}", f"model.ffn_hidden_size={inner}", f"model.num_attention_heads={heads}"]
    arguments += ["model.local_rope_theta=10000", "model.attention_output_dropout=0", "run.steps=2"]
    line = train_command(tmp_path / "run", corpus, "mlm", arguments, ["--init-from", str(ours)])
    line[line.index("17m")], line[line.index("pretrain")] = size, "decay"
    (result,) = pool.run(1, line, timeout_seconds=300)
    assert result.status == 0, result.output[-2000:]
    assert len(read(tmp_path / "run").metrics) == 2
    assert read_config(latest(tmp_path / "run"))["model"]["local_rope_theta"] == 10_000
