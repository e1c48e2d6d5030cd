"""Hangs of real ranks, and the parts that decide which rank caused one."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.faults import watchdog
from megatron_ettin.faults.heartbeat import (
    COMPUTE,
    DATA,
    REDUCE,
    Heartbeat,
    RankInfo,
    RankStatus,
    read_rank_status,
    write_rank_status,
)
from megatron_ettin.faults.stragglers import slowest
from megatron_ettin.faults.watchdog import hang_report
from megatron_ettin.launch.run_state import run_state
from tests.launch.cluster import wait_until
from tests.launch.jobs import step_of
from tests.pool import Pool
from tests.ranks import Ranks
from tests.train.runs import command, read, train

Launch = Callable[..., Ranks]
HANG = 3.0


@pytest.fixture
def launch(tmp_path: Path, corpus: Path) -> Iterator[Launch]:
    """Return a function that starts ranks of a run in `tmp_path / "run"`; they are killed at the end of the test."""
    started: list[Ranks] = []

    def start(world: int, *overrides: str, mutation: str | None = None) -> Ranks:
        settings = [f"resilience.hang_seconds={HANG:g}", *overrides]
        ranks = Ranks(world, tmp_path / "logs", command(tmp_path / "run", corpus, "mlm", settings), mutation)
        started.append(ranks)
        return ranks

    yield start
    for ranks in started:
        ranks.close()


def test_watchdog_suspended_rank_is_named_and_others_exit_75(
    launch: Launch, pool: Pool, corpus: Path, tmp_path: Path, monkeypatch
) -> None:
    """The other ranks write their stacks and exit with 75 after hang_seconds. A new launch resumes from the checkpoint
    and repeats the losses of the stopped one."""
    run_dir = tmp_path / "run"
    (tmp_path / "attempt").mkdir()
    monkeypatch.setenv("ETTIN_ATTEMPT_DIR", str(tmp_path / "attempt"))
    # the second launch has no cadence of checkpoints, so that the signal cannot meet a save
    small = "model.num_layers=2"
    train(pool, 4, run_dir, corpus, "mlm", ["run.steps=2", small])
    ranks = launch(4, "run.steps=100000", small)
    wait_until(lambda: step_of(run_dir) > 4, 60, "some steps")
    os.kill(ranks.pid(2), signal.SIGSTOP)
    # the ranks end by the watchdog, since the process groups' timeouts are longer than this wait
    statuses = ranks.wait(60, but=(2,))
    assert statuses == [75, 75, None, 75], ranks.output()
    line = run_state(run_dir).last_stall
    assert line is not None
    assert line in ranks.output()
    # the watchdog counts its own ticks, so time that a busy machine takes from the process does not count
    assert line.startswith(("stalled for 3 s: ", "stalled for 4 s: "))
    assert f"rank 2 on {os.uname().nodename} (pid {ranks.pid(2)}) has not been heard of" in line
    assert ranks.output().count("ettin train: stalled for") == 1
    (stall,) = (run_dir / "watch").glob("stall-*")
    assert sorted(path.name for path in stall.glob("*.txt")) == [f"rank_0000{rank}.txt" for rank in (0, 1, 3)]
    assert "in train_step" in (stall / "rank_00003.txt").read_text()
    (left,) = (tmp_path / "attempt").glob("rank_*.json")
    assert left.name == "rank_00002.json"
    assert json.loads(left.read_text())["kind"] == "stalled"
    ranks.close()
    monkeypatch.delenv("ETTIN_ATTEMPT_DIR")
    losses = read(run_dir).column("loss")
    resumed = train(pool, 4, run_dir, corpus, "mlm", [f"run.steps={len(losses)}", small])
    assert resumed.column("loss") == losses
    assert (run_dir / "metrics.rolled_back.jsonl").exists()


def test_watchdog_rank_stuck_reading_data_is_named(launch: Launch, tmp_path: Path) -> None:
    ranks = launch(2, "run.steps=100", mutation="reading_stops_on_rank_1")
    assert ranks.wait(60) == [75, 75], ranks.output()
    line = run_state(tmp_path / "run").last_stall
    assert line is not None
    assert f"rank 1 on {os.uname().nodename} (pid {ranks.pid(1)}) is still in reading data of" in line
    assert line.endswith("of step 4; the others wait in the gradient sum of step 4")
    (stacks,) = (tmp_path / "run" / "watch").glob("stall-*/rank_00001.txt")
    assert "_sleep_at_step_3" in stacks.read_text()


def test_watchdog_rank_stuck_in_c_code_is_named(launch: Launch, tmp_path: Path) -> None:
    """C code that holds the GIL stops the rank's own watchdog; those of other ranks name it."""
    ranks = launch(2, "run.steps=100", mutation="c_code_on_rank_1")
    assert ranks.wait(60, but=(1,)) == [75, None], ranks.output()
    line = run_state(tmp_path / "run").last_stall
    assert line is not None
    assert f"(pid {ranks.pid(1)}) has not been heard of" in line


@pytest.mark.full
def test_watchdog_slow_saves_and_evaluations_are_not_stalls(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """A save and an evaluation may take longer than hang_seconds; the watch folder is empty afterwards."""
    often = ["checkpoint.every_steps=2", "metrics.eval_every_steps=2", f"data.validation={corpus / 'heldout'}"]
    overrides = ["run.steps=2", "resilience.hang_seconds=3", *often]
    trained = train(pool, 2, tmp_path / "run", corpus, "mlm", overrides, mutation="slow_saves_and_evaluations")
    assert "validation_loss" in trained.metrics[1]
    assert list((tmp_path / "run" / "watch").iterdir()) == []


def test_straggler_slow_rank_is_named_in_metrics_and_status(pool: Pool, corpus: Path, tmp_path: Path, capsys) -> None:
    overrides = ["run.steps=9", "metrics.ranks_every_steps=3", "parallel.tp=1"]
    run_dir = tmp_path / "run"
    line = command(run_dir, corpus, "mlm", overrides)
    results = pool.run(2, line, "slow_rank_1")
    assert [result.status for result in results] == [0, 0], results[0].output
    lines = read(run_dir).metrics
    assert [line["step"] for line in lines if "slowest_rank" in line] == [3, 6, 9]
    assert all(line["slowest_rank"] == 1 and line["slowest_ratio"] > 1.5 for line in lines[2::3])
    warnings = [line for line in results[0].output.splitlines() if line.startswith("warning: rank 1 on")]
    assert len(warnings) == 1
    assert "over the last 9 steps" in warnings[0]
    state = run_state(run_dir)
    assert (state.slowest_rank, state.slowest_host) == (1, os.uname().nodename)
    assert main(["status", str(run_dir)]) == 0
    assert f"slowest rank 1 on {os.uname().nodename}, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "resilience.hang_seconds=0.5",
            "resilience.hang_seconds: 0.5 is not allowed; it must be at least 1 and below 10,000,000",
        ),
        ("resilience.hang_seconds=nan", "resilience.hang_seconds: nan is not allowed"),
        ("metrics.ranks_every_steps=0", "metrics.ranks_every_steps: 0 is not allowed; it must be at least 1"),
    ],
)
def test_watchdog_invalid_setting_is_refused(word: str, message: str, corpus: Path, tmp_path: Path, capsys) -> None:
    assert main(command(tmp_path / "run", corpus, "mlm", [word])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


PEERS = [RankInfo(rank, f"n{rank // 2}", 100 + rank) for rank in range(4)]


@pytest.mark.parametrize(
    ("signs", "line", "failed_rank"),
    [
        (
            [RankStatus(7, REDUCE, True, 1), RankStatus(7, REDUCE, True, 1), RankStatus(7, COMPUTE, False, 9), None],
            "rank 2 on n1 (pid 102) has not been heard of for 9 s (last forward and backward of step 8), rank 3 on n1"
            " (pid 103) has not been heard of; the others wait in the gradient sum of step 8",
            2,
        ),
        (
            [
                RankStatus(7, REDUCE, True, 1),
                RankStatus(7, DATA, True, 1),
                RankStatus(7, REDUCE, True, 1),
                RankStatus(7, COMPUTE, True, 1),
            ],
            "rank 1 on n0 (pid 101) is still in reading data of step 8; 2 others wait in the gradient sum of step 8",
            1,
        ),
        (
            [
                RankStatus(8, DATA, True, 1),
                RankStatus(7, "saving a checkpoint", True, 1),
                *[RankStatus(8, DATA, True, 1)] * 2,
            ],
            "rank 1 on n0 (pid 101) is still in saving a checkpoint after step 7; the others wait in reading data of"
            " step 9",
            1,
        ),
        ([RankStatus(7, REDUCE, True, 1)] * 4, "all 4 ranks are in the gradient sum of step 8", None),
    ],
)
def test_hang_report_names_the_rank_that_others_wait_for(
    signs: list[RankStatus | None], line: str, failed_rank: int | None
) -> None:
    report = hang_report(PEERS, {rank: sign for rank, sign in enumerate(signs) if sign is not None})
    assert report.line == line
    assert (report.failed_rank and report.failed_rank.rank) == failed_rank


def test_straggler_detection_compares_ranks_within_a_stage() -> None:
    assert slowest([1.0, 1.2, 9.0, 9.0], [0, 0, 1, 1]) == (1, pytest.approx(1.2))
    assert slowest([1.0, 1.0, 1.0, 3.0, 1.0], [0] * 5) == (3, 3.0)
    assert slowest([1.0, 2.0], [0, 1]) is None


def test_watchdog_reporters_are_few_and_spread_over_hosts() -> None:
    assert [watchdog.reporters(world) for world in (1, 2, 4)] == [[0], [0, 1], [0, 1, 2, 3]]
    chosen = watchdog.reporters(4096)
    assert chosen[:2] == [0, 1]
    assert len(chosen) <= watchdog.REPORTERS
    assert len({rank // 8 for rank in chosen}) > 4


def test_rank_status_of_other_launch_or_torn_file_is_ignored(tmp_path: Path) -> None:
    heartbeat = Heartbeat(figures={"step": 4})
    heartbeat.set_phase(DATA)
    write_rank_status(tmp_path, "now", PEERS[3], heartbeat, stalled=False)
    sign = read_rank_status(tmp_path, "now", 3)
    assert sign is not None
    assert (sign.step, sign.doing, sign.stalled) == (4, DATA, False)
    assert read_rank_status(tmp_path, "before", 3) is None
    assert read_rank_status(tmp_path, "now", 2) is None
    (tmp_path / "rank_00003.json").write_text("{torn")
    assert read_rank_status(tmp_path, "now", 3) is None


def test_watchdog_clock_jump_is_not_a_stall(tmp_path: Path, monkeypatch) -> None:
    """Let the monotonic clock jump by an hour between two ticks, as after a suspension of the process."""
    monkeypatch.setattr(watchdog, "gather_rank_info", lambda rank: ([RankInfo.here(0)], "now"))
    monkeypatch.setattr(watchdog.Watchdog, "_stall", lambda *_: pytest.fail("a stall"))
    jumps, jumped = itertools.count(), threading.Event()

    def now() -> float:
        number = next(jumps)
        if number == 4:
            jumped.set()
        return 3600.0 * number

    monkeypatch.setattr(watchdog.time, "monotonic", now)
    heartbeat = Heartbeat(hang_seconds=20.0)
    one = watchdog.Watchdog(tmp_path, heartbeat, 0)
    one.tick_seconds = 0.02
    with one:
        heartbeat.step(step=1)
        assert jumped.wait(60)
        assert one._thread.is_alive()
    assert not one._thread.is_alive()
