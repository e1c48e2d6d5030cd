"""A refusal by SLURM is quoted, and the run directory stays unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.launch.request import Allocation, BatchJob, JobRun, Profile, Submission
from megatron_ettin.launch.submission import write_submission
from tests.launch.cluster import Cluster
from tests.launch.jobs import ETTIN, PATH, launch_arguments, train_arguments


def test_launch_sbatch_refusal_is_quoted_and_leaves_no_files(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    call = ["train", *train_arguments(corpus, tmp_path / "runs" / "a", 5)]
    for options, expected in ((["--partition", "nosuch"], "nvalid partition"), (["--nodes", "9"], "Node count")):
        done = slurm.call(ETTIN, "launch", *launch_arguments(2, 1), *options, "--submit", "--", *call, PATH=PATH)
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("ettin launch: sbatch refused 17m-mlm-pretrain: ")
        assert expected in line
        assert not (tmp_path / "runs").exists()


def test_launch_refusal_restores_files_of_an_earlier_launch(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Restore the files of an earlier launch that a refused one has overwritten."""
    call = ["train", *train_arguments(corpus, tmp_path / "run", 5)]
    assert slurm.call(ETTIN, "launch", *launch_arguments(2, 1), "--", *call, PATH=PATH).returncode == 0
    folder = tmp_path / "run" / "slurm"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    options = ["--time", "99", "--after", "nonsense:1", "--submit"]
    done = slurm.call(ETTIN, "launch", *launch_arguments(2, 1), *options, "--", *call, PATH=PATH)
    assert done.returncode == 2
    assert "dependency" in done.stderr.lower()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_launch_second_job_of_pending_run_needs_after(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    options = launch_arguments(2, 1, "--sbatch-arg=--begin=now+600", "--submit")
    call = ["--", "train", *train_arguments(corpus, tmp_path / "run", 5)]
    assert slurm.call(ETTIN, "launch", *options, *call, PATH=PATH).returncode == 0
    again = slurm.call(ETTIN, "launch", *options, *call, PATH=PATH)
    (line,) = again.stderr.splitlines()
    job = line.split("job ")[1].split()[0]
    assert again.returncode == 2
    assert f"is PENDING; scancel it first, or give --after afterany:{job}" in line
    after = slurm.call(ETTIN, "launch", *options, "--after", f"afterany:{job}", "--json", *call, PATH=PATH)
    assert after.returncode == 0, after.stderr
    slurm.call("scancel", job, json.loads(after.stdout)["jobs"][0]["job"])


def example_submission(folder: Path) -> Submission:
    allocation = Allocation(nodes=1, tasks_per_node=1, gpus_per_node=0, cpus_per_task=1, time=None)
    return Submission(
        folder=folder,
        allocation=allocation,
        profile=Profile(),
        launcher="srun",
        container="",
        env_file=None,
        restarts=3,
        requeues=200,
        margin_seconds=300,
        grace_seconds=30,
        command_line="ettin launch",
        cwd=folder.parent,
    )


def test_write_submission_failing_mkdir_removes_the_parents_made_before(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / ("x" * 300) / "slurm"
    with pytest.raises(UserError, match="cannot be made"):
        write_submission([], example_submission(folder))
    assert list(tmp_path.iterdir()) == []


def test_write_submission_any_error_restores_what_was_there(tmp_path: Path) -> None:
    """Leave nothing behind after an error that is no UserError, such as Ctrl-C."""
    folder = tmp_path / "run" / "slurm"
    job = BatchJob("a", "train", (), (JobRun(tmp_path / "run"),), snapshots={"a.yaml": "not \udcff UTF-8"})
    with pytest.raises(UnicodeEncodeError):
        write_submission([job], example_submission(folder))
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    (folder / "a.sbatch").write_text("earlier")
    with pytest.raises(UnicodeEncodeError):
        write_submission([job], example_submission(folder))
    assert {path: path.read_text() for path in folder.iterdir()} == {folder / "a.sbatch": "earlier"}
