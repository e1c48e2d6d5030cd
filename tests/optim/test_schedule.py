"""Schedules against the recipe's formulae at a thousand points, and the learning rates of real runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_ettin.config.recipe import recipe
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.config.schema import ScheduleConfig
from megatron_ettin.optim.schedule import lr_fraction
from tests.pool import Pool
from tests.train.runs import train

TOTAL = 1_000_000
# prefixes of overrides that TINY sets and that these tests leave to the recipe
UNSET = ("schedule.", "batch.warmup_tokens")
STEPS = 10


def points() -> list[int]:
    return [TOTAL * i // 1000 for i in range(1001)]


def test_lr_fraction_wsd_matches_formula() -> None:
    schedule = ScheduleConfig("wsd", 50_000, 200_000, 0.02)
    for t in points():
        if t < 50_000:
            expected = 1e-10 + t / 50_000 * (1 - 1e-10)
        elif t <= 800_000:
            expected = 1.0
        else:
            expected = 1 - (t - 800_000) / 200_000 * 0.98
        assert lr_fraction(t, schedule, TOTAL) == pytest.approx(expected, rel=1e-12)


def test_lr_fraction_wsd_without_decay_stays_at_one() -> None:
    assert lr_fraction(TOTAL, ScheduleConfig("wsd", 10, 0, 0.02), TOTAL) == 1.0


@pytest.mark.parametrize("final", [0.5, 0.04])
def test_lr_fraction_one_minus_sqrt_matches_formula(final: float) -> None:
    schedule = ScheduleConfig("one_minus_sqrt", 0, TOTAL, final)
    for t in points():
        expected = final + (1 - final) * (1 - math.sqrt(t / TOTAL))
        assert lr_fraction(t, schedule, TOTAL) == pytest.approx(expected, rel=1e-12)
    # after the end the rate stays at the final fraction
    assert lr_fraction(2 * TOTAL, schedule, TOTAL) == final


def test_lr_fraction_one_minus_sqrt_decays_over_the_last_tokens() -> None:
    schedule = ScheduleConfig("one_minus_sqrt", 0, 200_000, 0.04)
    for t in points():
        expected = 1.0 if t <= 800_000 else 0.04 + 0.96 * (1 - math.sqrt((t - 800_000) / 200_000))
        assert lr_fraction(t, schedule, TOTAL) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["wsd", "one_minus_sqrt"])
def test_lr_fraction_with_end_tokens_ends_its_decay_there(name: str) -> None:
    short = ScheduleConfig(name, 0, 200_000, 0.04, end_tokens=500_000)
    full = ScheduleConfig(name, 0, 200_000, 0.04)
    for t in range(0, 500_000, 10_000):
        assert lr_fraction(t, short, TOTAL) == lr_fraction(t, full, 500_000)
    assert lr_fraction(TOTAL, short, TOTAL) == pytest.approx(0.04)


def test_lr_fraction_constant_is_one_and_half_midway_through_warmup() -> None:
    assert lr_fraction(0, ScheduleConfig("constant", 0, 0, 0.0), TOTAL) == 1.0
    assert lr_fraction(5, ScheduleConfig("constant", 10, 0, 0.0), TOTAL) == pytest.approx(0.5)


def test_recipe_phases_chain_learning_rates_without_jump() -> None:
    """The rate goes from pretrain's peak to half of it after extend and 0.02 of it after decay, without jumps."""
    pretrain, extend, decay = (recipe("150m", "clm", phase) for phase in ("pretrain", "extend", "decay"))
    last = [
        config.optim.lr * lr_fraction(config.run.tokens, config.schedule, config.run.tokens)
        for config in (pretrain, extend, decay)
    ]
    first = [config.optim.lr * lr_fraction(0, config.schedule, config.run.tokens) for config in (extend, decay)]
    assert last == pytest.approx([8e-4, 4e-4, 1.6e-5])
    assert first == pytest.approx(last[:2])


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the schedule's overrides from TINY, so that runs have the recipe's schedule."""
    from tests.train import runs

    monkeypatch.setattr(runs, "TINY", [word for word in runs.TINY if not word.startswith(UNSET)])


@pytest.mark.ranks
@pytest.mark.usefixtures("unset")
def test_train_few_steps_with_recipe_schedule_lowers_loss(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """The warm-up follows the run's length. With that of 1.7T tokens the rate would be 1e-8 and teach nothing."""
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
    """A run of an earlier version resumes with the whole phase's decay, from its first token on, and a batch
    warm-up."""
    decay, path = ["--phase", "decay"], tmp_path / "run" / "config.yaml"
    overrides = ["run.tokens=10K", "batch.warmup_min_rows=4"]
    old = ["schedule.decay_tokens=100K", "schedule.end_tokens=100K", "batch.warmup_tokens=2K"]
    train(pool, 1, tmp_path / "run", corpus, "mlm", [*overrides, *old, "run.steps=5"], decay)
    before = from_yaml(path)
    path.write_text(path.read_text().replace("  end_tokens: 100000\n", ""))
    run = train(pool, 1, tmp_path / "run", corpus, "mlm", overrides, decay)
    after = from_yaml(path)
    assert (after.schedule, after.batch) == (before.schedule, before.batch)
    begins = [0, *run.column("tokens")[:-1]]
    wanted = [3e-3 * (0.04 + 0.96 * (1 - math.sqrt(tokens / 100_000))) for tokens in begins]
    assert run.column("lr") == pytest.approx(wanted)
