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
from tests.data.small_tasks import arguments_for, start, wait_for
from tests.launch.cluster import Cluster


@pytest.fixture
def cluster(slurm: Cluster) -> dict[str, str]:
    """The environment in which SLURM's commands find it."""
    return slurm.environment


def slurm_arguments(large: Path, out: Path) -> list[str]:
    return [*arguments_for(large, out, 2), "--executor", "slurm", "--slurm-time", "10", "--slurm-arg=mem-per-cpu=500M"]


def queue(cluster: dict[str, str]) -> list[str]:
    done = subprocess.run(
        ["squeue", "-h", "-o", "%i"], capture_output=True, text=True, check=True, env={**os.environ, **cluster}
    )
    return done.stdout.split()


def test_prepare_slurm_array_writes_the_same_bytes_as_one_process(
    cluster: dict[str, str], large: Path, large_dataset: dict[str, bytes], tmp_path: Path
) -> None:
    running = start([*slurm_arguments(large, tmp_path / "out"), "--wait"], tmp_path / "script.py", **cluster)
    _, errors = running.communicate(timeout=240)
    assert running.returncode == 0, errors
    assert files_of(tmp_path / "out") == large_dataset
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "script.py"]


def test_prepare_slurm_rerun_reports_queued_jobs_and_resubmits_cancelled(
    cluster: dict[str, str], large: Path, large_dataset: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = [*slurm_arguments(large, tmp_path / "out"), "--json"]
    script = tmp_path / "script.py"
    told = []
    for _ in range(2):
        running = start([*arguments, "--slurm-arg=begin=now+60"], script, **cluster)
        output, errors = running.communicate(timeout=60)
        assert running.returncode == 0, errors
        told.append(json.loads(output))
    assert (told[0]["new"], told[1]["new"]) == (True, False)
    assert told[0]["jobs"] == told[1]["jobs"]
    assert len(told[0]["jobs"]) == 2
    assert told[1]["tasks_done"] == 0
    assert told[1]["num_tasks"] > 4
    subprocess.run(["scancel", *told[0]["jobs"]], check=True, env={**os.environ, **cluster})
    wait_for(lambda: not queue(cluster), 60)
    running = start([*arguments, "--wait"], script, **cluster)  # what was cancelled is submitted again
    _, errors = running.communicate(timeout=240)
    assert running.returncode == 0, errors
    assert files_of(tmp_path / "out") == large_dataset


def test_prepare_slurm_truncated_input_is_reported_by_name(cluster: dict[str, str], tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    for i in range(3):
        lines = [json.dumps({"text": words(150, 100 * i + k)}) for k in range(300)]
        (root / f"part{i}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode(), 1, mtime=0))
    (root / "part1.jsonl.gz").write_bytes((root / "part1.jsonl.gz").read_bytes()[:5_000])
    arguments = [str(root), "--out", str(tmp_path / "out"), "--chunk-tokens", "64", "--workers", "2"]
    slurm = ["--executor", "slurm", "--wait", "--slurm-time", "10", "--slurm-arg=mem-per-cpu=500M"]
    running = start([*arguments, *slurm], tmp_path / "script.py", **cluster)
    _, errors = running.communicate(timeout=240)
    assert running.returncode == 2, errors
    assert "part1.jsonl.gz: gzip data ends in the middle, at byte" in errors.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_prepare_slurm_task_error_is_reported_by_the_next_run(cluster: dict[str, str], tmp_path: Path) -> None:
    """The error is reported although no task was finished and --wait was not given."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good"}\n{"text": \n')
    arguments = [str(source), "--out", str(tmp_path / "out"), "--executor", "slurm", "--slurm-time", "10"]
    arguments.append("--slurm-arg=mem-per-cpu=500M")
    submitted = start([*arguments, "--json"], tmp_path / "script.py", **cluster)
    output, errors = submitted.communicate(timeout=60)
    assert submitted.returncode == 0, errors
    assert not errors, errors  # datatrove's own log must not appear
    assert len(json.loads(output)["jobs"]) == 2
    wait_for(lambda: not queue(cluster), 90)
    again = start(arguments, tmp_path / "script.py", **cluster)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 2
    (line,) = errors.splitlines()
    assert f"{source}:2: invalid JSON" in line
    assert "ended without the dataset" in line


def test_prepare_slurm_space_in_path_is_refused(cluster: dict[str, str], large: Path, tmp_path: Path) -> None:
    running = start(slurm_arguments(large, tmp_path / "my data"), tmp_path / "script.py", **cluster)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "has a space in its path" in errors.splitlines()[-1]


def test_prepare_slurm_sbatch_refusal_is_one_line_and_leaves_nothing(
    cluster: dict[str, str], large: Path, tmp_path: Path
) -> None:
    arguments = [*slurm_arguments(large, tmp_path / "out"), "--slurm-partition", "nosuch"]
    running = start(arguments, tmp_path / "script.py", **cluster)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    (line,) = errors.splitlines()
    assert "sbatch refused the job array" in line
    assert "Invalid partition name" in line
    assert not (tmp_path / ".tmp-out").exists()
    assert not queue(cluster)


def test_prepare_slurm_refused_finishing_job_cancels_the_array(
    cluster: dict[str, str], large: Path, tmp_path: Path
) -> None:
    refusing, real = tmp_path / "bin" / "sbatch", shutil.which("sbatch")
    refusing.parent.mkdir()
    refusing.write_text(
        f'#!/bin/bash\ncase "$*" in *--parsable*) echo "too many jobs" >&2; exit 1;; esac\nexec {real} "$@"\n'
    )
    refusing.chmod(0o755)
    environment = {**cluster, "PATH": f"{refusing.parent}:{os.environ['PATH']}"}
    arguments = [*slurm_arguments(large, tmp_path / "out"), "--slurm-arg=begin=now+600"]
    running = start(arguments, tmp_path / "script.py", **environment)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    assert errors.strip().endswith("too many jobs; the array was cancelled")
    assert not (tmp_path / ".tmp-out").exists()
    wait_for(lambda: not queue(cluster), 60)


def test_prepare_slurm_other_settings_are_refused_while_jobs_are_queued(
    cluster: dict[str, str], large: Path, tmp_path: Path
) -> None:
    """Tasks of one plan would be taken for tasks of the other. Also covers memory per job instead of per CPU."""
    arguments = [*arguments_for(large, tmp_path / "out", 2), "--executor", "slurm", "--slurm-time", "10"]
    arguments += ["--slurm-arg=mem=500M", "--slurm-arg=begin=now+600"]
    for more, status in (([], 0), (["--end-token", "none"], 2), (["--end-token", "none", "--replan"], 2)):
        running = start([*arguments, *more], tmp_path / "script.py", **cluster)
        _, errors = running.communicate(timeout=60)
        assert running.returncode == status, errors
        if status:
            assert "end_token was 'every' and is 'none'; scancel them first" in errors
    jobs = json.loads((tmp_path / ".tmp-out" / "submitted.json").read_text())["jobs"]
    subprocess.run(["scancel", *jobs], check=True, env={**os.environ, **cluster})
    wait_for(lambda: not queue(cluster), 60)


def test_prepare_slurm_without_sbatch_is_refused(large: Path, tmp_path: Path) -> None:
    running = start(slurm_arguments(large, tmp_path / "out"), tmp_path / "script.py", PATH="/nonexistent")
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    assert errors.strip().endswith("--executor slurm: no sbatch on this machine; run it where jobs are submitted")
    assert not (tmp_path / ".tmp-out").exists()
