"""Stalls of real ranks, and the parts that decide whose fault one is."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ettin.launch.run_state import run_state
from tests.launch.cluster import wait_until
from tests.launch.jobs import step_of
from tests.pool import Pool
from tests.ranks import Ranks
from tests.train.runs import command, train

Launch = Callable[..., Ranks]
HANG = 5.0
LATE = 8.0  # after `hang_seconds`: for the answers, and for a machine that is busy


@pytest.fixture
def launch(tmp_path: Path, corpus: Path) -> Iterator[Launch]:
    """Start ranks of a run in `tmp_path / "run"`; what is left of them is killed in the end."""
    started: list[Ranks] = []

    def start(world: int, *words: str, mutation: str | None = None) -> Ranks:
        settings = [f"resilience.hang_seconds={HANG:g}", "checkpoint.every_steps=10", *words]
        ranks = Ranks(world, tmp_path / "logs", command(tmp_path / "run", corpus, "mlm", settings), mutation)
        started.append(ranks)
        return ranks

    yield start
    for ranks in started:
        ranks.close()


def test_a_stopped_rank_is_named(launch: Launch, pool: Pool, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """Within the time that a step may take; the others leave their stacks and end with 75, and a new launch goes on as
    if nothing had been."""
    run_dir = tmp_path / "run"
    (tmp_path / "attempt").mkdir()
    monkeypatch.setenv("ETTIN_ATTEMPT_DIR", str(tmp_path / "attempt"))
    ranks = launch(4, "run.steps=100000")
    wait_until(lambda: step_of(run_dir) > 12, 60, "some steps")
    os.kill(ranks.pid(2), signal.SIGSTOP)
    began = time.monotonic()
    statuses = ranks.wait(60, but=(2,))
    assert time.monotonic() - began < HANG + LATE
    assert statuses == [75, 75, None, 75], ranks.said()
    line = run_state(run_dir).last_stall
    assert line is not None and line in ranks.said()
    assert f"rank 2 on {os.uname().nodename} (pid {ranks.pid(2)}) has not been heard of" in line
    assert ranks.said().count("ettin train: stalled for") == 1
    (stall,) = (run_dir / "watch").glob("stall-*")
    assert sorted(path.name for path in stall.glob("*.txt")) == [f"rank_0000{rank}.txt" for rank in (0, 1, 3)]
    assert "in train_step" in (stall / "rank_00003.txt").read_text()
    (left,) = (tmp_path / "attempt").glob("rank_*.json")
    assert left.name == "rank_00002.json" and json.loads(left.read_text())["kind"] == "stalled"
    ranks.close()
    monkeypatch.delenv("ETTIN_ATTEMPT_DIR")
    steps = step_of(run_dir) + 5
    words = [f"run.steps={steps}"]
    resumed = train(pool, 4, run_dir, corpus, "mlm", words)
    undisturbed = train(pool, 4, tmp_path / "whole", corpus, "mlm", words)
    assert resumed.column("loss") == undisturbed.column("loss")
