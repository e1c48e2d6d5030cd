"""Faults during `ettin prepare`: kill -9 at any moment, a lost worker, a full disk, changing inputs. The same command,
run again, makes the same bytes as without the fault."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from megatron_ettin.cli.main import main
from tests import forkserver
from tests.data.corpora import files_of, words
from tests.prepare.small_tasks import (
    HOLD_VARIABLE,
    SCRIPT,
    arguments_for,
    fails,
    finish,
    forked,
    prepare_small_tasks,
    start,
    wait_for,
    without_progress,
    write_tokenizer,
)

KILLS = int(os.environ.get("ETTIN_TEST_KILLS", "4"))


def marked_processes(mark: str) -> list[psutil.Process]:
    """Return every running process that has this mark in its environment, which child processes inherit."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("ETTIN_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


def started_workers(pid: int) -> list[psutil.Process]:
    """Return a command's worker processes that have finished their imports, recognised by ignoring SIGINT."""
    workers = [child for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]
    ignored = [re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{worker.pid}/status").read_text()) for worker in workers]
    return [
        one for one, mask in zip(workers, ignored, strict=True) if mask and int(mask[1], 16) & 1 << signal.SIGINT - 1
    ]


def finished_tasks(folder: Path) -> list[Path]:
    """Return the record files of the finished tasks."""
    return list((folder / ".tmp-out" / "tasks").glob("task_*.json"))


def write_parts(folder: Path, bad: int | None = None) -> list[str]:
    """Write four inputs of 300 documents, cut off the last line of number `bad`, and return arguments for one
    worker."""
    root = folder / "in"
    root.mkdir()
    for i in range(4):
        lines = [json.dumps({"text": words(150, 100 * i + k)}) for k in range(300)]
        text = "\n".join(lines) + ("\n{bad" if i == bad else "")
        (root / f"part{i}.jsonl.gz").write_bytes(gzip.compress(text.encode(), 1, mtime=0))
    tokenizer = write_tokenizer(folder / "tokenizer")
    options = ["--chunk-tokens", "64", "--tokenizer", str(tokenizer), "--workers", "1"]
    return [str(root), "--out", str(folder / "out"), *options]


@pytest.mark.full
def test_prepare_kill_9_at_random_moments_then_rerun_gives_same_bytes(
    large: Path, large_dataset: dict[str, bytes], tmp_path: Path
) -> None:
    draw = random.Random(3)
    arguments = arguments_for(large, tmp_path / "out", 2)
    script = tmp_path / "small_tasks.py"
    began = time.monotonic()
    finish(start(arguments, script))
    whole_seconds = time.monotonic() - began
    assert files_of(tmp_path / "out") == large_dataset
    shutil.rmtree(tmp_path / "out")
    kills = finished = 0
    while kills < KILLS:
        mark = str(uuid.uuid4())
        running = start(arguments, script, ETTIN_TEST_MARK=mark)
        moment = draw.uniform(0.05, 1.0) * whole_seconds
        try:
            running.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            if kills % 2:  # the whole process group, or the parent alone
                os.killpg(running.pid, signal.SIGKILL)
            else:
                running.kill()
            kills += 1
        running.communicate()
        wait_for(lambda mark=mark: not marked_processes(mark))  # until no process is left
        if running.returncode == 0:
            finished += 1
            assert files_of(tmp_path / "out") == large_dataset
            shutil.rmtree(tmp_path / "out")
        else:
            assert running.returncode == -signal.SIGKILL
    finish(start(arguments, script))
    assert files_of(tmp_path / "out") == large_dataset
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small_tasks.py"]


@pytest.mark.parametrize("sigint", [pytest.param(signal.SIG_DFL, marks=pytest.mark.full), signal.SIG_IGN])
def test_prepare_killed_worker_is_reported_and_rerun_completes(
    large: Path, large_dataset: dict[str, bytes], tmp_path: Path, sigint: signal.Handlers
) -> None:
    arguments, script = arguments_for(large, tmp_path / "out", 2), tmp_path / "small_tasks.py"
    mark = str(uuid.uuid4())
    running = start(arguments, script, sigint, ETTIN_TEST_MARK=mark, **{HOLD_VARIABLE: "3"})
    # tasks 0 to 2 are done, and each worker is blocked in another task
    wait_for(lambda: len(finished_tasks(tmp_path)) == 3)
    started_workers(running.pid)[0].kill()
    line = fails(running)
    assert "a worker process died" in line
    assert "run the same command again" in line
    assert not marked_processes(mark)
    assert not (tmp_path / "out").exists()
    assert prepare_small_tasks(*arguments_for(large, tmp_path / "out", 1)) == 0
    assert files_of(tmp_path / "out") == large_dataset
    assert not (tmp_path / ".tmp-out").exists()


@pytest.mark.full
def test_prepare_interrupted_by_sigint_can_be_resumed(
    large: Path, large_dataset: dict[str, bytes], tmp_path: Path
) -> None:
    arguments, script, mark = arguments_for(large, tmp_path / "out", 2), tmp_path / "small_tasks.py", str(uuid.uuid4())
    running = start(arguments, script, ETTIN_TEST_MARK=mark, **{HOLD_VARIABLE: "3"})
    wait_for(lambda: len(finished_tasks(tmp_path)) == 3 and len(started_workers(running.pid)) == 2)
    os.killpg(running.pid, signal.SIGINT)  # a terminal signals the whole group
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert without_progress(errors) == ["ettin prepare: interrupted; run the same command again to continue"]
    wait_for(lambda: not marked_processes(mark))
    assert prepare_small_tasks(*arguments_for(large, tmp_path / "out", 1)) == 0
    assert files_of(tmp_path / "out") == large_dataset


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.full)])
def test_prepare_full_disk_is_reported_and_rerun_completes(
    large: Path, large_dataset: dict[str, bytes], small_disk: Path, workers: int
) -> None:
    arguments = arguments_for(large, small_disk / "out", workers)
    line = fails(forked(arguments))
    assert "No space left on device; make room and run the same command again to continue" in line
    assert not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert prepare_small_tasks(*arguments_for(large, small_disk / "out", 1)) == 0
    assert files_of(small_disk / "out") == large_dataset
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_prepare_replan_after_late_kill_matches_fresh_run(tmp_path: Path) -> None:
    """An input is emptied after later shards were staged under their numbers, so --replan must renumber them."""
    arguments = write_parts(tmp_path)
    killed = forkserver.command("tests.prepare.small_tasks:killed_before_publishing", *arguments)
    assert subprocess.run(killed, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert (tmp_path / ".tmp-out" / "dataset" / "shard_00003.bin").exists()
    # a task without documents
    (tmp_path / "in" / "part0.jsonl.gz").write_bytes(gzip.compress(b"", 1, mtime=0))
    assert prepare_small_tasks(*arguments, "--replan") == 0
    assert prepare_small_tasks(*arguments[:2], str(tmp_path / "fresh"), *arguments[3:]) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_prepare_bad_line_ends_busy_workers_at_once(tmp_path: Path) -> None:
    """The other worker is blocked in a task. It is ended, and not reported as a lost worker."""
    arguments, mark = write_parts(tmp_path, bad=1), str(uuid.uuid4())
    held = {HOLD_VARIABLE: "2", "ETTIN_TEST_MARK": mark}
    line = fails(start([*arguments[:-1], "2"], tmp_path / "small_tasks.py", **held))
    assert "invalid JSON" in line
    assert "part1.jsonl.gz:301" in line
    assert not marked_processes(mark)


def test_prepare_file_size_limit_is_reported_and_rerun_completes(
    large: Path, large_dataset: dict[str, bytes], tmp_path: Path
) -> None:
    """A disk error other than a full disk is also reported in one line, and the same command then completes."""
    arguments, script = arguments_for(large, tmp_path / "out", 1), tmp_path / "small_tasks.py"
    script.write_text(SCRIPT)
    command = ["bash", "-c", 'ulimit -f 60; exec "$@"', "limited", sys.executable, script, *arguments]
    # coverage.py would warn that it cannot write its own file
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    environment = {**inherited, "PYTHONPATH": str(forkserver.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2, done.stderr
    (line,) = without_progress(done.stderr)
    assert "File too large; when that is mended, run the same command again to continue" in line
    assert prepare_small_tasks(*arguments) == 0
    assert files_of(tmp_path / "out") == large_dataset


def test_prepare_changed_inputs_are_refused_without_replan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs that are named relative to another directory are recognized, because the frozen plan has resolved
    paths."""

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert prepare_small_tasks(*arguments) == 2
        (line,) = without_progress(capsys.readouterr().err)
        return line

    root, arguments = tmp_path / "in", write_parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    good = (root / "part3.jsonl.gz").read_bytes()
    (root / "part3.jsonl.gz").write_bytes(good[: len(good) // 2])
    arguments[0] = root.name
    line = refused(*arguments)
    assert "part3.jsonl.gz: gzip data ends in the middle, at byte" in line
    assert "finished tasks are kept in" in line
    (root / "part3.jsonl.gz").write_bytes(good)
    monkeypatch.chdir(root)
    arguments[0] = f"../{root.name}"
    line = refused(*arguments)
    assert f"part3.jsonl.gz had {len(good) // 2} bytes and has {len(good)}" in line
    assert "--replan" in line
    assert "holdout was 0.0 and is 0.5" in refused(*arguments, "--holdout", "0.5")
    assert prepare_small_tasks(*arguments, "--replan", "--json") == 0
    # the tasks of the three unchanged files
    assert json.loads(capsys.readouterr().out)["tasks_resumed"] == 3
    assert prepare_small_tasks(*arguments[:2], str(tmp_path / "fresh"), *arguments[3:]) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def write_in_between(path: Path, change: str, *arguments: str) -> int:
    """Run `ettin` here while `path` changes: `change` is "written" for after it was read, else after it was listed."""
    from megatron_ettin.prepare import run

    real = run.run_here if change == "written" else run.list_inputs

    def changed(*given: Any) -> Any:
        result = real(*given)
        if change == "written":
            path.write_bytes(path.read_bytes().replace(b"the", b"not"))
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2].rpartition(b"\n")[0] + b"\n")
        return result

    with mock.patch.object(run, real.__name__, changed):
        return main(list(arguments))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_prepare_input_that_shrinks_after_it_was_listed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A file that is still being copied, or is rewritten, must not lose its second half."""
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": words(150, k)}) + "\n" for k in range(100)))
    size = path.stat().st_size
    line = [
        str(path.parent),
        "--out",
        str(tmp_path / "out"),
        "--tokenizer",
        str(write_tokenizer(tmp_path / "tokenizer")),
    ]
    assert write_in_between(path, "cut", "prepare", *line, "--workers", "1") == 2
    assert (
        f"{path}: ends at byte {path.stat().st_size:,}, it had {size:,} when it was listed" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_prepare_input_that_is_written_to_before_publishing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in" / "a.txt"
    path.parent.mkdir()
    path.write_text(words(500, 1))
    line = ["prepare", str(path.parent), "--out", str(tmp_path / "out")]
    line += ["--tokenizer", str(write_tokenizer(tmp_path / "tokenizer")), "--workers", "1"]
    assert write_in_between(path, "written", *line) == 2
    assert f"{path}: was written to while it was read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*line, "--replan"]) == 0
