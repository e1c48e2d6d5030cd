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


def test_an_array_makes_the_same_bytes(
    cluster: dict[str, str], large: Path, large_dataset: dict[str, bytes], tmp_path: Path
) -> None:
    running = start([*slurm_arguments(large, tmp_path / "out"), "--wait"], tmp_path / "script.py", **cluster)
    _, errors = running.communicate(timeout=240)
    assert running.returncode == 0, errors
    assert files_of(tmp_path / "out") == large_dataset
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "script.py"]


def test_it_returns_tells_and_never_submits_twice(
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
    assert told[0]["jobs"] == told[1]["jobs"] and len(told[0]["jobs"]) == 2
    assert told[1]["tasks_done"] == 0 and told[1]["num_tasks"] > 4
    subprocess.run(["scancel", *told[0]["jobs"]], check=True, env={**os.environ, **cluster})
    wait_for(lambda: not queue(cluster), 60)
    running = start([*arguments, "--wait"], script, **cluster)  # what was cancelled is submitted again
    _, errors = running.communicate(timeout=240)
    assert running.returncode == 0, errors
    assert files_of(tmp_path / "out") == large_dataset


def test_a_bad_input_is_told_by_its_line(cluster: dict[str, str], tmp_path: Path) -> None:
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


def test_an_error_is_told_by_the_next_launch(cluster: dict[str, str], tmp_path: Path) -> None:
    """Also where no task was finished, and without --wait."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good"}\n{"text": \n')
    arguments = [str(source), "--out", str(tmp_path / "out"), "--executor", "slurm", "--slurm-time", "10"]
    arguments.append("--slurm-arg=mem-per-cpu=500M")
    submitted = start([*arguments, "--json"], tmp_path / "script.py", **cluster)
    output, errors = submitted.communicate(timeout=60)
    assert submitted.returncode == 0 and not errors, errors  # nothing of datatrove's own log
    assert len(json.loads(output)["jobs"]) == 2
    wait_for(lambda: not queue(cluster), 90)
    again = start(arguments, tmp_path / "script.py", **cluster)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 2
    (line,) = errors.splitlines()
    assert f"{source}:2: invalid JSON" in line and "ended without the dataset" in line


def test_a_space_in_the_path_is_refused(cluster: dict[str, str], large: Path, tmp_path: Path) -> None:
    running = start(slurm_arguments(large, tmp_path / "my data"), tmp_path / "script.py", **cluster)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 2 and "has a space in its path" in errors.splitlines()[-1]


def test_what_sbatch_refuses_is_one_line_and_leaves_nothing(
    cluster: dict[str, str], large: Path, tmp_path: Path
) -> None:
    arguments = [*slurm_arguments(large, tmp_path / "out"), "--slurm-partition", "nosuch"]
    running = start(arguments, tmp_path / "script.py", **cluster)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    (line,) = errors.splitlines()
    assert "sbatch refused the job array" in line and "Invalid partition name" in line
    assert not (tmp_path / ".tmp-out").exists() and not queue(cluster)


def test_a_refused_finishing_job_takes_the_array_along(cluster: dict[str, str], large: Path, tmp_path: Path) -> None:
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
    assert running.returncode == 2 and errors.strip().endswith("too many jobs; the array was cancelled")
    assert not (tmp_path / ".tmp-out").exists()
    wait_for(lambda: not queue(cluster), 60)


def test_other_settings_wait_for_what_is_queued(cluster: dict[str, str], large: Path, tmp_path: Path) -> None:
    """Tasks of one plan would be taken for tasks of the other. Also: memory a job in place of memory a CPU."""
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


def test_without_slurm_one_line(large: Path, tmp_path: Path) -> None:
    running = start(slurm_arguments(large, tmp_path / "out"), tmp_path / "script.py", PATH="/nonexistent")
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    assert errors.strip().endswith("--executor slurm: no sbatch on this machine; run it where jobs are submitted")
    assert not (tmp_path / ".tmp-out").exists()
