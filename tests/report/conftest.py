"""Fixture: a tiny pair of two phases each; the encoder has a restart and a step with NaN gradients."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from tests.pool import Pool
from tests.train.runs import train

OVERRIDES = ["metrics.eval_every_steps=2", "metrics.ranks_every_steps=2", "checkpoint.weights_every_tokens=1000"]


@pytest.fixture(scope="session")
def trained(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with mlm and clm, each with pretrain and extend, and with mlm/hf, exported from mlm/extend."""
    root = tmp_path_factory.mktemp("trained")
    overrides = [*OVERRIDES, f"data.validation={corpus}/heldout"]
    for objective, world in (("mlm", 2), ("clm", 1)):
        first = root / objective / "pretrain"
        if objective == "mlm":
            train(
                pool, world, first, corpus, objective, [*overrides, "run.steps=4"], mutation="nan_gradients_in_step_3"
            )
        train(pool, world, first, corpus, objective, [*overrides, "run.steps=6"])
        later = ["--phase", "extend", "--init-from", str(first)]
        train(pool, world, root / objective / "extend", corpus, objective, [*overrides, "run.steps=3"], later)
    assert main(["convert", "to-hf", str(root / "mlm" / "extend"), str(root / "mlm" / "hf")]) == 0
    return root
