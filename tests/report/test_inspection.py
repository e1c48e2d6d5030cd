"""`ettin inspect` of checkpoints and runs: its output and its refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import checkpoints_folder, new_staging, publish, step_name
from megatron_ettin.checkpoint.weights_writer import write_weights
from megatron_ettin.cli.main import main
from megatron_ettin.config.recipe import recipe
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.report.inspection import describe


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a run directory with two checkpoints, one with optimizer state, and a torn last line of metrics."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = recipe("17m", "clm", "pretrain")
    for step in (10, 20):
        staging = new_staging(checkpoints_folder(folder), step)
        tensors = [("head.norm.weight", torch.ones(8)), ("output_layer.bias", torch.zeros(4, 3))]
        tensors += [("optimizer.state.exp_avg.output_layer.bias", torch.zeros(4, 3))] * (step == 20)
        write_weights(staging, tensors, {"progress": {}})
        (staging / "progress.json").write_text(json.dumps({"step": step, "tokens": step * 1000}))
        (staging / "config.yaml").write_text(to_yaml(dataclasses.replace(config)))
        publish(staging, checkpoints_folder(folder) / step_name(step))
    (folder / "config.yaml").write_text(to_yaml(config))
    lines = [{"step": step, "tokens": step * 1000, "loss": 5 - step / 10, "lr": 1e-3} for step in range(1, 24)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 24, "lo')
    return folder


@pytest.fixture
def run(written, tmp_path):
    """Return a copy that a test may change."""
    return shutil.copytree(written, tmp_path / "run", symlinks=True)


def test_inspect_checkpoint_reports_contents_and_verifies(run, capsys):
    path = checkpoints_folder(run) / step_name(20)
    description = describe(path, verify=True)
    assert (description["kind"], description["step"], description["tokens"], description["verified"]) == (
        "checkpoint",
        20,
        20_000,
        True,
    )
    assert (description["size"], description["objective"], description["phase"]) == ("17m", "clm", "pretrain")
    assert description["parameters"] == 20
    assert description["dtypes"] == ["float32"]
    assert description["tensors"] == {"head.norm.weight": [8], "output_layer.bias": [4, 3]}
    assert description["optimizer"]
    assert description["optimizer_tensors"] == 1
    assert not description["tokenizer"]
    assert description["bytes"] == sum(file.stat().st_size for file in path.iterdir() if file.name != "integrity.json")
    assert not describe(checkpoints_folder(run) / step_name(10))["optimizer"]
    assert main(["inspect", str(path), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "17m clm pretrain" in text
    assert "20 (20K tokens)" in text
    assert "all good" in text
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == description | {"verified": False}


def test_inspect_run_reports_progress_and_checkpoints(run, capsys):
    description = describe(run)
    assert (description["kind"], description["step"], description["seed"]) == ("run", 23, 21)
    assert description["loss"] == pytest.approx(2.7)
    assert description["checkpoints"] == [step_name(10), step_name(20)]
    assert description["config"]["num_layers"] == 7
    assert description["config"]["tp"] == 1
    assert main(["inspect", str(run)]) == 0
    text = capsys.readouterr().out
    assert "loss 2.7000" in text
    assert step_name(20) in text
    assert "--verify" in text


def test_inspect_run_without_metrics_says_none_recorded(run, capsys):
    (run / "metrics.jsonl").unlink()
    assert main(["inspect", str(run)]) == 0
    assert "none recorded yet" in capsys.readouterr().out
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "loss": null}\n{"step": 1, "eval_loss": 3}\n')
    assert main(["inspect", str(run)]) == 0
    assert "not finite" in capsys.readouterr().out


def test_inspect_run_leaves_out_values_that_are_no_numbers(run, capsys):
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "loss": "low"}\n{"step": 2, "tokens": "many"}\n')
    assert main(["inspect", str(run)]) == 0
    assert "1 (9 tokens), loss not finite" in capsys.readouterr().out


def test_inspect_damaged_checkpoint_is_named(run, capsys):
    path = checkpoints_folder(run) / step_name(10) / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    for target in (run, path.parent):
        assert main(["inspect", str(target)]) == 0
        assert main(["inspect", str(target), "--verify"]) == 2
        assert f"{path}: sha256" in capsys.readouterr().err
    (path.parent / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert main(["inspect", str(path.parent)]) == 2
    assert "os.system" in capsys.readouterr().err


def test_describe_path_without_run_or_checkpoint_is_refused(tmp_path):
    for path, output in ((tmp_path / "no", "no such"), (tmp_path, "neither")):
        with pytest.raises(UserError, match=output):
            describe(path)


def test_inspect_file_is_refused_as_a_file(tmp_path, capsys):
    (tmp_path / "a.jsonl").touch()
    assert main(["inspect", str(tmp_path / "a.jsonl")]) == 2
    assert "a.jsonl: is a file; give a dataset, checkpoint or run directory" in capsys.readouterr().err
