"""Every difference from the original trainer has a reason, for every combination of the recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.config.explain import differences
from megatron_ettin.config.recipe import PHASES, recipe
from megatron_ettin.config.resolve import parse
from megatron_ettin.config.tables import OBJECTIVES, SIZES
from tests.config.test_tables import BATCH_WARMUP

THE_48 = [(size, objective, phase) for size in SIZES for objective in ("mlm", "clm") for phase in PHASES]
# only the smallest and the largest size have special keys; test_tables.py covers the others
FIRST_AND_48 = [pytest.param(*one, marks=[] if one[0] in ("17m", "1b") else pytest.mark.full) for one in THE_48]


@pytest.mark.parametrize(("size", "objective", "phase"), FIRST_AND_48)
def test_differences_every_combination_has_a_reason(size: str, objective: str, phase: str) -> None:
    actual = differences(parse(size, objective, phase), {})
    assert [one.key for one in actual if not one.why] == []
    keys = {one.key for one in actual}
    assert {"data.batching", "batch.loss_normalization", "batch.global_batch_rows"} <= keys
    assert ("run.objective" in keys) == ((objective, phase) == ("mlm", "cross"))
    assert differences(parse(size, objective, phase, overrides=["run.recipe=original"]), {}) == []


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_explain_key_set_by_user_names_the_override(objective: str, capsys) -> None:
    arguments = ["optim.lr=1e-3", "data.seq_len=512", "batch.global_batch_rows=64"]
    assert (
        main(
            ["train", "--size", "17m", "--objective", objective, "--phase", "decay", "--explain", "--json", *arguments]
        )
        == 0
    )
    message = json.loads(capsys.readouterr().out)
    why = {one["key"]: one["why"] for one in message["keys"]}
    assert why["optim.lr"] == "set by `optim.lr=1e-3`"
    assert why["optim.weight_decay_reference_lr"] == "set by optim.lr, which it follows (`optim.lr=1e-3`)"
    assert why["data.seq_len"] == "set by `data.seq_len=512`"
    assert len(message["always"]) > 4


def test_explain_text_shows_differences_and_reasons(capsys, tmp_path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("model: {attention_output_dropout: 0}\n")
    assert (
        main(["train", "--size", "17m", "--objective", "clm", "--phase", "decay", "--explain", "--config", str(site)])
        == 0
    )
    out = capsys.readouterr().out
    assert "model.local_rope_theta: 160000.0 (original: 10000.0)\n    one base for both objectives" in out
    assert f"model.attention_output_dropout: 0.0 (original: 0.1)\n    set by {site}" in out
    assert "NO REASON" not in out
    # a decoder's rows have no masks
    assert "what no key reproduces:\n  data order:" in out
    assert main(["train", "--size", "17m", "--objective", "mlm", "--phase", "decay", "--explain"]) == 0
    assert "what no key reproduces:\n  masks:" in capsys.readouterr().out
    arguments = ["--recipe", "original"]
    assert main(["train", "--size", "17m", "--objective", "clm", "--phase", "decay", "--explain", *arguments]) == 0
    assert "recipe original: 0 keys differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "phase", "arguments", "output"),
    [
        ("17m", "pretrain", [], "configure 125,000,000,000 tokens from 144 sequences"),
        ("17m", "pretrain", [], "batch.warmup_tokens=125B batch.warmup_min_rows=88 trains as configured"),
        ("1b", "cross", [], "batch.warmup_tokens=10B batch.warmup_min_rows=2 trains as configured"),
        ("17m", "cross", ["batch.warmup_tokens=1B"], "batch warm-up: 1,000,000,000 tokens (original: none;"),
        ("150m", "pretrain", ["--recipe=original"], "min_rows=72 batch.loss_normalization=global trains as configured"),
        ("17m", "decay", [], "ends of chunks: [SEP] ends every chunk, of both objectives"),
    ],
)
def test_explain_names_what_no_published_run_did(
    size: str, phase: str, arguments: list[str], output: str, capsys
) -> None:
    assert main(["train", "--size", size, "--objective", "clm", "--phase", phase, "--explain", *arguments]) == 0
    assert output in capsys.readouterr().out


@pytest.mark.parametrize("size", ["17m", "1b"])
def test_explained_override_trains_as_configured(size: str, capsys) -> None:
    """The override that `--explain` names is accepted and gives the batch warm-up of the published files."""
    for phase in ("pretrain", "cross"):
        command = ["train", "--size", size, "--objective", "mlm", "--phase", phase]
        assert main([*command, "--explain", "--json"]) == 0
        why = next(
            one["why"] for one in json.loads(capsys.readouterr().out)["always"] if one["what"] == "batch warm-up"
        )
        arguments = [word for word in why.split() if word.startswith("batch.")]
        batch = parse(size, "mlm", phase, overrides=arguments).batch
        assert batch.warmup_tokens == (10e9 if phase == "cross" else BATCH_WARMUP[size])


def test_dry_run_default_has_the_full_batch_in_every_step(capsys) -> None:
    """1.7T tokens are 589,545 steps of 2,816 full rows; with the batch warm-up that was never applied, 725,649."""
    command = ["train", "--size", "17m", "--objective", "mlm", "--phase", "pretrain", "--dry-run", "--json"]
    steps = []
    for arguments in ([], ["batch.warmup_tokens=125B"]):
        assert main([*command, *arguments]) == 0
        steps.append(json.loads(capsys.readouterr().out)["steps"])
    assert steps == [589_545, 725_649]


def test_original_recipe_has_published_values() -> None:
    config = recipe("150m", "clm", "pretrain", name="original")
    assert (config.data.batching, config.data.seq_len, config.batch.global_batch_rows) == ("padded", 1024, 4608)
    assert (config.batch.warmup_tokens, config.batch.loss_normalization) == (0, "microbatch")
    assert (config.model.decoder_window_keys, config.model.output_bias_init) == (65, "uniform")
    assert recipe("150m", "clm", "extend", name="original").data.seq_len == 7999
    assert recipe("17m", "clm", "decay", name="original").model.local_rope_theta == 10_000
    assert recipe("17m", "mlm", "decay", name="original").model.local_rope_theta == 160_000
    assert recipe("17m", "mlm", "cross", name="original").run.objective == "mntp"
    assert recipe("17m", "clm", "cross", name="original").run.objective == "clm"


def test_dry_run_original_recipe_gives_published_step_count(capsys) -> None:
    arguments = [
        "train",
        "--size",
        "400m",
        "--objective",
        "mlm",
        "--phase",
        "pretrain",
        "--recipe",
        "original",
        "--dry-run",
    ]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 599_525
    assert main([*arguments, "--json", "data.mean_tokens_per_row=300"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1_229_746  # 1.7T / (4608 x 300), rounded up


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["--recipe", "originall"], "--recipe: 'originall' does not exist (did you mean 'original'?)"),
        (["run.recipe=ettin"], "recipe 'ettin' does not exist; it is one of paired, original"),
        (["data.mean_tokens_per_row=0"], "data.mean_tokens_per_row: 0.0 is not allowed; it must be above 0"),
        (["model.output_bias_init=ones"], "model.output_bias_init: 'ones' does not exist"),
    ],
)
def test_explain_bad_recipe_or_value_is_refused(arguments: list[str], output: str, capsys) -> None:
    assert main(["train", "--size", "17m", "--objective", "clm", "--phase", "decay", "--explain", *arguments]) == 2
    assert output in capsys.readouterr().err


def reported(capsys: pytest.CaptureFixture[str], objective: str, phase: str, *arguments: str) -> str:
    """Return the standard error of a dry run."""
    assert main(["train", "--size", "17m", "--objective", objective, "--phase", phase, "--dry-run", *arguments]) == 0
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("objective", "word", "why"),
    [
        ("clm", "data.mlm_probability=0.2", "clm masks no token"),
        ("clm", "model.encoder_window=32", "clm has no bidirectional rows"),
        ("mlm", "model.decoder_window_keys=32", "mlm has no causal rows"),
        ("mlm", "metrics.eval_every_steps=5", "data.validation is not set"),
        ("mlm", "optim.momentum=0.9", "optim.name is stable_adamw"),
        ("mlm", "data.tokenizer=folder", "the tokenizer is the one that the datasets were made with"),
    ],
)
def test_key_that_the_run_ignores_is_reported(
    capsys: pytest.CaptureFixture[str], objective: str, word: str, why: str
) -> None:
    key = word.partition("=")[0]
    assert f"{key}: has no effect, because {why}\n" in reported(capsys, objective, "pretrain", word)


def test_key_of_a_hybrid_run_that_reads_it_is_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("data.mlm_probability=0.2", "model.encoder_window=32", "model.decoder_window_keys=32")
    assert "has no effect" not in reported(capsys, "hybrid", "pretrain", *arguments)


def test_override_of_a_phase_that_is_not_run_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    word = "extend.optim.lr=1e-3"
    output = reported(capsys, "mlm", "pretrain", word)
    assert f"{word}: has no effect, because this run trains pretrain\n" in output
    assert "has no effect" not in reported(capsys, "mlm", "extend", word)
    assert "has no effect" not in reported(capsys, "mlm", "all", word)


def test_validation_without_a_cadence_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    output = reported(capsys, "mlm", "pretrain", "data.validation=somewhere")
    assert "data.validation: is evaluated at the end of the run only" in output


def test_unused_key_in_user_config_is_not_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    site = tmp_path / "pair.yaml"
    site.write_text("model: {encoder_window: 32, decoder_window_keys: 32}\n")
    for objective in ("mlm", "clm"):
        assert "has no effect" not in reported(capsys, objective, "pretrain", "--config", str(site))
