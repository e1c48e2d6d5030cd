"""Runs that end by an external event: signals before and after the first step, a killed launcher, a removed
directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ettin.checkpoint.directory import latest
from tests import forkserver
from tests.forkserver import program
from tests.launch.cluster import wait_until
from tests.pool import free_port
from tests.ranks import Ranks
from tests.train.runs import command, read

MANY = ["run.steps=100000", "metrics.every_steps=1"]


@contextlib.contextmanager
def alone_of_two(rank: int, folder: Path, arguments: list[str]) -> Iterator[tuple[forkserver.Child, Path]]:
    """Start one rank of two and never the other; yield (the rank, its log)."""
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    log = folder / "log"
    with open(log, "wb") as out:
        files = (0, out.fileno(), out.fileno())
        child = forkserver.call(forkserver.shared(), "tests.ranks:be_rank", [arguments, None], files, environment)
    try:
        yield child, log
    finally:
        child.close()


@pytest.mark.parametrize(
    ("rank", "waits"),
    [(0, "rank 0 waits for 1 of 2 ranks: 1"), pytest.param(1, "rank 1 waits for rank 0 at", marks=pytest.mark.full)],
)
def test_stop_signal_while_waiting_for_ranks_ends_with_75(rank: int, waits: str, corpus: Path, tmp_path: Path) -> None:
    """Rank 0 waits in Python, rank 1 in C code, where no handler of Python runs."""
    with alone_of_two(rank, tmp_path, command(tmp_path / "run", corpus, "mlm", MANY)) as (child, log):
        wait_until(lambda: waits in log.read_text(), 60, "the line that says who is waited for")
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(60) == 75
        assert "ettin train: SIGTERM before the first step: nothing to save, exit status 75" in log.read_text()


@pytest.mark.full
def test_stop_signal_while_another_copies_the_data_ends_with_75(corpus: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "local").mkdir()
    arguments = command(tmp_path / "run", corpus, "mlm", [*MANY, f"data.local_copy={tmp_path / 'local'}"])
    with open(tmp_path / "local" / ".lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with alone_of_two(0, tmp_path, arguments) as (child, log):
            wait_until(lambda: "data.local_copy: waiting for another process" in log.read_text(), 60, "the wait")
            os.kill(child.pid, signal.SIGUSR1)
            assert child.wait(60) == 75


def test_stop_signal_sighup_saves_the_run(corpus: Path, tmp_path: Path) -> None:
    ranks = Ranks(1, tmp_path, command(tmp_path / "run", corpus, "mlm", MANY))
    try:
        wait_until(lambda: "step 2 " in ranks.output(), 60, "a step")
        os.kill(ranks.pid(0), signal.SIGHUP)
        assert ranks.wait(60) == [75], ranks.output()
    finally:
        ranks.close()
    newest = latest(tmp_path / "run")
    assert newest is not None
    assert int(newest.name[5:]) == len(read(tmp_path / "run").metrics)


@pytest.mark.full
def test_stop_signal_sighup_is_ignored_under_nohup(corpus: Path, tmp_path: Path) -> None:
    """A run that was started with SIGHUP ignored trains on after SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        arguments = command(tmp_path / "run", corpus, "mlm", ["run.steps=30", "metrics.every_steps=1"])
        running = subprocess.Popen(program("ettin", *arguments), stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("step 1 "):
            (child,) = [pid for pid in pids() if f"{tmp_path}/run" in open_files(pid)]
            os.kill(child, signal.SIGHUP)
    assert running.wait() == 0
    assert len(read(tmp_path / "run").metrics) == 30


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def open_files(pid: int) -> str:
    """Return the paths of a process's open files; none if the process is gone."""
    with contextlib.suppress(OSError):
        return " ".join(os.readlink(f"/proc/{pid}/fd/{file}") for file in os.listdir(f"/proc/{pid}/fd"))
    return ""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def has_mapped(pid: int, name: str) -> bool:
    with contextlib.suppress(OSError):
        return name in Path(f"/proc/{pid}/maps").read_text()
    return False


@pytest.mark.full
def test_rank_with_killed_launcher_ends_during_its_imports(corpus: Path, tmp_path: Path) -> None:
    """Start a real interpreter, which imports for seconds, as the child of a shell that stands in for torchrun's
    agent."""
    arguments = [sys.executable, "-m", "megatron_ettin", *command(tmp_path / "run", corpus, "mlm", MANY)]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    start = ["bash", "-c", '"$@" & echo $!; wait', "launcher", *arguments]
    launcher = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    try:
        wait_until(lambda: has_mapped(rank, "libtorch"), 60, "its imports")
        launcher.kill()
        wait_until(lambda: not is_alive(rank), 60, "its end")
    finally:
        launcher.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def test_train_with_removed_run_directory_exits_1(corpus: Path, tmp_path: Path) -> None:
    ranks = Ranks(1, tmp_path / "logs", command(tmp_path / "run", corpus, "mlm", MANY))
    try:
        wait_until(lambda: "step 2 " in ranks.output(), 60, "a step")
        shutil.rmtree(tmp_path / "run")
        assert ranks.wait(60) == [1], ranks.output()
    finally:
        ranks.close()
    assert f"{tmp_path}/run: removed while the run trained (config.yaml is gone)" in ranks.output()
    assert not (tmp_path / "run" / "checkpoints").exists()
