"""The learning rates of real runs: a short run comes through the recipe's whole schedule, and a run that has begun keeps
its own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_ettin.config.resolve import from_yaml
from tests.pool import Pool
from tests.train.runs import train

# the recipe's keys of the schedule, which the tiny runs of the other tests set
UNSET = ("schedule.", "batch.warmup_tokens")
STEPS = 10


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the schedule's keys out of the tiny shape's words, so that it is the recipe's."""
    from tests.train import runs

    monkeypatch.setattr(runs, "TINY", [word for word in runs.TINY if not word.startswith(UNSET)])


@pytest.mark.ranks
@pytest.mark.usefixtures("unset")
def test_train_few_steps_of_the_recipes_schedule_learns(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """With the warm-up of 1.7T tokens its rate was 1e-8, and nothing was learnt."""
    run = train(pool, 1, tmp_path / "run", corpus, "mlm", [f"run.steps={STEPS}"])
    assert run.column("lr")[1:] == [3e-3] * (STEPS - 1)
    assert run.column("loss")[-1] < run.column("loss")[0] - 0.3


@pytest.mark.ranks
@pytest.mark.usefixtures("unset")
def test_train_few_steps_decay_to_the_final_rate_and_resume_keeps_the_schedule(
    pool: Pool, corpus: Path, tmp_path: Path
) -> None:
    decay = ["--phase", "decay"]
    run = train(pool, 1, tmp_path / "run", corpus, "mlm", [f"run.steps={STEPS}"], decay)
    last = 0.04 + 0.96 * (1 - math.sqrt(1 - 1 / STEPS))
    assert run.column("lr")[-1] / 3e-3 == pytest.approx(last, rel=0.05)
    schedule = from_yaml(tmp_path / "run" / "config.yaml").schedule
    assert schedule.decay_tokens == schedule.end_tokens
    more = train(pool, 1, tmp_path / "run", corpus, "mlm", [f"run.steps={STEPS + 3}"], decay)
    assert from_yaml(tmp_path / "run" / "config.yaml").schedule == schedule
    assert more.column("lr")[-1] == pytest.approx(0.04 * 3e-3)


@pytest.mark.ranks
@pytest.mark.usefixtures("unset")
def test_resume_of_an_earlier_version_keeps_its_schedule(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """It had the whole phase's decay in a run of a tenth, from the first token on, and a batch warm-up."""
    decay, path = ["--phase", "decay"], tmp_path / "run" / "config.yaml"
    words = ["run.tokens=10K", "batch.warmup_min_rows=4"]
    old = ["schedule.decay_tokens=100K", "schedule.end_tokens=100K", "batch.warmup_tokens=2K"]
    train(pool, 1, tmp_path / "run", corpus, "mlm", [*words, *old, "run.steps=5"], decay)
    before = from_yaml(path)
    path.write_text(path.read_text().replace("  end_tokens: 100000\n", ""))
    run = train(pool, 1, tmp_path / "run", corpus, "mlm", words, decay)
    after = from_yaml(path)
    assert (after.schedule, after.batch) == (before.schedule, before.batch)
    begins = [0, *run.column("tokens")[:-1]]
    wanted = [3e-3 * (0.04 + 0.96 * (1 - math.sqrt(tokens / 100_000))) for tokens in begins]
    assert run.column("lr") == pytest.approx(wanted)
