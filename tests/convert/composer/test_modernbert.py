"""Folders of ModernBERT-base and -large, fewer layers: imported with their thetas, window and names, and trained on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megatron_ettin.checkpoint.directory import latest, read_config
from tests.conftest import make_corpus
from tests.convert.folders import command, load, logits, same_bits, tensors
from tests.train.runs import read

SHAPES = {"base": (768, 1152, 12, "150m"), "large": (1024, 2624, 16, "400m")}
VOCABULARY, LAYERS = 50_368, 4
WORDS = [
    *("data.seq_len=64", "batch.global_batch_rows=2", "batch.micro_batch_rows=1", "batch.warmup_tokens=0"),
    *("precision.name=fp32", "optim.lr=1e-4", "schedule.name=constant", "schedule.warmup_tokens=0"),
    *("run.device=cpu", "run.steps=2", "metrics.tensorboard=false", "checkpoint.every_tokens=null"),
    *(f"model.vocab_size={VOCABULARY}", f"model.num_layers={LAYERS}", "model.attention_output_dropout=0"),
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A folder as answerdotai's are: config.json in the words of transformers 4, seeded weights."""
    import transformers as t

    def make(name):
        hidden, inner, heads, _ = SHAPES[name]
        folder = tmp_path_factory.mktemp(name) / "theirs"
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": inner}
        model = t.ModernBertForMaskedLM(
            t.ModernBertConfig(**sizes, num_hidden_layers=LAYERS, num_attention_heads=heads)
        )
        model.save_pretrained(folder)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key in ("rope_parameters", "layer_types", "local_attention", "dtype"):
            config.pop(key, None)
        config |= {"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0, "local_attention": 128}
        config |= {"global_attn_every_n_layers": 3, "transformers_version": "4.47.0.dev0", "torch_dtype": "float32"}
        path.write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="module")
def wide_corpus(tmp_path_factory, tiny_tokenizer):
    """A dataset whose tokenizer has as many entries as theirs; the added ones never occur."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(tiny_tokenizer, folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"unused {i}": i for i in range(320, VOCABULARY)}
    path.write_text(json.dumps(content))
    return make_corpus(folder, folder / "tokenizer")


@pytest.mark.ranks
@pytest.mark.parametrize("name", list(SHAPES))
def test_from_hf_modernbert_keeps_bits_and_trains(pool, folder_of, wide_corpus, tmp_path, capsys, name):
    theirs, size = folder_of(name), SHAPES[name][3]
    status, _, err = command(capsys, "from-hf", theirs, tmp_path / "ours", "--json")
    assert status == 0, err
    model = read_config(tmp_path / "ours")["model"]
    assert (model["global_rope_theta"], model["local_rope_theta"]) == (160_000, 10_000)
    assert (model["encoder_window"], model["global_attention_every"], model["vocab_size"]) == (64, 3, VOCABULARY)
    assert command(capsys, "to-hf", tmp_path / "ours", tmp_path / "again", "--no-verify")[0] == 0
    assert same_bits(tensors(theirs), tensors(tmp_path / "again"))
    assert torch.equal(logits(load(theirs, "mlm"), 200), logits(load(tmp_path / "again", "mlm"), 200))
    words = ["train", "--size", size, "--objective", "mlm", "--phase", "decay", "--run-dir", str(tmp_path / "run")]
    words += ["--init-from", str(tmp_path / "ours"), *WORDS, f"data.mixture={wide_corpus}"]
    words += ["model.local_rope_theta=10000"]
    (result,) = pool.run(1, words, timeout_seconds=300)
    assert result.status == 0, result.output[-2000:]
    assert len(read(tmp_path / "run").metrics) == 2
    assert read_config(latest(tmp_path / "run"))["model"]["local_rope_theta"] == 10_000
