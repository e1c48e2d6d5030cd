"""Reading run directories without training: strict and tolerant readers of the same files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.runs.directory import RunDirectory, find_runs, last_phase, phases_in
from tests.report.synthetic import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", steps=4, bad={3: "skipped: loss is nan"})


def write_history(run: Path, *launches: dict[str, object]) -> None:
    (run / "history.jsonl").write_text("".join(json.dumps(launch) + "\n" for launch in launches))


def test_run_directory_reads_one_record_as_lines_and_as_columns(run: Path) -> None:
    with open(run / "metrics.jsonl", "ab") as metrics:
        metrics.write(b'[1]\n{"step": "5", "tokens": 1}\n{"step": 5, "tokens": 400000, "loss": "x"}\n{"step": 6, "to')
    directory = RunDirectory(run)
    assert list(directory.steps) == [1, 2, 3, 4, 5]
    assert directory.metrics.steps.tolist() == [1, 2, 3, 4, 5]
    assert directory.metrics.unreadable_lines == 2
    assert "loss" not in directory.steps[5]
    assert directory.metrics.known("loss").tolist() == [directory.steps[step]["loss"] for step in (1, 2, 3, 4)]
    assert directory.last_metrics[-1]["step"] == 5
    assert directory.tokens == 400_000
    assert directory.skipped_updates == [3]


def test_run_directory_without_metrics_has_no_columns_and_refuses_lines(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert len(RunDirectory(run).metrics.steps) == 0
    assert RunDirectory(run).last_metrics == []
    with pytest.raises(UserError, match=r"metrics\.jsonl: No such file"):
        _ = RunDirectory(run).steps


def test_last_metrics_of_a_long_record_are_whole_lines(run: Path) -> None:
    line = '{"step": 9, "text": "' + "x" * 1_000 + '"}\n'
    (run / "metrics.jsonl").write_text(line * 100)
    lines = RunDirectory(run).last_metrics
    assert 50 < len(lines) < 100
    assert {one["step"] for one in lines} == {9}


def test_first_launch_is_none_where_its_line_is_torn(run: Path) -> None:
    write_history(run, {"step": 0}, {"step": 2, "changes": ["optim.lr"]})
    directory = RunDirectory(run)
    assert directory.first_launch == {"step": 0}
    assert directory.changes == ["optim.lr"]
    (run / "history.jsonl").write_text('{"step": \n{"step": 2}\n')
    assert RunDirectory(run).first_launch is None
    assert RunDirectory(run).torn_launches == [1]
    assert RunDirectory(run).launches == [{"step": 2}]


def test_began_from_prefers_existing_path(run: Path, tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    for first, origin in (
        ({"init_from": "/gone", "init_from_relative": "../before"}, tmp_path / "before"),
        ({"init_from": "/gone", "init_from_relative": "../no"}, Path("/gone")),
        ({"from": "weights and optimizer of /old/run"}, Path("/old/run")),
        ({"from": "initial weights"}, None),
    ):
        write_history(run, first)
        assert RunDirectory(run).began_from == origin


@pytest.mark.parametrize("content", ["{", "3", '{"fingerprint": 3}'])
def test_fingerprint_of_a_damaged_order_is_none(run: Path, content: str) -> None:
    (run / "order.json").write_text(content)
    assert RunDirectory(run).fingerprint is None


def test_settings_of_an_unreadable_config_are_refused_by_its_path(run: Path) -> None:
    (run / "config.yaml").write_text("run: {")
    with pytest.raises(UserError, match=r"config\.yaml: unreadable"):
        RunDirectory(run).setting("run", "size")


@pytest.mark.parametrize("name", ["step_000000003", "../other", "step_2", "step_" + "9" * 300, ""])
def test_newest_checkpoint_is_none_where_latest_names_none(run: Path, name: str) -> None:
    (run / "checkpoints" / "step_000000002").mkdir(parents=True)
    assert RunDirectory(run).newest_checkpoint is None
    (run / "checkpoints" / "latest").write_text(name)
    assert RunDirectory(run).newest_checkpoint is None


def test_newest_checkpoint_is_the_one_that_latest_names(run: Path) -> None:
    for step in (2, 10):
        (run / "checkpoints" / f"step_{step:09d}").mkdir(parents=True)
    # as after a save that was killed before it replaced `latest`
    (run / "checkpoints" / "latest").write_text("step_000000002\n")
    assert RunDirectory(run).newest_checkpoint == run / "checkpoints" / "step_000000002"


def test_find_runs_stops_at_a_run_and_leaves_hidden_folders_out(tmp_path: Path) -> None:
    for name in ("a/b/run", "run", "run/inner", ".hidden/run", "slurm/run", "a/b/c/d/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text("")
    assert list(find_runs(tmp_path)) == [tmp_path / "a/b/run", tmp_path / "run"]
    marks = ("config.yaml", "metrics.jsonl")
    assert list(find_runs(tmp_path, marks)) == [tmp_path / "a/b/run", tmp_path / "begun", tmp_path / "run"]
    assert list(find_runs(tmp_path / "run")) == [tmp_path / "run"]


def test_phases_of_a_chains_folder_are_in_their_order(tmp_path: Path) -> None:
    for phase in ("decay", "pretrain"):
        (tmp_path / phase).mkdir()
        (tmp_path / phase / "config.yaml").write_text("")
    assert phases_in(tmp_path) == [tmp_path / "pretrain", tmp_path / "decay"]
    assert last_phase(tmp_path) == tmp_path / "decay"
    assert phases_in(tmp_path / "decay") == []
    assert last_phase(tmp_path / "decay") == tmp_path / "decay"


def test_directory_import_imports_no_torch_numpy_or_omegaconf() -> None:
    source = "import sys, megatron_ettin.launch.run_state; print({'torch', 'numpy', 'omegaconf'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", source], capture_output=True, text=True).stdout == "set()\n"


def test_dataset_shares_follow_weights_or_sizes_of_the_datasets(tmp_path: Path) -> None:
    for name, tokens in (("a", 300), ("b", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"tokens": tokens}))
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for mixture, shares in (
        (paths[0], [1.0]),
        ([{"path": paths[0], "weight": 1}, {"path": paths[1], "weight": 3}], [0.25, 0.75]),
        (paths, [0.75, 0.25]),
        ([paths[0], "/gone"], [None, None]),
    ):
        run = write_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", steps=1)
        directory = RunDirectory(run)
        directory.groups["data"]["mixture"] = mixture
        assert [share for _, share in directory.dataset_shares] == shares
