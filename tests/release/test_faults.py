"""kill -9 of `ettin release` at random moments, of all of it or of the command alone: no process is left over, every
folder that has a revision's name is whole, and the same command ends in the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from megatron_ettin.convert.release.record import is_whole, read_record
from tests.data.small_tasks import wait_for
from tests.data.test_prepare_faults import marked_processes
from tests.release.conftest import NAMES, files_of

pytestmark = pytest.mark.ranks
KILLS = int(os.environ.get("ETTIN_TEST_RELEASE_KILLS", "4"))


def start(run: Path, out: Path, mark: str = "") -> subprocess.Popen[str]:
    words = ["release", str(run), "--out", str(out), "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_ettin", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "ETTIN_TEST_MARK": mark},
        # the tests may run in a shell's background, where it is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(running: subprocess.Popen[str]) -> None:
    _, errors = running.communicate(timeout=200)
    assert running.returncode == 0, errors


def check_whole(out: Path) -> None:
    """Assert that every folder with a revision's name is complete."""
    for folder in out.iterdir() if out.is_dir() else ():
        if folder.name in (*NAMES, "main"):
            record = read_record(folder)
            assert record, folder
            assert is_whole(folder, record, checksums=True), folder
            assert {path.name for path in folder.iterdir()} == {*record["files"], "release.json"}


def kill(running: subprocess.Popen[str], revisions: int, seconds: float, everything: bool) -> None:
    """SIGKILL `seconds` after so many revisions were told of (or the end, if that is sooner)."""
    assert running.stderr is not None
    told = 0
    while told < revisions and (line := running.stderr.readline()):
        told += line.startswith("[")
    time.sleep(seconds)
    if everything:
        os.killpg(running.pid, signal.SIGKILL)
    else:
        running.kill()
    running.communicate()


def test_release_kill_9_at_random_moments_resumes_to_same_bytes(trained, tmp_path):
    draw = random.Random(4)
    run, out = trained / "mlm/decay", tmp_path / "out"
    finish(start(run, tmp_path / "whole"))
    for number in range(KILLS):
        mark = str(uuid.uuid4())
        # from the first import to the card of main: after none, one or all of what is missing
        revisions, seconds = draw.choice([(0, 6.0), (1, 1.0), (1, 1.0), (9, 1.5)])
        kill(start(run, out, mark), revisions, draw.uniform(0, seconds), everything=bool(number % 2))
        wait_for(lambda mark=mark: not marked_processes(mark), 20)
        check_whole(out)
    finish(start(run, out))
    assert files_of(out) == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_release_killed_worker_exits_1_with_advice(trained, tmp_path):
    mark = str(uuid.uuid4())
    running = start(trained / "mlm/decay", tmp_path / "out", mark)
    assert running.stderr is not None
    assert running.stderr.readline().startswith("9 revisions")
    running.stderr.readline()  # one is there
    workers = [process for process in marked_processes(mark) if process.pid != running.pid]
    spawned = [process for process in workers if "spawn_main" in " ".join(process.cmdline())]
    spawned[0].kill()
    _, errors = running.communicate(timeout=100)
    assert running.returncode == 1
    assert "run it again with fewer --workers" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    wait_for(lambda: not marked_processes(mark), 20)
    check_whole(tmp_path / "out")


def test_release_interrupted_exits_130_and_leaves_no_process(trained, tmp_path):
    mark = str(uuid.uuid4())
    running = start(trained / "mlm/decay", tmp_path / "out", mark)
    assert running.stderr is not None
    assert running.stderr.readline().startswith("9 revisions")
    running.stderr.readline()
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors  # what shells give for Ctrl-C
    assert errors.strip().splitlines()[-1] == "ettin release: interrupted"
    wait_for(lambda: not marked_processes(mark), 20)
    check_whole(tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="wants a device that is always full")
def test_release_failing_writes_exit_2_and_repeat_succeeds(trained, tmp_path):
    """A limit on file sizes stands in for a full disk: the weights cannot be written, what is there stays."""
    out = tmp_path / "out"
    line = f"ulimit -f 100; exec {sys.executable} -m megatron_ettin release {trained / 'mlm/decay'} --out {out}"
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=200)
    assert run.returncode == 2, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ettin release: 9 of 9 revisions failed")
    assert "File too large" in last
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in out.iterdir()) == ["data_order", "release.json"]
    finish(start(trained / "mlm/decay", out))
    assert json.loads((out / "release.json").read_text())["main"] == "decay2"
