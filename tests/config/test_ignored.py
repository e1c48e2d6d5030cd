"""Keys without effect are reported before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.cli.main import main


def reported(capsys: pytest.CaptureFixture[str], objective: str, phase: str, *words: str) -> str:
    """Return what a dry run says on standard error."""
    assert main(["train", "--size", "17m", "--objective", objective, "--phase", phase, "--dry-run", *words]) == 0
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("objective", "word", "why"),
    [
        ("clm", "data.mlm_probability=0.2", "clm masks no token"),
        ("clm", "model.encoder_window=32", "clm has no bidirectional rows"),
        ("mlm", "model.decoder_window_keys=32", "mlm has no causal rows"),
        ("mlm", "metrics.eval_every_steps=5", "data.validation is not set"),
        ("mlm", "optim.momentum=0.9", "optim.name is stable_adamw"),
    ],
)
def test_key_that_the_run_ignores_is_reported(
    capsys: pytest.CaptureFixture[str], objective: str, word: str, why: str
) -> None:
    key = word.partition("=")[0]
    assert f"{key}: has no effect, because {why}\n" in reported(capsys, objective, "pretrain", word)


def test_key_of_a_hybrid_run_that_reads_it_is_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("data.mlm_probability=0.2", "model.encoder_window=32", "model.decoder_window_keys=32")
    assert "has no effect" not in reported(capsys, "hybrid", "pretrain", *words)


def test_override_of_a_phase_that_is_not_run_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    word = "extend.optim.lr=1e-3"
    said = reported(capsys, "mlm", "pretrain", word)
    assert f"{word}: has no effect, because this run trains pretrain\n" in said
    assert "has no effect" not in reported(capsys, "mlm", "extend", word)
    assert "has no effect" not in reported(capsys, "mlm", "all", word)


def test_validation_without_a_cadence_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    said = reported(capsys, "mlm", "pretrain", "data.validation=somewhere")
    assert "data.validation: is evaluated at the end of the run only" in said


def test_key_in_the_file_of_both_halves_is_not_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    site = tmp_path / "pair.yaml"
    site.write_text("model: {encoder_window: 32, decoder_window_keys: 32}\n")
    for objective in ("mlm", "clm"):
        assert "has no effect" not in reported(capsys, objective, "pretrain", "--config", str(site))
