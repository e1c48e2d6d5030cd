"""`resilience.in_process_restarts` with nvidia-resiliency-ext (where it is installed) and without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from tests.pool import Pool
from tests.ranks import Ranks
from tests.train.runs import command, read, train

INSTALLED = importlib.util.find_spec("nvidia_resiliency_ext") is not None
OVERRIDES = ["run.steps=14", "checkpoint.every_steps=10", "resilience.hang_seconds=20"]


@pytest.mark.skipif(INSTALLED, reason="the extra resilience is installed")
def test_in_process_restarts_without_nvidia_resiliency_ext_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "15000"}.items():
        monkeypatch.setenv(name, value)
    assert main(command(tmp_path / "run", corpus, "mlm", ["resilience.in_process_restarts=1"])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs nvidia-resiliency-ext" in line
    assert "megatron_ettin[resilience]" in line


def test_in_process_restarts_negative_is_refused(corpus: Path, tmp_path: Path, capsys) -> None:
    assert main(command(tmp_path / "run", corpus, "mlm", ["resilience.in_process_restarts=-1"])) == 2
    assert "resilience.in_process_restarts: -1 is not allowed" in capsys.readouterr().err


@pytest.mark.skipif(not INSTALLED, reason="wants the extra resilience")
def test_in_process_restart_after_error_on_one_rank_resumes_same_losses(
    pool: Pool, corpus: Path, tmp_path: Path
) -> None:
    overrides = [*OVERRIDES, "resilience.in_process_restarts=1"]
    ranks = Ranks(2, tmp_path / "logs", command(tmp_path / "run", corpus, "mlm", overrides), "fails_once_on_rank_1")
    try:
        assert ranks.wait(120) == [0, 0], ranks.output()
    finally:
        ranks.close()
    assert "a link went down" in ranks.output()
    assert "resumed step_000000010" in ranks.output()
    uninterrupted = train(pool, 2, tmp_path / "whole", corpus, "mlm", OVERRIDES)
    assert read(tmp_path / "run").column("loss") == uninterrupted.column("loss")


@pytest.mark.skipif(not INSTALLED, reason="wants the extra resilience")
def test_in_process_restarts_exhausted_fails_the_run(corpus: Path, tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "resilience.in_process_restarts=1"]
    ranks = Ranks(2, tmp_path / "logs", command(tmp_path / "run", corpus, "mlm", overrides), "fails_always_on_rank_1")
    try:
        assert ranks.wait(120) == [1, 1], ranks.output()
    finally:
        ranks.close()
    assert "resilience.in_process_restarts: all 1 used up" in ranks.output()
