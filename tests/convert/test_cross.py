"""Encoders made from decoders and the reverse, from folders and from checkpoints: same weights under the other
names."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_ettin import api
from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import read_config
from tests.convert.folders import command, load, make_folder, same_bits, tensors

OTHER = {"mlm": "clm", "clm": "mlm"}


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_convert_to_other_objective_and_back_keeps_bits(tmp_path, capsys, objective, way):
    theirs = make_folder(tmp_path / "theirs", objective)
    options = {way: ["--objective", OTHER[objective]]}
    assert command(capsys, "from-hf", theirs, tmp_path / "checkpoint", *options.get("from-hf", []))[0] == 0
    trained = read_config(tmp_path / "checkpoint")["run"]["objective"]
    assert trained == (OTHER[objective] if way == "from-hf" else objective)
    arguments = ["to-hf", tmp_path / "checkpoint", tmp_path / "other", "--json", *options.get("to-hf", [])]
    status, out, err = command(capsys, *arguments)
    assert status == 0, err
    answer = json.loads(out)
    assert answer["objective"] == OTHER[objective]
    assert answer["parity"]["max_abs_logit_difference"] < 1e-4
    check_names(tensors(theirs), tensors(tmp_path / "other"), objective)
    assert load(tmp_path / "other", OTHER[objective]).config.sliding_window == 8
    assert command(capsys, "from-hf", tmp_path / "other", tmp_path / "back", "--objective", objective)[0] == 0
    assert command(capsys, "to-hf", tmp_path / "back", tmp_path / "again", "--no-verify")[0] == 0
    assert same_bits(tensors(theirs), tensors(tmp_path / "again"))


def check_names(theirs: dict[str, torch.Tensor], other: dict[str, torch.Tensor], objective: str) -> None:
    """Compare tensors of both classes by a mapping of names that is written here by hand."""
    encoder, decoder = (theirs, other) if objective == "mlm" else (other, theirs)
    for i in range(4):
        fused = encoder.pop(f"model.layers.{i}.attn.Wqkv.weight")
        apart = [decoder.pop(f"model.layers.{i}.attn.{letter}_proj.weight") for letter in "qkv"]
        assert torch.equal(fused, torch.cat(apart))
    for part in ("dense", "norm"):
        assert torch.equal(encoder.pop(f"head.{part}.weight"), decoder.pop(f"lm_head.{part}.weight"))
    assert same_bits(encoder, decoder)


def test_to_hf_card_of_decoder_exported_as_encoder_names_shifted_prediction(tmp_path, capsys):
    """An encoder made from a decoder predicts the next position until it is trained, and its card says so."""
    make_folder(tmp_path / "theirs", "clm")
    command(capsys, "from-hf", tmp_path / "theirs", tmp_path / "checkpoint")
    for objective, message in (("mlm", "masked next-token prediction"), (None, None)):
        out = tmp_path / f"out-{objective}"
        arguments = ["to-hf", tmp_path / "checkpoint", out, "--no-verify"]
        assert command(capsys, *arguments, *(["--objective", objective] if objective else []))[0] == 0
        card = " ".join((out / "README.md").read_text().split())
        assert ("masked next-token prediction" in card) == (message is not None)


def test_convert_unknown_objective_is_refused(tmp_path, capsys):
    make_folder(tmp_path / "theirs", "clm")
    for way, source in (("from-hf", "theirs"), ("to-hf", "checkpoint")):
        status, _, err = command(capsys, way, tmp_path / source, tmp_path / "out", "--objective", "sft")
        assert (status, "argument --objective: 'sft' does not exist; it is one of mlm, clm" in err) == (2, True)
        assert not (tmp_path / "out").exists()
        assert command(capsys, "from-hf", tmp_path / "theirs", tmp_path / "checkpoint")[0] == 0 or way == "to-hf"
    for convert, source in ((api.from_hf, "theirs"), (api.to_hf, "checkpoint")):
        with pytest.raises(UserError, match=r"^--objective: 'sft'; allowed: mlm, clm$"):
            convert(tmp_path / source, tmp_path / "out", objective="sft")
