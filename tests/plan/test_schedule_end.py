"""A run's schedule follows its length, and the line about its end states the rates that training would use."""

from __future__ import annotations

import json
import shlex

import pytest

from megatron_ettin.cli import train as train_command
from megatron_ettin.cli.main import main
from megatron_ettin.config.resolve import SPAN, parse
from megatron_ettin.config.schema import Config
from megatron_ettin.plan.schedule_end import describe_end, end_tokens, fit_schedule, free_by_value, lr_at_end

FREE = frozenset(SPAN)


def fitted(phase: str, *arguments: str, free: frozenset[str] = FREE, row_tokens: float = 1_000.0) -> Config:
    return fit_schedule(parse("17m", "mlm", phase, overrides=arguments), free, row_tokens)


@pytest.mark.parametrize(("phase", "final"), [("extend", 0.5), ("decay", 0.04), ("cross", 0.02)])
def test_lr_at_end_of_shortened_run_matches_recipe(phase: str, final: float) -> None:
    for arguments in (["run.tokens=5B"], ["run.steps=40"], ["run.tokens=5B", "run.steps=30"], ["run.tokens=1T"]):
        config = fitted(phase, *arguments)
        assert lr_at_end(config, 1_000.0) == pytest.approx(final * config.optim.lr)


def test_fit_schedule_of_fewer_steps_keeps_the_recipes_shares() -> None:
    config = fitted("cross", "run.steps=50", row_tokens=8_000.0)
    end = 50 * 1_024 * 8_000
    assert config.schedule.end_tokens == end
    assert end_tokens(config, 8_000.0) == end
    assert config.schedule.warmup_tokens == 3 * end // 50
    assert config.schedule.decay_tokens == 10 * end // 50
    assert config.run == parse("17m", "mlm", "cross", overrides=["run.steps=50"]).run


def test_fit_schedule_steps_beyond_the_tokens_change_nothing() -> None:
    config = parse("17m", "mlm", "cross", overrides=["run.steps=1_000_000_000"])
    assert fit_schedule(config, FREE, 8_000.0) == config


def test_fit_schedule_keeps_user_warmup_tokens() -> None:
    config = fitted("cross", "run.steps=50", "schedule.warmup_tokens=7K", free=FREE - {"schedule.warmup_tokens"})
    assert config.schedule.warmup_tokens == 7_000
    assert config.schedule.decay_tokens == 10 * 50 * 1_024 * 1_000 // 50


def test_fit_schedule_keeps_user_end_tokens() -> None:
    config = fitted("cross", "run.steps=50", "schedule.end_tokens=100B", free=FREE - {"schedule.end_tokens"})
    assert config.schedule.warmup_tokens == 6 * 10**9
    assert config.schedule.end_tokens == 100 * 10**9


def test_fit_schedule_given_decay_longer_than_the_steps_ends_with_the_tokens() -> None:
    config = fitted("decay", "run.steps=2", "schedule.decay_tokens=10B", free=FREE - {"schedule.decay_tokens"})
    assert config.schedule.end_tokens is None


def test_fit_schedule_keeps_share_of_batch_warmup() -> None:
    """The tokens of 20 steps depend on the batch warm-up, whose length is a share of these tokens."""
    arguments = ["run.tokens=100M", "batch.warmup_tokens=50M", "run.steps=20"]
    config = fit_schedule(parse("17m", "mlm", "pretrain", overrides=arguments), FREE, 1_024.0)
    assert config.batch.warmup_tokens == pytest.approx(end_tokens(config, 1_024.0) / 2, rel=0.05)


def test_free_by_value_names_keys_at_recipe_values() -> None:
    config = parse("17m", "mlm", "cross", overrides=["run.tokens=5B", "schedule.decay_tokens=2B"])
    assert free_by_value(config) == FREE - {"schedule.decay_tokens"}


def test_describe_end_says_shares_and_rate() -> None:
    arguments = ["schedule.name=wsd", "schedule.warmup_tokens=1M", "schedule.decay_tokens=10M", "run.tokens=100M"]
    config = parse("17m", "mlm", "pretrain", overrides=[*arguments, "run.steps=47"])
    assert describe_end(config, 1_000_000 / 2816 * 2) == (
        "wsd ends after about 94M tokens, at 100 % of warm-up (1M), 40 % of decay (10M); the rate there is 0.608 of"
        " optim.lr 0.003"
    )


def test_train_help_example_ends_at_the_full_rate(capsys: pytest.CaptureFixture[str]) -> None:
    """Newcomers run this example first. With the whole phase's warm-up its last rate was 6.7e-6."""
    example = next(line for line in str(train_command.__doc__).splitlines() if line.startswith("  ettin train"))
    arguments = shlex.split(example)[1:]
    assert "run.steps=100" in arguments
    assert main([*arguments, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lr_at_end"] == 3e-3


def test_dry_run_says_where_the_run_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--size", "17m", "--objective", "mlm", "--phase", "decay", "--dry-run", "run.steps=9"]) == 0
    captured = capsys.readouterr()
    assert "schedule        one_minus_sqrt ends after about 75.5M tokens, at 100 % of decay (75.5M)" in captured.out
    output = "run.steps 9 ends before run.tokens 50,000,000,000, and the schedule with it, for rows of 8,192 tokens: "
    assert output in captured.err


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ("data.seq_len=8192", "data.seq_len 8,192: 352 rows a step have up to 2,883,584 tokens, 1 x the recipe's"),
        ("data.seq_len=1M", "warning: data.seq_len 1,000,000: 3 rows a step"),
        ("data.seq_len=2048 --recipe=original", "4,608 rows a step have up to 9,437,184 tokens, 2 x the recipe's"),
        ("data.seq_len=1M batch.global_batch_rows=2816", "88 rows of 1,000,000 tokens at a time; a b200 has 180"),
        ("optim.lr=8", "warning: optim.lr 8 is 2,667 x the recipe's 0.003"),
    ],
)
def test_train_value_far_from_the_recipe_is_reported(
    arguments: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--size", "17m", "--objective", "mlm", "--phase", "pretrain", "--dry-run", *arguments.split()]
    assert main(command) == 0
    assert output in capsys.readouterr().err
