"""A checkpoint that training wrote, on several ranks, with its optimizer and its tokenizer."""

from __future__ import annotations

import json

import pytest

from tests.convert.folders import command
from tests.train.runs import train

LAYOUT = ["parallel.tp=2", "parallel.pp=2", "run.steps=2"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("objective", "precision"), [("clm", "bf16"), pytest.param("mlm", "fp32", marks=pytest.mark.full)]
)
def test_to_hf_of_sharded_training_checkpoint_verifies_and_round_trips(
    pool, corpus, tmp_path, capsys, objective, precision
):
    words = [*LAYOUT, f"precision.name={precision}"]
    train(pool, 4, tmp_path / "run", corpus, objective, words)
    status, out, err = command(capsys, "to-hf", tmp_path / "run", tmp_path / "out", "--verify", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["step"] == 2
    assert result["tokenizer"]
    assert result["parity"]["tensors_identical"]
    assert result["parity"]["max_abs_logit_difference"] < 1e-4
    assert command(capsys, "from-hf", tmp_path / "out", tmp_path / "back")[0] == 0
    status, out, err = command(capsys, "to-hf", tmp_path / "back", tmp_path / "again", "--verify", "--json")
    assert status == 0, err
    a, b = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert a.read_bytes() == b.read_bytes()
