"""kill -9 of `ettin release` at random moments, of the whole session or of the command alone: no process is left, every
folder with a revision's name is complete, and the same command then makes the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ettin.release.revision import is_complete, read_record
from tests.prepare.small_tasks import wait_for
from tests.release.conftest import NAMES, SAME, files_of, release
from tests.release.running import Running

pytestmark = pytest.mark.ranks
KILLS = int(os.environ.get("ETTIN_TEST_RELEASE_KILLS", "3"))
REAL = pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.full)], ids=["forked", "real"])
# (revisions to wait for, then at most this many seconds for a fork, and for the real command); together they cover the
# time from reading the runs to writing main's card
MOMENTS = [(1, 0.5, 1.0), (0, 0.6, 6.0), (9, 0.8, 1.5), (2, 0.3, 1.0)]


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def begin(*arguments: object, **options: object) -> Running:
        started.append(Running(*arguments, **options))
        return started[-1]

    yield begin
    for running in started:
        running.close()


def check_whole(out: Path) -> None:
    """Assert that every folder with a revision's name is complete."""
    for folder in out.iterdir() if out.is_dir() else ():
        if folder.name in (*NAMES, "main"):
            record = read_record(folder)
            assert record, folder
            assert is_complete(folder, record, checksums=True), folder
            assert {path.name for path in folder.iterdir()} == {*record["files"], "release.json"}


@REAL
def test_release_kill_9_at_random_moments_resumes_to_same_bytes(start, released, trained, tmp_path, real):
    draw = random.Random(4)
    out = tmp_path / "out"
    arguments = [trained / "mlm/decay", "--out", out, "--workers", "2", *SAME]
    for number in range(KILLS):
        revisions, *seconds = MOMENTS[number % len(MOMENTS)]
        running = start(*arguments, real=real)
        running.wait_until_reported(revisions)
        time.sleep(draw.uniform(0, seconds[real]))
        if running.process.poll() is None:
            # kill every process, or the command alone
            (os.killpg if number % 2 else os.kill)(running.pid, signal.SIGKILL)
        running.ended()
        wait_for(lambda running=running: not running.left_over())
        check_whole(out)
    running = start(*arguments, real=real)
    assert running.ended() == 0, running.output()
    assert files_of(out) == files_of(released)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@REAL
def test_release_killed_worker_exits_1_with_advice(start, trained, tmp_path, real):
    out = tmp_path / "out"
    running = start(trained / "mlm/decay", "--out", out, "--workers", "2", real=real, held="" if real else "ext1")
    running.wait_until_reported(1)
    assert running.output().startswith(f"{len(NAMES)} revisions")
    running.workers()[0].kill()
    assert running.ended() == 1
    assert "run it again with fewer --workers" in running.output().strip().splitlines()[-1]
    assert "Traceback" not in running.output()
    wait_for(lambda: not running.left_over())
    check_whole(out)


@REAL
def test_release_interrupted_exits_130_and_leaves_no_process(start, trained, tmp_path, real):
    out = tmp_path / "out"
    arguments = [trained / "mlm/decay", "--out", out, "--workers", "1" if real else "2"]
    running = start(*arguments, real=real, held="" if real else "ext1")
    running.wait_until_reported(1)
    assert running.workers()
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    # 130 is the status after Ctrl-C; a fork ends by the signal instead
    assert running.ended() == 130, running.output()
    assert running.output().strip().splitlines()[-1] == "ettin release: interrupted"
    wait_for(lambda: not running.left_over())
    check_whole(out)


def test_release_failing_writes_exit_2_and_repeat_succeeds(start, trained, tmp_path, capfd):
    """With a limit on file sizes, as with a full disk, weights cannot be written; finished revisions stay."""
    out = tmp_path / "out"
    arguments = [trained / "mlm/pretrain", "--out", out, "--workers", "1"]
    running = start(*arguments, largest_file=100_000)
    assert running.ended() == 2, running.output()
    last = running.output().strip().splitlines()[-1]
    assert last.startswith("ettin release: 3 of 3 revisions failed")
    assert "File too large" in last
    assert "Traceback" not in running.output()
    assert sorted(path.name for path in out.iterdir()) == ["data_order", "release.json"]
    status, _, err = release(capfd, *arguments)
    assert status == 0, err
    assert json.loads((out / "release.json").read_text())["main"] == "step10"
