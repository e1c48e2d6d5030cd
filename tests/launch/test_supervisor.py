"""The supervisor as real processes, without a cluster: what it does with a command that fails, hangs or is told to stop,
and the parts that read what others leave."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ettin.launch import supervisor
from megatron_ettin.launch.supervisor import culprit, events
from megatron_ettin.launch.supervisor.check_node import problems
from tests.launch.cluster import wait_until

FOLDER = Path(supervisor.__file__).parent
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
# a run in a few lines: it beats as attempt.py's Heart does, and fails as it is told
RUN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["ETTIN_ATTEMPT_DIR"])
def beat(doing, **more):
    (folder / "new").write_text(json.dumps(dict(dict(doing=doing, limit_seconds=1.0, time=time.time()), **more)))
    os.replace(folder / "new", folder / "heartbeat.json")
def fail(kind, text):
    record = dict(rank=3, host="n2", time=time.time(), kind=kind, lines=text.splitlines())
    (folder / "rank_00003.json").write_text(json.dumps(record))
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
marks = pathlib.Path(sys.argv[1])
count = len(list(marks.iterdir()))
(marks / str(count)).touch()
"""


def supervise(tmp_path: Path, body: str, *options: str) -> subprocess.Popen[str]:
    """Start it over RUN and `body`, in which `count` is the attempt's number."""
    (tmp_path / "marks").mkdir(exist_ok=True)
    command = [sys.executable, FOLDER, "--folder", tmp_path / "slurm", "--grace-seconds", "1", *options]
    command += ["--", sys.executable, "-c", RUN + body, tmp_path / "marks"]
    (tmp_path / "slurm").mkdir(exist_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*map(str, command)], text=True, env=OUTSIDE, **pipes)  # type: ignore[call-overload,no-any-return]


def ended(tmp_path: Path, body: str, *options: str) -> tuple[int, list[str], int]:
    """Exit status, lines of standard error, attempts."""
    running = supervise(tmp_path, body, *options)
    _, errors = running.communicate(timeout=60)
    return running.returncode, errors.splitlines(), len(list((tmp_path / "marks").iterdir()))


def test_a_run_that_is_done_is_done(tmp_path: Path) -> None:
    assert ended(tmp_path, "beat('done', step=9)") == (0, [], 1)


def test_a_run_that_is_done_does_not_wait_for_a_command_that_stays(tmp_path: Path) -> None:
    """A slurmstepd that was killed lets srun wait for ever."""
    status, _, attempts = ended(tmp_path, "beat('done', step=9); time.sleep(100)")
    assert (status, attempts) == (0, 1)


def test_it_starts_again_as_long_as_new_checkpoints_come(tmp_path: Path) -> None:
    """Five failures are no row of three where each attempt saved something new."""
    status, lines, attempts = ended(
        tmp_path, "beat('step', saved_step=count); sys.exit(1) if count < 5 else beat('done')", "--restarts", "2"
    )
    assert (status, attempts) == (0, 6), lines


def test_it_gives_up_and_the_culprit_has_the_last_word(tmp_path: Path) -> None:
    body = "beat('step', saved_step=4); fail('error', 'Traceback\\nValueError: 7 is odd'); sys.exit(3)"
    status, lines, attempts = ended(tmp_path, body, "--restarts", "1")
    assert (status, attempts) == (3, 2)
    assert lines[-3:] == ["--- rank 3 on n2 ended first; the last it said:", "Traceback", "ValueError: 7 is odd"]
    assert "2 failures without a new checkpoint in between; it ends here" in lines[-4]


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    status, lines, attempts = ended(tmp_path, "fail('user', 'no such dataset'); sys.exit(2)")
    assert (status, attempts, lines[-1]) == (2, 1, "no such dataset")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "attempts").touch()
    status, (line,), attempts = ended(tmp_path, "beat('done')")
    assert (status, attempts) == (2, 0) and line.startswith(f"supervisor: {tmp_path}/slurm/attempts/")


def test_what_hangs_is_ended_and_started_again(tmp_path: Path) -> None:
    """Limit of a step: one second, in the heartbeat itself."""
    status, lines, attempts = ended(tmp_path, "beat('step', step=8); time.sleep(0 if count else 100); beat('done')")
    assert (status, attempts) == (0, 2)
    assert any("nothing moved for" in line and "step after step 8" in line for line in lines)


def test_a_stall_that_the_ranks_tell_of_is_a_hang(tmp_path: Path) -> None:
    """Their line is the reason, the rank that it names the culprit; 75 alone would be a run that was saved."""
    body = "beat('step', step=8)\nif not count: fail('stalled', 'stalled for 9 s: rank 3 on n2'); sys.exit(75)\nbeat('done')"
    status, lines, attempts = ended(tmp_path, body)
    assert (status, attempts) == (0, 2)
    assert "supervisor: stalled for 9 s: rank 3 on n2; the command was ended" in lines
    (failed,) = events.Events(str(tmp_path / "slurm"), "").failures()
    assert (failed["result"], failed["node"], failed["why"]) == ("hung", "n2", "stalled for 9 s: rank 3 on n2")


def test_what_never_begins_is_ended(tmp_path: Path) -> None:
    options = ("--start-seconds", "1", "--restarts", "0")
    status, lines, _ = ended(tmp_path, "time.sleep(100)", *options)
    assert status == 1 and any("before the run's first heartbeat" in line for line in lines)


def test_a_rank_that_ended_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    body = "beat('step', limit_seconds=60); fail('error', 'ValueError: 7'); time.sleep(100)"
    status, lines, _ = ended(tmp_path, body, "--restarts", "0")
    assert status == 1 and any("a rank ended, the command not within" in line for line in lines)


def test_the_signal_is_passed_on_once_it_can_be_heard(tmp_path: Path) -> None:
    """It comes while the run still imports; outside of SLURM nothing can be requeued, which is said."""
    body = (
        "beat('starting'); time.sleep(0.5)\nfor step in range(100):\n    beat('step', step=step); time.sleep(0.1)\n"
        "    if stopped: beat('stopped', saved_step=step); sys.exit(75)\n"
    )
    running = supervise(tmp_path, body, "--grace-seconds", "20")
    wait_until(lambda: (tmp_path / "marks" / "0").exists(), 30, "start")
    running.send_signal(signal.SIGUSR1)
    running.send_signal(signal.SIGTERM)  # a storm of them changes nothing
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 75 and "not requeued: not in a SLURM job" in errors
    assert errors.count("supervisor: SIGUSR1: asks the run to save and end") == 1
    recorded = events.Events(str(tmp_path / "slurm"), "").read()
    assert [event["event"] for event in recorded] == ["started", "saved", "requeued"]


def test_asked_to_stop_before_it_began_it_ends(tmp_path: Path) -> None:
    running = supervise(tmp_path, "time.sleep(100)")
    wait_until(lambda: (tmp_path / "marks" / "0").exists(), 30, "start")
    running.terminate()
    began = time.monotonic()
    running.communicate(timeout=60)
    assert running.returncode == 75 and time.monotonic() - began < 30


def test_it_is_python_of_3_6() -> None:
    """Compute nodes have old ones; only the grammar and the module names can be checked here."""
    for path in FOLDER.glob("*.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 6))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert not names & {"dataclasses", "__future__"} and names <= set(sys.stdlib_module_names)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        words = {word.arg for call in calls for word in call.keywords}
        assert not words & {"capture_output", "text", "missing_ok", "dirs_exist_ok"}


@pytest.mark.parametrize(
    ("line", "rank", "kind"),
    [
        ("srun: error: n2: task 3: Killed", 3, "killed"),
        ("srun: error: gpu-07: tasks 8-15: Segmentation fault (core dumped)", 8, "killed"),
        ("srun: error: n1: task 0: Exited with exit code 1", 0, "exit"),
        ("srun: error: n1: task 0: Exited with exit code 75", None, ""),
        ("srun: error: n1: tasks 0-1: Terminated", None, ""),
        ("srun: Force Terminated StepId=8.1", None, ""),
    ],
)
def test_what_srun_says_of_tasks(line: str, rank: int | None, kind: str) -> None:
    found = culprit.from_srun(line + "\n")
    assert (found and (found.rank, found.kind)) == ((rank, kind) if rank is not None else None)


def record(folder: Path, rank: int, when: float, text: str) -> None:
    content = {"rank": rank, "host": f"n{rank}", "time": when, "kind": "error", "lines": [text]}
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps(content))


def test_the_culprit_is_no_victim(tmp_path: Path) -> None:
    """A rank that was killed says nothing, and the others say of it before srun does."""
    record(tmp_path, 0, 10.0, "RuntimeError: Connection closed by peer [n2]:41")
    killed = culprit.from_srun("srun: error: n2: task 2: Killed")
    assert killed is not None
    found = culprit.first(str(tmp_path), [killed])
    assert found is not None and (found.rank, found.host) == (2, "n2")
    record(tmp_path, 1, 9.0, "ValueError: row 7 is damaged")
    found = culprit.first(str(tmp_path), [killed])
    assert found is not None and found.rank == 1
    (tmp_path / "rank_00004.json").write_text("{torn")
    assert culprit.first(str(tmp_path), []) == found


def test_nodes_are_checked(tmp_path: Path) -> None:
    wanted = {"names": ["localhost"], "files": [str(tmp_path)], "programs": ["sh"], "paths": [str(tmp_path)]}
    assert problems({**wanted, "min_free_gib": 0.0}) == []
    bad = {"names": ["no-such-host.invalid"], "files": ["/none"], "programs": ["none"], "paths": ["/proc/none"]}
    host, file, program, path = problems({**bad, "min_free_gib": 0.0})
    assert "no-such-host.invalid does not resolve" in host and "/none is not there" in file
    assert program.startswith("none is not there") and path.startswith("/proc/none cannot be written")
    (full,) = problems({**wanted, "min_free_gib": 1e9})
    assert "GiB free, 1e+09 are needed" in full
    assert list(tmp_path.iterdir()) == []
