"""`--sweep`: each combination is an ordinary run in a folder of its own; a table and a picture summarize them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.cli.main import main
from megatron_ettin.config.overrides import members
from tests.pool import Pool
from tests.train.runs import command, read, train

pytestmark = pytest.mark.ranks
RATES = "--sweep=optim.lr=1e-3,3e-3"


def test_sweep_member_matches_single_run_and_best_is_marked(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    line = command(tmp_path / "sweep", corpus, "mlm", ["run.steps=2"], [RATES, "--sweep", "objective=mlm,clm"])
    results = pool.run(2, line)
    assert [result.status for result in results] == [0, 0], results[0].output[-2000:]
    names = [f"optim.lr={lr}_objective={objective}" for lr in ("1e-3", "3e-3") for objective in ("mlm", "clm")]
    alone = train(pool, 2, tmp_path / "alone", corpus, "clm", ["run.steps=2", "optim.lr=3e-3"])
    actual = read(tmp_path / "sweep" / names[3])
    assert actual.column("loss") == alone.column("loss")
    ours, theirs = actual.weights(), alone.weights()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    message = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [row["name"] for row in message] == names
    # the best of each objective: losses of different objectives do not compare
    for objective in ("mlm", "clm"):
        rows = [row for row in message if row["values"]["objective"] == objective]
        (best,) = [row for row in rows if row["best"]]
        assert best["final_loss"] == min(row["final_loss"] for row in rows)
    assert (tmp_path / "sweep/sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert all(name in results[0].output for name in names)
    assert "not begun" not in results[0].output
    # a second launch trains nothing
    before = {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("metrics.jsonl")}
    assert pool.run(2, line)[0].status == 0
    assert {path: path.read_bytes() for path in before} == before


def test_sweep_member_option_trains_only_that_member(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    line = command(tmp_path, corpus, "mlm", ["run.steps=1"], [RATES, "--sweep-member", "1"])
    (result,) = pool.run(1, line)
    assert result.status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optim.lr=3e-3", "sweep.json", "sweep.png"]
    assert "optim.lr=1e-3  not begun" in result.output


def test_sweep_diverging_member_does_not_stop_the_others(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    arguments = ["run.steps=3", "optim.name=adamw", "resilience.max_skips_in_row=0"]
    (result,) = pool.run(1, command(tmp_path, corpus, "mlm", arguments, ["--sweep", "optim.lr=1e30,1e-3"]))
    assert result.status == 0, result.output[-2000:]
    assert "Nothing of this step was saved" in result.output
    assert read(tmp_path / "optim.lr=1e-3").column("step") == [1, 2, 3]
    assert len(read(tmp_path / "optim.lr=1e30").column("step")) < 3


@pytest.mark.parametrize(
    ("sweeps", "output"),
    [
        (["optim.lr"], "write KEY=VALUE,VALUE,..."),
        (["optim.lr=1e-3,"], "write KEY=VALUE,VALUE,..."),
        (["optim.lrr=1,2"], "no such key (did you mean 'optim.lr'?)"),
        (["optim.lr=1,2", "optim.lr=3"], "optim.lr is swept twice"),
        (["optim.lr=1,1"], "values must differ"),
        (["data.mixture=a/b,c"], "have no slash"),
        (
            ["run.seed=" + ",".join(map(str, range(40))), "optim.lr=" + ",".join(map(str, range(40)))],
            "1600 combinations",
        ),
    ],
)
def test_sweep_invalid_definition_is_refused(sweeps: list[str], output: str) -> None:
    with pytest.raises(UserError) as refusal:
        members(sweeps)
    assert output in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "output"),
    [
        ([RATES, "--sweep-member", "2"], "--sweep-member 2: the sweep has runs 0 to 1"),
        (["--sweep-member", "0"], "--sweep-member: needs --sweep"),
        ([RATES, "--from-step", "1"], "--sweep: cannot be combined with --from-step"),
        (["--sweep", "optim.lr=1e-3,fast"], "optim.lr: 'fast' is not a number"),
    ],
)
def test_sweep_incompatible_options_are_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], output: str
) -> None:
    assert main(command(tmp_path / "sweep", corpus, "mlm", ["run.steps=1"], options)) == 2
    assert output in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "sweep").exists()
