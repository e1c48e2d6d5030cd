"""Run tools/chaos.py: injected faults change no bit, and the tool detects a mutation that changes one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forkserver

ROUNDS = int(os.environ.get("ETTIN_CHAOS_ROUNDS", "7"))
EVERYWHERE = {"kill", "stop", "term", "corrupt", "clock"}
# root may mount and create network namespaces where the system allows it
WITH_RIGHTS = {"disk", "network"}
TWO_RANKS = ["--ranks", "2", "--layouts", "tp2 dp2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which the corpus and the undisturbed runs are made once for all tests."""
    return tmp_path_factory.mktemp("chaos")


def chaos(work: Path, *arguments: str, status: int = 0) -> str:
    """Run `tools/chaos.py` with these arguments and return its output, standard error first."""
    line = forkserver.command("tests.chaos.forked:run_chaos", *arguments, "--work", work)
    done = subprocess.run(line, capture_output=True, text=True, cwd=forkserver.ROOT)
    output = done.stderr + done.stdout
    assert done.returncode == status, output[-6000:]
    return output


@pytest.fixture(scope="module")
def tracing(work: Path) -> None:
    """Skip a test if processes cannot be traced; fail it in CI."""
    output = chaos(work, "cut", "--every", "1000")
    if output.startswith("left out"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(output)


@pytest.mark.full
def test_chaos_round_of_killed_ranks_ends_identical(work: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    chaos(work, "run", "--rounds", "1", "--seed", "1", "--faults", "kill", *TWO_RANKS, "--log", str(log))
    (record,) = map(json.loads, log.read_text().splitlines())
    assert record["outcome"] == "identical"
    assert len(record["launches"]) > 1


@pytest.mark.full
def test_chaos_rounds_end_identical_or_refused(work: Path, tmp_path: Path) -> None:
    arguments = ["run", "--rounds", str(ROUNDS), "--seed", "1", "--log", str(tmp_path / "log")]
    output = chaos(work, *arguments)
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {line["outcome"] for line in records} <= {"identical", "refused"}
    assert len(records) == ROUNDS
    left_out = {line.split(": ")[1] for line in output.splitlines() if line.startswith("left out")}
    assert left_out <= WITH_RIGHTS
    fault_names = EVERYWHERE | WITH_RIGHTS - left_out
    assert {name for line in records for name in line["faults"]} == fault_names or len(fault_names) > ROUNDS
    # otherwise too few rounds were disturbed
    assert sum(len(line["launches"]) > 1 for line in records) >= ROUNDS // 3
    # start the tool as a user does; it has nothing to do, because every round is already in the log
    script = [sys.executable, "-W", "ignore", str(forkserver.ROOT / "tools" / "chaos.py")]
    again = subprocess.run([*script, *arguments, "--work", work], capture_output=True, text=True, cwd=forkserver.ROOT)
    assert again.returncode == 0, again.stderr
    assert "round 0" not in again.stdout
    assert f"{ROUNDS} rounds, 0 failed" in again.stdout


@pytest.mark.full
def test_chaos_resume_differing_in_one_bit_is_reported(work: Path, tmp_path: Path) -> None:
    arguments = [
        "--faults",
        "kill",
        *TWO_RANKS,
        "--mutation",
        "resumed_with_another_bit",
        "--log",
        str(tmp_path / "log"),
    ]
    output = chaos(work, "run", "--rounds", "1", "--seed", "1", *arguments, status=1)
    assert "differs" in output
    assert "FAILED" in output
    assert "repeat with: --seed 1 --only" in output


@pytest.mark.full
def test_chaos_cut_publishing_at_every_third_call_is_harmless(work: Path, tracing: None) -> None:
    output = chaos(work, "cut", "--every", "3")
    assert "the next step: " in output
    assert "the same step again: " in output
    assert " 0 did harm" in output


@pytest.mark.full
@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        ("latest_before_the_checkpoint", "step_000000003/integrity.json: missing"),
        ("nothing_forced_to_the_disk", "lost, call"),
    ],
)
def test_chaos_cut_wrong_publishing_order_is_reported(work: Path, tracing: None, mutation: str, message: str) -> None:
    assert message in chaos(work, "cut", "--every", "4", "--mutation", mutation, status=1)


@pytest.mark.full
def test_chaos_cut_training_saves_leave_run_resumable(work: Path, tracing: None) -> None:
    output = chaos(work, "cut", "--what", "training", "--every", "20")
    assert "asynchronous=true: " in output
    assert "asynchronous=false: " in output
