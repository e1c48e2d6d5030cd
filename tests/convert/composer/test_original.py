"""Files that the original trainer's code wrote under Composer: our model computes the same logits as theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ettin.evaluate.inference import logits_of
from tests.convert.folders import command, load

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "composer"


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_from_composer_logits_equal_original_code(tmp_path, capsys, objective):
    ours, theirs, expected = tmp_path / "ours", tmp_path / "theirs", load_file(FILES / f"{objective}.safetensors")
    status, out, err = command(capsys, "from-composer", FILES / f"{objective}.pt", ours, "--json")
    assert status == 0, err
    assert json.loads(out)["objective"] == objective
    (logits,) = logits_of(ours, [expected["ids"].tolist()])
    assert (torch.as_tensor(logits) - expected["logits"]).abs().max() < 1e-5
    assert (ours / "tokenizer" / "tokenizer.json").is_file()
    assert command(capsys, "to-hf", ours, theirs)[0] == 0
    model = load(theirs, objective)
    with torch.no_grad():
        exported = model(input_ids=expected["ids"][None]).logits[0]
    assert (exported - expected["logits"]).abs().max() < 1e-5
    assert model.config.sliding_window == (8 if objective == "mlm" else 9)


def test_to_hf_decoder_with_one_key_less_changes_logits(tmp_path, capsys):
    """With a window of 8 keys, transformers' default, the logits differ, so the fixture does test a window of 9."""
    expected = load_file(FILES / "clm.safetensors")
    assert command(capsys, "from-composer", FILES / "clm.pt", tmp_path / "ours")[0] == 0
    assert command(capsys, "to-hf", tmp_path / "ours", tmp_path / "theirs", "--no-verify")[0] == 0
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 8}))
    with torch.no_grad():
        narrow = load(tmp_path / "theirs", "clm")(input_ids=expected["ids"][None]).logits[0]
    assert (narrow - expected["logits"]).abs().max() > 1e-3
