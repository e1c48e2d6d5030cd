"""transformers -> checkpoint -> transformers: the same bits, the same logits, by the command line."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_ettin.checkpoint.directory import read_config, read_progress
from megatron_ettin.checkpoint.integrity import verify
from megatron_ettin.checkpoint.reader import CheckpointReader
from megatron_ettin.convert.from_hf import from_hf
from megatron_ettin.convert.to_hf import ExportOptions, to_hf
from megatron_ettin.convert.verify import ParityError
from megatron_ettin.data.tokenizer import load_tokenizer
from tests.convert import folders
from tests.convert.folders import SHAPE_17M, command, load, logits, make_folder, same_bits, tensors

BOTH = pytest.mark.parametrize("objective", ["mlm", "clm"])


def imported(tmp_path, objective, **keywords):
    folder = make_folder(tmp_path / "theirs", objective, **keywords)
    from_hf(folder, tmp_path / "checkpoint")
    return folder, tmp_path / "checkpoint"


@BOTH
def test_round_trip_keeps_bits_and_logits(tmp_path, capsys, objective):
    theirs = make_folder(tmp_path / "theirs", objective)
    assert command(capsys, "from-hf", theirs, tmp_path / "checkpoint")[0] == 0
    status, out, _ = command(capsys, "to-hf", tmp_path / "checkpoint", tmp_path / "again", "--verify", "--json")
    assert status == 0
    assert same_bits(tensors(theirs), tensors(tmp_path / "again"))
    assert torch.equal(logits(load(theirs, objective)), logits(load(tmp_path / "again", objective)))
    parity = json.loads(out)["parity"]
    assert parity == json.loads((tmp_path / "again" / "parity.json").read_text())
    assert parity["tensors_identical"]
    assert parity["argmax_equal"]
    assert 0 < parity["max_abs_logit_difference"] < 1e-4
    assert parity["tokens"] > 2 * 16
    back = from_hf(tmp_path / "again", tmp_path / "checkpoint2")
    assert back["objective"] == objective
    first, second = CheckpointReader(tmp_path / "checkpoint"), CheckpointReader(tmp_path / "checkpoint2")
    assert first.keys() == second.keys()
    assert all(torch.equal(first.read(key), second.read(key)) for key in first.keys())  # noqa: SIM118


@pytest.mark.parametrize("objective", ["clm", pytest.param("mlm", marks=pytest.mark.full)])
def test_round_trip_of_17m_shape_keeps_bits_and_logits(tmp_path, objective):
    theirs, checkpoint = imported(tmp_path, objective, shape=SHAPE_17M)
    result = to_hf(checkpoint, tmp_path / "again")
    assert result["files"] == ["model.safetensors"]
    assert same_bits(tensors(theirs), tensors(tmp_path / "again"))
    assert torch.equal(logits(load(theirs, objective), 150), logits(load(tmp_path / "again", objective), 150))
    assert read_config(checkpoint)["run"] == read_config(checkpoint)["run"] | {"size": "17m", "objective": objective}
    assert "16,913,600" in (tmp_path / "again" / "README.md").read_text()


@BOTH
def test_round_trip_with_shards_keeps_bits_and_logits(tmp_path, objective):
    theirs, checkpoint = imported(tmp_path, objective)
    result = to_hf(checkpoint, tmp_path / "again", ExportOptions(max_shard_bytes=50_000))
    assert len(result["files"]) > 3
    assert all((tmp_path / "again" / name).stat().st_size < 90_000 for name in result["files"])
    assert same_bits(tensors(theirs), tensors(tmp_path / "again"))
    assert torch.equal(logits(load(theirs, objective)), logits(load(tmp_path / "again", objective)))
    from_hf(tmp_path / "again", tmp_path / "checkpoint2")
    verify(tmp_path / "checkpoint2")


@BOTH
def test_round_trip_in_bfloat16_keeps_bits(tmp_path, capsys, objective):
    theirs, checkpoint = imported(tmp_path, objective, dtype=torch.bfloat16)
    reader = CheckpointReader(checkpoint)
    assert {reader.dtype(key) for key in reader.keys()} == {torch.float32}  # noqa: SIM118
    status, out, _ = command(
        capsys, "to-hf", checkpoint, tmp_path / "again", "--dtype", "bfloat16", "--verify", "--json"
    )
    assert status == 0
    assert json.loads(out)["parity"]["max_abs_logit_difference"] < 1e-4
    assert same_bits(tensors(theirs), tensors(tmp_path / "again"))
    assert load(tmp_path / "again", objective, "auto").dtype == torch.bfloat16
    assert [path.name for path in tmp_path.glob(".tmp*")] == []


def test_to_hf_bfloat16_rounds_the_stored_weights(tmp_path, capsys):
    theirs, checkpoint = imported(tmp_path, "clm")
    status, out, _ = command(
        capsys, "to-hf", checkpoint, tmp_path / "again", "--dtype", "bfloat16", "--verify", "--json"
    )
    assert status == 0
    assert json.loads(out)["parity"]["max_abs_logit_difference"] < 1e-4
    rounded = {name: tensor.bfloat16() for name, tensor in tensors(theirs).items()}
    assert same_bits(rounded, tensors(tmp_path / "again"))


def test_from_hf_checkpoint_records_config_and_step_0(tmp_path, capsys):
    theirs = make_folder(tmp_path / "theirs", "mlm")
    status, out, _ = command(capsys, "from-hf", theirs, tmp_path / "checkpoint")
    assert status == 0
    assert "fresh optimizer" in out
    assert "no tokenizer" in out
    verify(tmp_path / "checkpoint")
    assert read_progress(tmp_path / "checkpoint") == {
        "step": 0,
        "tokens": 0,
        "special_ids": {"cls": 1, "sep": 2, "pad": 3},
    }
    config = read_config(tmp_path / "checkpoint")
    assert config["run"]["objective"] == "mlm"
    assert config["model"]["encoder_window"] == 8
    assert config["model"]["global_rope_theta"] == 20_000
    assert config["model"]["local_rope_theta"] == 500


@BOTH
def test_from_hf_tied_output_stored_twice_is_accepted(tmp_path, objective):
    from safetensors.torch import save_file

    theirs = make_folder(tmp_path / "theirs", objective)
    held = tensors(theirs)
    twice = held | {"decoder.weight": held["model.embeddings.tok_embeddings.weight"].clone()}
    save_file(twice, theirs / "model.safetensors", {"format": "pt"})
    from_hf(theirs, tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "again")
    assert same_bits(held, tensors(tmp_path / "again"))


def test_round_trip_with_tokenizer_keeps_ids_and_runs_tasks(tmp_path, tiny_tokenizer):
    import shutil

    from transformers import AutoTokenizer, pipeline

    for objective in ("mlm", "clm"):
        room = tmp_path / objective
        theirs = make_folder(room / "theirs", objective)
        shutil.copytree(tiny_tokenizer, theirs, dirs_exist_ok=True)
        from_hf(theirs, room / "checkpoint")
        assert to_hf(room / "checkpoint", room / "again")["tokenizer"]
        tokenizer = AutoTokenizer.from_pretrained(room / "again")
        text = "the reader follows the next word."
        ids = AutoTokenizer.from_pretrained(tiny_tokenizer)(text)["input_ids"]
        # a decoder's tokenizer adds no [SEP], because a prompt is to be continued
        assert tokenizer(text)["input_ids"] == (ids if objective == "mlm" else ids[:-1])
        assert tokenizer.padding_side == {"mlm": "right", "clm": "left"}[objective]
        from_hf(room / "again", room / "back")
        theirs = {load_tokenizer(folder).fingerprint for folder in (room / "back" / "tokenizer", tiny_tokenizer)}
        assert len(theirs) == 1  # the imported tokenizer matches the dataset's
        config = json.loads((room / "again" / "config.json").read_text())
        assert [config[f"{name}_token_id"] for name in ("cls", "sep", "pad", "bos", "eos")] == [1, 2, 3, 1, 2]
        if objective == "mlm":
            answers = pipeline("fill-mask", str(room / "again"))("the reader [MASK] the next word.")
            assert len(answers) == 5
            assert sum(answer["score"] for answer in answers) <= 1
        else:
            model = load(room / "again", "clm")
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            # more tokens than the window of eight keys, to detect a cache that keeps too few
            cached = model.generate(ids, max_new_tokens=10, do_sample=False)
            plain = model.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False)
            assert torch.equal(cached, plain)
            assert cached.shape[1] > ids.shape[1]


def test_to_hf_verify_different_logits_are_refused(tmp_path, capsys, monkeypatch):
    _, checkpoint = imported(tmp_path, "mlm")

    def wrong(path, lists, objective):
        return [torch.zeros(len(ids), 320) for ids in lists]

    with pytest.raises(ParityError, match="logits differ"):
        to_hf(checkpoint, tmp_path / "again", ExportOptions(verify=True, our_logits=wrong))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "theirs"]
    nans = [torch.full((2 * 8 + 37, 320), float("nan")), torch.zeros(17, 320), torch.zeros(4, 320)]
    with pytest.raises(ParityError, match="by nan"):
        to_hf(
            checkpoint, tmp_path / "again", ExportOptions(verify=True, our_logits=lambda path, lists, objective: nans)
        )
    monkeypatch.setattr("megatron_ettin.evaluate.inference.logits_of", wrong)
    with pytest.raises(SystemExit, match="logits differ"):
        command(capsys, "to-hf", checkpoint, tmp_path / "again", "--verify")


def test_compare_tensors_one_flipped_bit_is_refused(tmp_path):
    from megatron_ettin.convert.source import SourceCheckpoint
    from megatron_ettin.convert.verify import compare_tensors

    _, checkpoint = imported(tmp_path, "clm")
    to_hf(checkpoint, tmp_path / "again")
    source = SourceCheckpoint(checkpoint)
    assert compare_tensors(source, tmp_path / "again", torch.float32) == len(tensors(tmp_path / "again"))
    file = tmp_path / "again" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ParityError, match=r"decoder\.bias"):
        compare_tensors(source, tmp_path / "again", torch.float32)


def test_tiny_model_logits_change_with_each_conversion_mistake(tmp_path):
    """Swapped GLU halves, a wrong order of heads, a wrong norm or bias each change the logits of the tests' models."""
    model = folders.make_model("mlm")
    before = logits(model)
    layer = model.model.layers[1]
    half = layer.mlp.Wi.weight.shape[0] // 2
    changes = {
        "halves": (layer.mlp.Wi.weight, lambda w: torch.cat([w[half:], w[:half]])),
        "heads": (layer.attn.Wqkv.weight, lambda w: w.view(3, 4, 16, 64).transpose(0, 1).reshape(192, 64)),
        "norm": (layer.attn_norm.weight, torch.ones_like),
        "bias": (model.decoder.bias, torch.zeros_like),
    }
    for name, (weight, change) in changes.items():
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(change(kept))
        assert (logits(model) - before).abs().max() > 1e-2, name
        with torch.no_grad():
            weight.copy_(kept)
