"""`ettin launch` without a cluster: its refusals, its warnings, its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from tests.launch.scripts import CALL, ONE_NODE

REFUSED = [
    (["--nodes", "1"], CALL, "--gpus-per-node: say how many, or 0 with --tasks-per-node"),
    (["--nodes", "1", "--gpus-per-node", "1", "--cpus-per-task", "0"], CALL, "--cpus-per-task 0: must be at least 1"),
    ([*ONE_NODE, "--margin-seconds", "0"], CALL, "--margin-seconds 0: must be at least 1"),
    (["--nodes", "0", "--gpus-per-node", "1"], CALL, "--nodes 0: must be at least 1"),
    (["--nodes", "1", "--gpus-per-node", "0"], CALL, "--tasks-per-node 0: must be at least 1"),
    (["--nodes", "1", "--gpus-per-node", "1"], CALL, "--cpus-per-task: say how many cores each rank gets"),
    (ONE_NODE, CALL, "data.mixture: corpus: no dataset exists there; --allow-unseen-data"),
    (ONE_NODE, [*CALL, "data.order=none.npy"], "no dataset exists there"),
    ([*ONE_NODE, "--time", "soon"], CALL, "--time soon: write minutes"),
    ([*ONE_NODE], ["eval", "x"], "must be train or bench and its options, found 'eval'"),
    ([*ONE_NODE], [*CALL, "model.nun_layers=3"], "num_layers"),
    (
        ["--nodes", "1", "--gpus-per-node", "7", "--cpus-per-task", "1"],
        [*CALL, "parallel.tp=2"],
        "= 2 does not divide 7 ranks",
    ),
    ([*ONE_NODE], [*CALL, "--dry-run"], "--dry-run: not possible in a job"),
    ([*ONE_NODE, "--suite"], CALL, "--objective: the sweep sets it"),
    ([*ONE_NODE, "--container", "x"], CALL, "--container: the profile sets neither"),
    ([*ONE_NODE, "--env-file", "none"], CALL, "--env-file none: no such file"),
    ([*ONE_NODE, "--after", "afterok:1"], CALL, "--after: needs --submit"),
    (["--nodes", "1", "--profile", "none.yaml"], CALL, "--profile none.yaml: No such file"),
]


def test_launch_corpus_of_another_vocabulary_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [*CALL[:-1], f"data.mixture={corpus}", "--run-dir", str(tmp_path / "run")]
    assert main(["launch", *ONE_NODE, "--allow-unseen-data", "--", *call]) == 2
    errors = capsys.readouterr().err
    assert "with a tokenizer of 320 entries, but model.vocab_size is 50,368; set model.vocab_size=320 or" in errors


def test_launch_dry_run_warns_of_data_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *ONE_NODE, "--dry-run", "--", *CALL, "data.validation=held"]) == 0
    warned = capsys.readouterr().err.splitlines()
    assert warned == [
        "warning: data.mixture: corpus: no dataset exists there",
        "warning: data.validation: held: no dataset exists there",
    ]


@pytest.mark.parametrize(("options", "call", "expected"), REFUSED)
def test_launch_refusal_is_one_line_and_leaves_no_files(
    tmp_path: Path, options: list[str], call: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *options, "--", *call, "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ettin launch: ")
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_launch_json_lists_folder_and_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert main(["launch", *ONE_NODE, "--allow-unseen-data", "--json", "--", *CALL, "--run-dir", str(run_dir)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {
        "folder": str(run_dir / "slurm"),
        "jobs": [{"script": str(run_dir / "slurm" / "17m-mlm-pretrain.sbatch"), "job": None}],
    }
