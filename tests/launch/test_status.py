"""`ettin status` of runs that no job trains."""

from __future__ import annotations

import json

from megatron_ettin.cli.main import main
from tests.report.synthetic import write_run


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
