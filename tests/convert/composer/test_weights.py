"""A trainer's file -> our checkpoint -> transformers: tensors and logits equal those of the model in the file."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from megatron_ettin.checkpoint.directory import read_config, read_progress
from megatron_ettin.convert.composer import from_composer
from megatron_ettin.convert.composer.importing import NO_TOKENIZER
from tests.convert.composer.trainer_files import CONFIG, composer_state, reference, trainer_file, trainer_names
from tests.convert.folders import command, load, logits, tensors
from tests.train.runs import train


def exported(capsys, tmp_path, objective, *arguments):
    """Run `from-composer` and `to-hf` with verification; return the import's result and transformers' model."""
    status, out, err = command(capsys, "from-composer", tmp_path / "file.pt", tmp_path / "ours", "--json", *arguments)
    assert status == 0, err
    assert command(capsys, "to-hf", tmp_path / "ours", tmp_path / "theirs")[0] == 0
    return json.loads(out), load(tmp_path / "theirs", objective)


def assert_equal(model, exported_model, folder):
    expected = {name: t for name, t in model.state_dict().items() if name != "decoder.weight"}
    held = tensors(folder)
    assert expected.keys() == held.keys()
    assert all(torch.equal(tensor, held[name]) for name, tensor in expected.items())
    assert torch.equal(logits(model), logits(exported_model))


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_from_composer_keeps_weights_and_logits(tmp_path, capsys, objective):
    model = trainer_file(tmp_path / "file.pt", objective)
    result, exported_model = exported(capsys, tmp_path, objective)
    assert_equal(model, exported_model, tmp_path / "theirs")
    assert result["objective"] == objective
    assert result["tensors"] == 4 * 6 - 1 + 6
    config = read_config(tmp_path / "ours")["model"]
    assert config["decoder_window_keys"] == 9
    assert config["encoder_window"] == 8
    assert config["global_rope_theta"] == 20_000
    assert config["local_rope_theta"] == 500
    assert read_progress(tmp_path / "ours")["step"] == 0
    assert any("batch 5,996" in note and "token 17,000,000,000" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("prefix", "location"),
    [
        ("model.", ("state", "model")),
        ("module.model.", ("model",)),
        ("", ("state_dict",)),
        ("_orig_mod.model.", ()),
        ("model._orig_mod.", ("model_state_dict",)),
    ],
)
def test_from_composer_state_dict_prefixes_and_locations_are_recognized(tmp_path, prefix, location):
    named = trainer_names(reference("clm"), "clm")
    tree = {name.replace("model.", prefix, 1): tensor for name, tensor in named.items()}
    for key in reversed(location):
        tree = {key: tree}
    torch.save(tree, tmp_path / "file.pt")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"name": "flex_gpt", "model_config": CONFIG}}))
    result = from_composer(tmp_path / "file.pt", tmp_path / "ours", tmp_path / "run.yaml")
    assert result["objective"] == "clm"
    assert result["tensors"] == 29


def test_from_composer_decoder_with_separate_qkv_keeps_weights_and_logits(tmp_path, capsys):
    """Import a file with the names of transformers' decoder, which keeps q, k and v apart."""
    model = reference("clm")
    torch.save(model.state_dict(), tmp_path / "file.pt")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"name": "flex_gpt", "model_config": CONFIG}}))
    _, exported_model = exported(capsys, tmp_path, "clm", "--config", tmp_path / "run.yaml")
    assert_equal(model, exported_model, tmp_path / "theirs")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_composer_half_precision_is_widened(tmp_path, capsys, dtype):
    model = reference("mlm")
    for weight in model.parameters():
        weight.data = weight.data.to(dtype).float()
    named = {name: tensor.to(dtype) for name, tensor in trainer_names(model, "mlm").items()}
    torch.save(composer_state(named, "mlm"), tmp_path / "file.pt")
    _, exported_model = exported(capsys, tmp_path, "mlm")
    assert_equal(model, exported_model, tmp_path / "theirs")


def test_from_composer_views_of_shared_storage_keep_weights_and_logits(tmp_path, capsys):
    """Follow strides and offsets: all tensors are views of one storage, and one of them is transposed."""
    model = reference("mlm")
    named = trainer_names(model, "mlm")
    flat, offset = torch.cat([tensor.reshape(-1) for tensor in named.values()]), 0
    for name, tensor in named.items():
        named[name] = flat[offset : offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()
    named["model.head.dense.weight"] = named["model.head.dense.weight"].T.contiguous().T
    torch.save(composer_state(named, "mlm"), tmp_path / "file.pt")
    _, exported_model = exported(capsys, tmp_path, "mlm")
    assert_equal(model, exported_model, tmp_path / "theirs")


def test_from_composer_missing_output_bias_becomes_zero(tmp_path, capsys):
    model = reference("mlm")
    torch.nn.init.zeros_(model.decoder.bias)
    named = trainer_names(model, "mlm")
    del named["model.decoder.bias"]
    torch.save(composer_state(named, "mlm"), tmp_path / "file.pt")
    result, exported_model = exported(capsys, tmp_path, "mlm")
    assert_equal(model, exported_model, tmp_path / "theirs")
    assert any("no decoder.bias" in note for note in result["notes"])


def test_from_composer_recorded_tokenizer_is_imported(tmp_path, tiny_tokenizer):
    tree = composer_state(trainer_names(reference("mlm"), "mlm"), "mlm")
    files = {path.name: json.loads(path.read_text()) for path in sorted(tiny_tokenizer.glob("*.json"))}
    recorded = {name: {"file_extension": ".json", "content": content} for name, content in files.items()}
    tree["state"]["integrations"]["huggingface"]["tokenizer"] = recorded
    torch.save(tree, tmp_path / "file.pt")
    result = from_composer(tmp_path / "file.pt", tmp_path / "ours")
    assert NO_TOKENIZER not in result["notes"]
    assert json.loads((tmp_path / "ours" / "tokenizer" / "tokenizer.json").read_text()) == files["tokenizer.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pt", "ours"]
    assert not list((tmp_path / "ours").glob(".recorded*"))


def test_from_composer_same_file_twice_writes_same_bytes(tmp_path):
    trainer_file(tmp_path / "file.pt", "clm")
    for name in ("a", "b"):
        from_composer(tmp_path / "file.pt", tmp_path / name)
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "ab"]
    assert files[0] == files[1]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files[0])


@pytest.mark.ranks
def test_train_from_composer_import_on_two_ranks_lowers_loss(pool, corpus, tmp_path):
    trainer_file(tmp_path / "file.pt", "clm")
    from_composer(tmp_path / "file.pt", tmp_path / "ours")
    arguments = ["parallel.tp=2", "run.steps=8", "model.global_rope_theta=20000", "model.local_rope_theta=500"]
    arguments += ["model.decoder_window_keys=9", "model.attention_output_dropout=0"]
    options = ["--init-from", str(tmp_path / "ours")]
    losses = train(pool, 2, tmp_path / "run", corpus, "clm", arguments, options).column("loss")
    assert len(losses) == 8
    assert losses[7] < losses[0] - 1
