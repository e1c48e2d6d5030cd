"""`--phase all`: three phases in one job match three jobs bit for bit, wherever the job is interrupted."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ettin.checkpoint.directory import latest, read_progress
from tests.pool import Pool
from tests.train.runs import TINY, read

pytestmark = pytest.mark.ranks
Apart = Callable[[int], Path]
PHASES = ("pretrain", "extend", "decay")
WORDS = [
    *("model.attention_output_dropout=0.1", "run.steps=4"),
    *("extend.data.seq_len=96", "extend.model.max_position_embeddings=96", "decay.data.seq_len=96"),
    *("decay.optim.lr=1e-3", "decay.schedule.name=one_minus_sqrt", "decay.schedule.decay_tokens=2000"),
    *("extend.run.steps=3", "decay.run.steps=3"),
]


def line(corpus: Path, phase: str, run_dir: Path, *more: str) -> list[str]:
    start = ["train", "--size", "17m", "--objective", "clm", "--phase", phase, "--run-dir", str(run_dir)]
    return [*start, *TINY, f"data.mixture={corpus}", *WORDS, *more]


def same(one: Path, other: Path) -> None:
    """Assert equal losses, norms, learning rates and final weights of every phase, bit for bit."""
    for phase in PHASES:
        ours, theirs = read(one / phase), read(other / phase)
        for key in ("step", "tokens", "loss", "grad_norm", "lr", "rows"):
            assert ours.column(key) == theirs.column(key), (phase, key)
        mine, yours = ours.weights(), theirs.weights()
        assert all(torch.equal(mine[name], yours[name]) for name in yours), phase


@pytest.fixture(scope="module")
def apart(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Apart:
    """Return a function of the world size, for the folder of the three phases run as three jobs."""

    @functools.cache
    def run(world: int) -> Path:
        root, before = tmp_path_factory.mktemp("apart"), []
        for phase in PHASES:
            words = line(corpus, phase, root / phase, f"parallel.tp={world}")
            results = pool.run(world, [*words, *before])
            assert [result.status for result in results] == [0] * world, results[0].output[-2000:]
            before = ["--init-from", str(root / phase)]
        return root

    return run


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.full)])
def test_phase_all_in_one_job_matches_three_jobs(
    pool: Pool, corpus: Path, tmp_path: Path, apart: Apart, world: int
) -> None:
    root = apart(world)
    results = pool.run(world, line(corpus, "all", tmp_path, f"parallel.tp={world}"))
    assert [result.status for result in results] == [0] * world, results[0].output[-2000:]
    same(tmp_path, root)
    first = json.loads((tmp_path / "decay/history.jsonl").read_text().splitlines()[0])
    assert first["init_from_relative"] == "../extend/checkpoints/step_000000003"
    # a finished chain has nothing left to train and exits with 0
    assert pool.run(world, line(corpus, "all", tmp_path, f"parallel.tp={world}"))[0].status == 0
    same(tmp_path, root)


@pytest.mark.parametrize(
    ("phase", "world"),
    [
        ("extend", 1),
        pytest.param("pretrain", 2, marks=pytest.mark.full),
        pytest.param("decay", 2, marks=pytest.mark.full),
    ],
)
def test_phase_all_stopped_within_a_phase_resumes_bit_identically(
    pool: Pool, corpus: Path, tmp_path: Path, apart: Apart, phase: str, world: int
) -> None:
    root = apart(world)
    words = line(corpus, "all", tmp_path, f"parallel.tp={world}")
    assert {result.status for result in pool.run(world, words, mutation=f"stop_in_{phase}")} == {75}
    assert read_progress(latest(tmp_path / phase))["step"] == 2
    assert [(tmp_path / later / "checkpoints").exists() for later in PHASES].count(True) == PHASES.index(phase) + 1
    assert {result.status for result in pool.run(world, words)} == {0}
    same(tmp_path, root)


@pytest.mark.full
def test_phase_all_stopped_between_phases_resumes_bit_identically(
    pool: Pool, corpus: Path, tmp_path: Path, apart: Apart
) -> None:
    """Interrupt the chain after extend has ended and before decay has begun."""
    world, root = 2, apart(2)
    words = line(corpus, "all", tmp_path, f"parallel.tp={world}")
    assert {result.status for result in pool.run(world, words, mutation="stop_in_extend")} == {75}
    assert read_progress(latest(tmp_path / "extend"))["step"] == 2
    assert not (tmp_path / "decay/checkpoints").exists()
    only = line(
        corpus, "extend", tmp_path / "extend", f"parallel.tp={world}", "--init-from", str(tmp_path / "pretrain")
    )
    assert {result.status for result in pool.run(world, only)} == {0}
    assert {result.status for result in pool.run(world, words)} == {0}
    same(tmp_path, root)


def test_phase_all_invalid_later_phase_is_refused_before_training(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    words = line(corpus, "all", tmp_path / "runs", f"decay.data.mixture={tmp_path / 'nowhere'}")
    (result,) = pool.run(1, words)
    assert result.status == 2
    assert str(tmp_path / "nowhere") in result.output.splitlines()[-1]
    assert not (tmp_path / "runs/pretrain/checkpoints").exists()
    (result,) = pool.run(1, [*line(corpus, "all", tmp_path / "runs"), "--from-step", "1"])
    assert result.status == 2
    assert "--from-step: is of one phase" in result.output


def test_train_phase_out_of_recipe_order_warns(pool: Pool, corpus: Path, tmp_path: Path, apart: Apart) -> None:
    first = str(apart(1) / "pretrain")
    words = line(corpus, "decay", tmp_path / "a", "run.steps=1", "--init-from", first)
    (result,) = pool.run(1, words)
    assert result.status == 0
    assert "warning: decay begins from pretrain; the recipe goes on from extend" in result.output
    (result,) = pool.run(1, line(corpus, "extend", tmp_path / "b", "run.steps=1"))
    assert result.status == 0
    assert "warning: extend begins from initial weights" in result.output
