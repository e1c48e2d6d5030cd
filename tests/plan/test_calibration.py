"""Constants of the step model, fitted to published runs and to files of measured runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.cli.main import main
from megatron_ettin.plan import calibration
from megatron_ettin.plan.hardware import find_gpu
from megatron_ettin.plan.step_time import PUBLISHED


def test_published_constants_are_the_fit_of_all_six_sizes() -> None:
    runs = calibration.published_runs()
    assert [run.config.run.size for run in runs] == ["17m", "32m", "68m", "150m", "400m", "1b"]
    constants = calibration.fit_constants(runs)
    assert constants.operations == pytest.approx(PUBLISHED.operations, rel=0.01)
    assert constants.token_layer_seconds == pytest.approx(PUBLISHED.token_layer_seconds, rel=0.01)
    assert constants.micro_batch_seconds == pytest.approx(PUBLISHED.micro_batch_seconds, rel=0.01)
    errors = [row["error_percent"] for row in calibration.prediction_errors(runs, PUBLISHED)]
    assert max(map(abs, errors)) < 3.2, errors


def test_calibration_on_five_sizes_predicts_the_sixth() -> None:
    runs = calibration.published_runs()
    for left_out in runs:
        constants = calibration.fit_constants([run for run in runs if run != left_out])
        (row,) = calibration.prediction_errors([left_out], constants)
        assert abs(row["error_percent"]) < 10, row


def test_plan_prints_residuals_of_all_published_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--size", "17m", "--gpus", "8", "--top", "1"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("17m mlm pretrain on 8 GPUs: h100-sxm, 989")
    assert output[0].endswith("predicted, not measured")
    lines = [line for line in output if line.startswith("calibration: ")]
    assert [line.split()[1] for line in lines] == ["17m", "32m", "68m", "150m", "400m", "1b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"size": "1b", "gpus": 4}, "run 1: needs the keys size, gpus, tokens_per_second_per_gpu"),
        ({"size": "1b", "gpus": 4, "tokens_per_second_per_gpu": 0}, "0 is not a number above 0"),
        (
            {"size": "1b", "gpus": 4, "tokens_per_second_per_gpu": 9, "tps": 1},
            "'tps' is not a key; the keys are size, gpus",
        ),
        ({"size": "9b", "gpus": 4, "tokens_per_second_per_gpu": 9}, "run 1: size '9b' does not exist"),
        ({"size": 1, "gpus": 4, "tokens_per_second_per_gpu": 9}, "run 1: size: 1 is not a name"),
        ({"size": "1b", "gpus": 0, "tokens_per_second_per_gpu": 9}, "run 1: gpus: 0 is not a number above 0"),
        ({"size": "1b", "gpus": 4.5, "tokens_per_second_per_gpu": 9}, "run 1: gpus: 4.5 is not a whole number"),
        ({"size": "1b", "gpus": 4, "tokens_per_second_per_gpu": float("inf")}, "inf is not a number above 0"),
        ({"size": "1b", "gpus": 4, "tokens_per_second_per_gpu": 9, "words": [1]}, "is not a list of key=value"),
        ({"state": "done", "size": "1b"}, "run 1: is not a complete line of `ettin bench`: it has no objective"),
    ],
)
def test_read_runs_malformed_line_is_refused(tmp_path: Path, line: dict, message: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message):
        calibration.read_runs(path, find_gpu("h100"))
