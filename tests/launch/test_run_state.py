"""Jobs in SLURM's queue, and the output of `ettin status` for jobs and for runs without a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.launch.run_state import covers
from tests.launch.cluster import Cluster
from tests.launch.jobs import ETTIN, PATH
from tests.report.synthetic import write_run


def test_status_of_unknown_job_or_run_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    for what, expected in (
        ("999999", "SLURM does not know it"),
        ("nothing", "no such folder"),
        (tmp_path, "no run in it"),
    ):
        done = slurm.call(ETTIN, "status", what, PATH=PATH)
        assert done.returncode == 2
        assert expected in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert "no squeue answers" in slurm.call(ETTIN, "status", PATH=str(Path(ETTIN).parent)).stderr


@pytest.mark.parametrize(
    ("job", "task", "is_covered"),
    [
        ("7", "7", True),
        ("7_[2-5%1]", "7_3", True),
        ("7_2-5,9%2", "7_9", True),
        ("7_3", "7_4", False),
        ("7", None, False),
    ],
)
def test_covers_array_job_matches_its_tasks(job: str, task: str | None, is_covered: bool) -> None:
    assert covers(job, task) is is_covered


def test_status_model_of_unpublished_shape_is_not_named_by_size(tmp_path, capsys):
    overrides = ("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.vocab_size=2048")
    write_run(tmp_path / "run", overrides=overrides)
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert [row["model"] for row in json.loads(capsys.readouterr().out)] == ["207K mlm pretrain"]


def test_status_ignores_events_without_job(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    event = {"event": "submitted", "runs": [str(run)], "time": 1.0}
    (tmp_path / "slurm").mkdir()
    lines = [{**event, "job": "7"}, event, {**event, "job": 5}]
    (tmp_path / "slurm" / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["status", str(run), "--json"]) == 0
    assert [row["job"] for row in json.loads(capsys.readouterr().out)] == ["7"]
