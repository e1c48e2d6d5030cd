"""`--phase all`: three phases in one job match three jobs bit for bit, wherever the job is interrupted."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ettin.checkpoint.directory import latest, read_progress
from megatron_ettin.cli.main import main
from tests.pool import Pool
from tests.train.runs import TINY, read

pytestmark = pytest.mark.ranks
Apart = Callable[[int], Path]
PHASES = ("pretrain", "extend", "decay")
OVERRIDES = [
    *("model.attention_output_dropout=0.1", "run.steps=4"),
    *("extend.data.seq_len=96", "extend.model.max_position_embeddings=96", "decay.data.seq_len=96"),
    *("decay.optim.lr=1e-3", "decay.schedule.name=one_minus_sqrt", "decay.schedule.decay_tokens=2000"),
    *("extend.run.steps=3", "decay.run.steps=3"),
]


def line(corpus: Path, phase: str, run_dir: Path, *more: str) -> list[str]:
    start = ["train", "--size", "17m", "--objective", "clm", "--phase", phase, "--run-dir", str(run_dir)]
    return [*start, *TINY, f"data.mixture={corpus}", *OVERRIDES, *more]


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
    """Return a function of the world size that returns the folder of the three phases, trained as three jobs."""

    @functools.cache
    def run(world: int) -> Path:
        root, before = tmp_path_factory.mktemp("apart"), []
        for phase in PHASES:
            arguments = line(corpus, phase, root / phase, f"parallel.tp={world}")
            results = pool.run(world, [*arguments, *before])
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
    arguments = line(corpus, "all", tmp_path, f"parallel.tp={world}")
    assert {result.status for result in pool.run(world, arguments, mutation=f"stop_in_{phase}")} == {75}
    assert read_progress(latest(tmp_path / phase))["step"] == 2
    assert [(tmp_path / later / "checkpoints").exists() for later in PHASES].count(True) == PHASES.index(phase) + 1
    assert {result.status for result in pool.run(world, arguments)} == {0}
    same(tmp_path, root)


@pytest.mark.full
def test_phase_all_stopped_between_phases_resumes_bit_identically(
    pool: Pool, corpus: Path, tmp_path: Path, apart: Apart
) -> None:
    """Interrupt the chain after extend has ended and before decay has begun."""
    world, root = 2, apart(2)
    arguments = line(corpus, "all", tmp_path, f"parallel.tp={world}")
    assert {result.status for result in pool.run(world, arguments, mutation="stop_in_extend")} == {75}
    assert read_progress(latest(tmp_path / "extend"))["step"] == 2
    assert not (tmp_path / "decay/checkpoints").exists()
    only = line(
        corpus, "extend", tmp_path / "extend", f"parallel.tp={world}", "--init-from", str(tmp_path / "pretrain")
    )
    assert {result.status for result in pool.run(world, only)} == {0}
    assert {result.status for result in pool.run(world, arguments)} == {0}
    same(tmp_path, root)


def test_phase_all_invalid_later_phase_is_refused_before_training(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    arguments = line(corpus, "all", tmp_path / "runs", f"decay.data.mixture={tmp_path / 'nowhere'}")
    (result,) = pool.run(1, arguments)
    assert result.status == 2
    assert str(tmp_path / "nowhere") in result.output.splitlines()[-1]
    assert not (tmp_path / "runs/pretrain/checkpoints").exists()
    (result,) = pool.run(1, [*line(corpus, "all", tmp_path / "runs"), "--from-step", "1"])
    assert result.status == 2
    assert "--from-step: needs one phase" in result.output


def test_train_phase_out_of_recipe_order_warns(pool: Pool, corpus: Path, tmp_path: Path, apart: Apart) -> None:
    first = str(apart(1) / "pretrain")
    arguments = line(corpus, "decay", tmp_path / "a", "run.steps=1", "--init-from", first)
    (result,) = pool.run(1, arguments)
    assert result.status == 0
    assert "warning: decay begins from pretrain; the recipe continues extend" in result.output
    (result,) = pool.run(1, line(corpus, "extend", tmp_path / "b", "run.steps=1"))
    assert result.status == 0
    assert "warning: extend begins from initial weights" in result.output


def test_train_one_phase_in_the_folder_of_a_chain_is_refused(
    pool: Pool, corpus: Path, tmp_path: Path, apart: Apart, capsys: pytest.CaptureFixture[str]
) -> None:
    root = apart(1)
    assert main(line(corpus, "pretrain", root)) == 2
    output = capsys.readouterr().err
    assert (
        f"{root}: holds the phases pretrain, extend, decay; give --run-dir {root / 'pretrain'}, or --phase all"
        in output
    )
    assert not (root / "config.yaml").exists()


def test_commands_with_folder_of_a_chain_read_its_last_phase(
    pool: Pool, corpus: Path, tmp_path: Path, apart: Apart, capsys: pytest.CaptureFixture[str]
) -> None:
    root, answers = apart(1), {}
    for arguments in (["order", "--fingerprint"], ["inspect"], ["eval", "--data", str(corpus / "heldout")]):
        for run in (root, root / "decay"):
            capsys.readouterr()
            assert main([arguments[0], str(run), *arguments[1:], "--json"]) == 0
            answer = capsys.readouterr()
            answers[arguments[0], run == root] = answer.out
            assert (f"{root}: holds pretrain, extend, decay; reading {root / 'decay'}" in answer.err) == (run == root)
        assert answers[arguments[0], True] == answers[arguments[0], False]
    assert main(["convert", "to-hf", str(root), str(tmp_path / "hf"), "--no-verify"]) == 0
    page = tmp_path / "page.html"
    assert main(["compare", str(root), "--out", str(page), "--json"]) == 0


def test_train_last_lines_name_checkpoint_and_next_command(pool: Pool, corpus: Path, apart: Apart) -> None:
    run = apart(1) / "decay"
    (result,) = pool.run(1, line(corpus, "decay", run))
    output = result.output.splitlines()
    complete = (
        f"{run}: complete by its record; nothing is left to train (run.tokens or run.steps would have to be more)"
    )
    # the line comes before the model is built, which prints the number of parameters
    assert output.index(complete) < next(at for at, one in enumerate(output) if "parameters" in one)
    assert output[-2].startswith(f"{run}: complete at step 3, ")
    assert output[-2].endswith(f"checkpoint {latest(run)}")
    assert output[-1] == f"next: ettin report {run}; ettin convert to-hf {run} OUT"
    (shorter,) = pool.run(1, [*line(corpus, "decay", run), "decay.run.steps=2"])
    assert f"{run}: complete by its record, and run.steps=2 is behind its step 3; nothing is left" in shorter.output


@pytest.mark.parametrize(
    "before", [[], ["launch", "--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1", "--dry-run", "--"]]
)
def test_cross_without_weights_is_refused(
    before: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*before, *line(corpus, "cross", tmp_path / "run")]) == 2
    assert (
        "--phase cross: trains on weights of the other objective; name them with --init-from" in capsys.readouterr().err
    )


def test_train_cross_from_the_same_objective_warns(
    corpus: Path, tmp_path: Path, apart: Apart, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*line(corpus, "cross", tmp_path / "run"), "--init-from", str(apart(1)), "--dry-run"]
    assert main(arguments) == 0
    assert "note: cross continues weights of the same objective, clm: a control" in capsys.readouterr().err
