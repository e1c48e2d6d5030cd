"""The supervisor as a real process without a cluster: commands that fail, hang or are asked to stop, and its readers of
files that ranks write."""

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
from megatron_ettin.launch.supervisor import failed_rank, log, slurm
from megatron_ettin.launch.supervisor.check_node import find_problems
from tests.launch.cluster import wait_until

FOLDER = Path(supervisor.__file__).parent
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
# a minimal run: it writes heartbeats and failure reports as parallel/failure_report.py does; tests append its body
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


def supervise(tmp_path: Path, body: str, *options: str, errors: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start the supervisor on the program RUN + `body`, in which `count` is the attempt's number.

    `errors` is the standard error of the supervisor."""
    (tmp_path / "marks").mkdir(exist_ok=True)
    command = [sys.executable, FOLDER, "--folder", tmp_path / "slurm", "--grace-seconds", "1", *options]
    command += ["--", sys.executable, "-c", RUN + body, tmp_path / "marks"]
    (tmp_path / "slurm").mkdir(exist_ok=True)
    return subprocess.Popen([*map(str, command)], text=True, env=OUTSIDE, stdout=subprocess.PIPE, stderr=errors)


def ended(tmp_path: Path, body: str, *options: str) -> tuple[int, list[str], int]:
    """Run the supervisor to its end; return (exit status, lines of standard error, number of attempts)."""
    running = supervise(tmp_path, body, *options)
    _, errors = running.communicate(timeout=60)
    return running.returncode, errors.splitlines(), len(list((tmp_path / "marks").iterdir()))


def test_supervisor_finished_run_exits_zero_after_one_attempt(tmp_path: Path) -> None:
    assert ended(tmp_path, "beat('done', step=9)") == (0, [], 1)


def test_supervisor_finished_run_does_not_wait_for_its_command(tmp_path: Path) -> None:
    """Do not wait for the command, because srun waits for ever when a slurmstepd was killed."""
    status, _, attempts = ended(tmp_path, "beat('done', step=9); time.sleep(100)")
    assert (status, attempts) == (0, 1)


def test_supervisor_restarts_while_each_attempt_saves_a_checkpoint(tmp_path: Path) -> None:
    """Restart after each of five failures, because every attempt saved a newer checkpoint."""
    status, lines, attempts = ended(
        tmp_path, "beat('step', saved_step=count); sys.exit(1) if count < 5 else beat('done')", "--restarts", "2"
    )
    assert (status, attempts) == (0, 6), lines


def test_supervisor_gives_up_and_logs_the_failed_rank_last(tmp_path: Path) -> None:
    body = "beat('step', saved_step=4); fail('error', 'Traceback\\nValueError: 7 is odd'); sys.exit(3)"
    status, lines, attempts = ended(tmp_path, body, "--restarts", "1")
    assert (status, attempts) == (3, 2)
    assert lines[-3:] == ["--- rank 3 on n2 failed first; its last lines:", "Traceback", "ValueError: 7 is odd"]
    assert "2 failures in a row without a new checkpoint; giving up" in lines[-4]


def test_supervisor_user_error_is_not_retried(tmp_path: Path) -> None:
    status, lines, attempts = ended(tmp_path, "fail('user', 'no such dataset'); sys.exit(2)")
    assert (status, attempts, lines[-1]) == (2, 1, "no such dataset")


def test_supervisor_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "attempts").touch()
    status, (line,), attempts = ended(tmp_path, "beat('done')")
    assert (status, attempts) == (2, 0)
    assert line.startswith(f"supervisor: {tmp_path}/slurm/attempts/")


def test_supervisor_hung_run_is_ended_and_restarted(tmp_path: Path) -> None:
    """End a run whose heartbeat allows one second for a step that takes longer."""
    status, lines, attempts = ended(tmp_path, "beat('step', step=8); time.sleep(0 if count else 100); beat('done')")
    assert (status, attempts) == (0, 2)
    assert any("nothing moved for" in line and "step after step 8" in line for line in lines)


def test_supervisor_stall_reported_by_rank_is_recorded_as_hang(tmp_path: Path) -> None:
    """The reason and the failed rank come from the ranks' report. Exit status 75 alone would mean a saved run."""
    body = "beat('step', step=8)\nif not count: fail('stalled', 'stalled for 9 s: rank 3 on n2'); sys.exit(75)\nbeat('done')"
    status, lines, attempts = ended(tmp_path, body)
    assert (status, attempts) == (0, 2)
    assert "supervisor: stalled for 9 s: rank 3 on n2; the command was ended" in lines
    (failed,) = log.EventLog(str(tmp_path / "slurm"), "").failures()
    assert (failed["result"], failed["node"], failed["why"]) == ("hung", "n2", "stalled for 9 s: rank 3 on n2")


def test_supervisor_run_without_heartbeat_is_ended(tmp_path: Path) -> None:
    options = ("--start-seconds", "1", "--restarts", "0")
    status, lines, _ = ended(tmp_path, "time.sleep(100)", *options)
    assert status == 1
    assert any("before the run's first heartbeat" in line for line in lines)


def test_supervisor_failed_rank_ends_command_that_keeps_running(tmp_path: Path) -> None:
    body = "beat('step', limit_seconds=60); fail('error', 'ValueError: 7'); time.sleep(100)"
    status, lines, _ = ended(tmp_path, body, "--restarts", "0")
    assert status == 1
    assert any("a rank ended, but the command did not within" in line for line in lines)


def test_supervisor_signal_during_start_is_forwarded_once(tmp_path: Path) -> None:
    """Signal a run that still imports; outside of SLURM nothing can be requeued, and the log says so."""
    body = (
        "beat('starting'); time.sleep(0.5)\nfor step in range(100):\n    beat('step', step=step); time.sleep(0.1)\n"
        "    if stopped: beat('stopped', saved_step=step); sys.exit(75)\n"
    )
    running = supervise(tmp_path, body, "--grace-seconds", "20")
    wait_until(lambda: (tmp_path / "marks" / "0").exists(), 30, "start")
    running.send_signal(signal.SIGUSR1)
    # further signals change nothing
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 75
    assert "not requeued: not in a SLURM job" in errors
    assert errors.count("supervisor: SIGUSR1: asking the run to save and end") == 1
    recorded = log.EventLog(str(tmp_path / "slurm"), "").read()
    assert [event["event"] for event in recorded] == ["started", "saved", "requeued"]


def test_supervisor_terminated_before_first_heartbeat_exits_75(tmp_path: Path) -> None:
    running = supervise(tmp_path, "time.sleep(100)")
    wait_until(lambda: (tmp_path / "marks" / "0").exists(), 30, "start")
    running.terminate()
    began = time.monotonic()
    running.communicate(timeout=60)
    assert running.returncode == 75
    assert time.monotonic() - began < 30


def test_supervisor_with_a_full_log_reads_its_command_to_the_end(tmp_path: Path) -> None:
    """The command prints more than a pipe holds, so the supervisor must keep reading."""
    body = "beat('step', limit_seconds=60)\nfor line in range(9000): print('line', line, 'of text', file=sys.stderr)\nbeat('done')"
    with open("/dev/full", "wb") as full:
        running = supervise(tmp_path, body, errors=full.fileno())
        running.communicate(timeout=60)
    assert running.returncode == 0
    assert json.loads(next(tmp_path.glob("slurm/attempts/*/heartbeat.json")).read_text())["doing"] == "done"


def test_supervisor_with_a_full_log_still_asks_the_run_to_save(tmp_path: Path) -> None:
    body = (
        "beat('step', step=1, limit_seconds=60)\nwhile not stopped: time.sleep(0.05)\n"
        "beat('stopped', saved_step=1); sys.exit(75)\n"
    )
    with open("/dev/full", "wb") as full:
        running = supervise(tmp_path, body, errors=full.fileno())
        beating = "slurm/attempts/*/heartbeat.json"
        wait_until(lambda: any(tmp_path.glob(beating)), 30, "start")
        running.send_signal(signal.SIGUSR1)
        running.communicate(timeout=60)
    assert running.returncode == 75
    recorded = log.EventLog(str(tmp_path / "slurm"), "").read()
    assert [event["event"] for event in recorded] == ["started", "saved", "requeued"]


def test_supervisor_source_uses_python_3_6_syntax_and_modules() -> None:
    """Check grammar, modules and keywords, because compute nodes may have Python 3.6 and this host does not."""
    for path in FOLDER.glob("*.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 6))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert not names & {"dataclasses", "__future__"}
        assert names <= set(sys.stdlib_module_names)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        arguments = {word.arg for call in calls for word in call.keywords}
        assert not arguments & {"capture_output", "text", "missing_ok", "dirs_exist_ok"}


@pytest.mark.parametrize(
    ("line", "rank", "category"),
    [
        ("srun: error: n2: task 3: Killed", 3, "killed"),
        ("srun: error: gpu-07: tasks 8-15: Segmentation fault (core dumped)", 8, "killed"),
        ("srun: error: n1: task 0: Exited with exit code 1", 0, "exit"),
        ("srun: error: n1: task 0: Exited with exit code 75", None, ""),
        ("srun: error: n1: tasks 0-1: Terminated", None, ""),
        ("srun: Force Terminated StepId=8.1", None, ""),
    ],
)
def test_from_srun_line_gives_rank_and_category_of_failure(line: str, rank: int | None, category: str) -> None:
    failure = failed_rank.from_srun(line + "\n")
    assert (failure and (failure.rank, failure.category)) == ((rank, category) if rank is not None else None)


def record(folder: Path, rank: int, when: float, text: str) -> None:
    content = {"rank": rank, "host": f"n{rank}", "time": when, "kind": "error", "lines": [text]}
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps(content))


def test_first_failed_rank_is_the_cause_not_a_victim(tmp_path: Path) -> None:
    """Name the killed rank, which writes no report, although other ranks report its loss before srun does."""
    record(tmp_path, 0, 10.0, "RuntimeError: Connection closed by peer [n2]:41")
    killed = failed_rank.from_srun("srun: error: n2: task 2: Killed")
    assert killed is not None
    failure = failed_rank.first_failure(str(tmp_path), [killed])
    assert failure is not None
    assert (failure.rank, failure.host) == (2, "n2")
    record(tmp_path, 1, 9.0, "ValueError: row 7 is damaged")
    failure = failed_rank.first_failure(str(tmp_path), [killed])
    assert failure is not None
    assert failure.rank == 1
    (tmp_path / "rank_00004.json").write_text("{torn")
    assert failed_rank.first_failure(str(tmp_path), []) == failure


def test_check_node_names_each_problem(tmp_path: Path) -> None:
    wanted = {"names": ["localhost"], "files": [str(tmp_path)], "programs": ["sh"], "paths": [str(tmp_path)]}
    assert find_problems({**wanted, "min_free_gib": 0.0}) == []
    bad = {"names": ["no-such-host.invalid"], "files": ["/none"], "programs": ["none"], "paths": ["/proc/none"]}
    host, file, program, path = find_problems({**bad, "min_free_gib": 0.0})
    assert "no-such-host.invalid does not resolve" in host
    assert "/none does not exist" in file
    assert program.startswith("none does not exist")
    assert path.startswith("/proc/none cannot be written")
    (full,) = find_problems({**wanted, "min_free_gib": 1e9})
    assert "GiB free, 1e+09 are needed" in full
    assert list(tmp_path.iterdir()) == []


def test_check_nodes_without_an_answer_of_slurm_names_no_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    job = slurm.SlurmJob({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"})
    assert slurm.expand_hosts(job.node_list) == []
    assert slurm.check_nodes(job, str(tmp_path), [], [], 0.0) == {}
    assert "the nodes are not checked, because SLURM does not name them: node[1-2]" in capfd.readouterr().err
