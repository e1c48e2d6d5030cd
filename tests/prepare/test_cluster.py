"""`ettin prepare --executor slurm` on a real SLURM of three nodes on this machine (tools/slurm_sandbox.sh)."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.data.corpora import files_of, words
from tests.launch.cluster import Cluster
from tests.prepare.small_tasks import fails, finish, forked, prepare_small_tasks, wait_for, write_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two archives, each of which is one task. Read-only."""
    root = tmp_path_factory.mktemp("inputs")
    for i in range(2):
        lines = [json.dumps({"text": words(150, 1_000 * i + k)}) for k in range(300)]
        (root / f"part{i}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode(), 1, mtime=0))
    write_tokenizer(root / ".tokenizer")
    return root


@pytest.fixture(scope="module")
def dataset(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of the dataset that one process makes from `inputs`, name to content."""
    out = tmp_path_factory.mktemp("here") / "out"
    assert prepare_small_tasks(*arguments_for(inputs, out)) == 0
    return files_of(out)


def arguments_for(inputs: Path, out: Path) -> list[str]:
    options = ["--chunk-tokens", "64", "--holdout", "0.05", "--seq-len", "64", "--workers", "2"]
    return [str(inputs), "--out", str(out), "--tokenizer", str(inputs / ".tokenizer"), *options]


@pytest.fixture
def cluster(slurm: Cluster) -> dict[str, str]:
    """Return environment variables with which SLURM's commands find the cluster."""
    return slurm.environment


def slurm_arguments(inputs: Path, out: Path) -> list[str]:
    slurm = ["--executor", "slurm", "--slurm-time", "10", "--slurm-arg=mem-per-cpu=500M"]
    return [*arguments_for(inputs, out), *slurm]


def queue(cluster: dict[str, str]) -> list[str]:
    done = subprocess.run(
        ["squeue", "-h", "-o", "%i"], capture_output=True, text=True, check=True, env={**os.environ, **cluster}
    )
    return done.stdout.split()


def cancel(cluster: dict[str, str], jobs: list[str]) -> None:
    subprocess.run(["scancel", *jobs], check=True, env={**os.environ, **cluster})
    wait_for(lambda: not queue(cluster))


def test_prepare_slurm_array_writes_the_same_bytes_as_one_process(
    cluster: dict[str, str], inputs: Path, dataset: dict[str, bytes], tmp_path: Path
) -> None:
    finish(forked([*slurm_arguments(inputs, tmp_path / "out"), "--wait"], **cluster))
    assert files_of(tmp_path / "out") == dataset
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.full
def test_prepare_slurm_rerun_reports_queued_jobs_and_resubmits_cancelled(
    cluster: dict[str, str], inputs: Path, tmp_path: Path
) -> None:
    arguments = [*slurm_arguments(inputs, tmp_path / "out"), "--json", "--slurm-arg=begin=now+600"]
    submitted = [json.loads(finish(forked(arguments, **cluster))) for _ in range(2)]
    assert (submitted[0]["new"], submitted[1]["new"]) == (True, False)
    assert submitted[0]["jobs"] == submitted[1]["jobs"]
    assert len(submitted[0]["jobs"]) == 2
    assert submitted[1]["tasks_done"] == 0
    assert submitted[1]["num_tasks"] == 2
    cancel(cluster, submitted[0]["jobs"])
    again = json.loads(finish(forked(arguments, **cluster)))  # the cancelled tasks are submitted again
    assert again["new"] is True
    assert not set(again["jobs"]) & set(submitted[0]["jobs"])
    cancel(cluster, again["jobs"])


@pytest.mark.full
def test_prepare_slurm_truncated_input_is_reported_by_name(
    cluster: dict[str, str], inputs: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(inputs, tmp_path / "in")
    (root / "part1.jsonl.gz").write_bytes((root / "part1.jsonl.gz").read_bytes()[:5_000])
    line = fails(forked([*slurm_arguments(root, tmp_path / "out"), "--wait"], **cluster))
    assert "part1.jsonl.gz: gzip data ends in the middle, at byte" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_prepare_slurm_task_error_is_reported_by_the_next_run(cluster: dict[str, str], tmp_path: Path) -> None:
    """The error is reported although no task was finished and --wait was not given."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good"}\n{"text": \n')
    arguments = [str(source), "--out", str(tmp_path / "out"), "--executor", "slurm", "--slurm-time", "10"]
    arguments.append("--slurm-arg=mem-per-cpu=500M")
    submitted = forked([*arguments, "--json"], **cluster)
    output, errors = submitted.communicate(timeout=120)
    assert submitted.returncode == 0, errors
    # datatrove's log is not part of the output
    assert not errors, errors
    assert len(json.loads(output)["jobs"]) == 2
    wait_for(lambda: not queue(cluster), 180)
    line = fails(forked(arguments, **cluster))
    assert f"{source}:2: invalid JSON" in line
    assert "ended without the dataset" in line


@pytest.mark.full
def test_prepare_slurm_space_in_path_is_refused(cluster: dict[str, str], inputs: Path, tmp_path: Path) -> None:
    line = fails(forked(slurm_arguments(inputs, tmp_path / "my data"), **cluster))
    assert "has a space in its path" in line


@pytest.mark.full
def test_prepare_slurm_sbatch_refusal_is_one_line_and_leaves_nothing(
    cluster: dict[str, str], inputs: Path, tmp_path: Path
) -> None:
    arguments = [*slurm_arguments(inputs, tmp_path / "out"), "--slurm-partition", "nosuch"]
    line = fails(forked(arguments, **cluster))
    assert "sbatch refused the job array" in line
    assert "Invalid partition name" in line
    assert not (tmp_path / ".tmp-out").exists()
    assert not queue(cluster)


@pytest.mark.full
def test_prepare_slurm_refused_finishing_job_cancels_the_array(
    cluster: dict[str, str], inputs: Path, tmp_path: Path
) -> None:
    refusing, real = tmp_path / "bin" / "sbatch", shutil.which("sbatch")
    refusing.parent.mkdir()
    refusing.write_text(
        f'#!/bin/bash\ncase "$*" in *--parsable*) echo "too many jobs" >&2; exit 1;; esac\nexec {real} "$@"\n'
    )
    refusing.chmod(0o755)
    environment = {**cluster, "PATH": f"{refusing.parent}:{os.environ['PATH']}"}
    arguments = [*slurm_arguments(inputs, tmp_path / "out"), "--slurm-arg=begin=now+600"]
    line = fails(forked(arguments, **environment))
    assert line.endswith("too many jobs; the array was cancelled")
    assert not (tmp_path / ".tmp-out").exists()
    wait_for(lambda: not queue(cluster))


@pytest.mark.full
def test_prepare_slurm_other_settings_are_refused_while_jobs_are_queued(
    cluster: dict[str, str], inputs: Path, tmp_path: Path
) -> None:
    """Refuse, because tasks of one plan would be taken for those of the other. Memory is given per job, not per CPU."""
    arguments = [*arguments_for(inputs, tmp_path / "out"), "--executor", "slurm", "--slurm-time", "10"]
    arguments += ["--slurm-arg=mem=500M", "--slurm-arg=begin=now+600"]
    finish(forked(arguments, **cluster))
    for more in (["--end-token", "none"], ["--end-token", "none", "--replan"]):
        line = fails(forked([*arguments, *more], **cluster))
        assert "end_token was 'every' and is 'none'; scancel them first" in line
    cancel(cluster, json.loads((tmp_path / ".tmp-out" / "submitted.json").read_text())["jobs"])


def test_prepare_slurm_without_sbatch_is_refused(inputs: Path, tmp_path: Path) -> None:
    line = fails(forked(slurm_arguments(inputs, tmp_path / "out"), PATH="/nonexistent"))
    assert line.endswith("--executor slurm: no sbatch on this machine; run it where jobs are submitted")
    assert not (tmp_path / ".tmp-out").exists()
