"""Losses and gradient norms of each objective's first steps against golden.json. A change of them changes every
published run. `ETTIN_WRITE_GOLDEN=1 python -m pytest tests/train/test_golden.py` rewrites the file; the commit must say
why they may change."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.pool import Pool
from tests.train.runs import train

pytestmark = pytest.mark.ranks
FILE = Path(__file__).with_name("golden.json")
OBJECTIVES = ("mlm", "clm", "mntp", "hybrid", "hybrid_mntp")
OVERRIDES = ["runtime.deterministic=true", "model.attention_output_dropout=0.1"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_train_deterministic_losses_match_golden_file(pool: Pool, corpus: Path, tmp_path: Path, objective: str) -> None:
    """A second run in this process is bit-identical. The file is matched within the fp32 rounding of other CPUs."""
    overrides = [*OVERRIDES, *(["data.clm_fraction=0.5"] if objective.startswith("hybrid") else [])]
    first = train(pool, 1, tmp_path / "first", corpus, objective, ["run.steps=12", *overrides])
    second = train(pool, 1, tmp_path / "second", corpus, objective, ["run.steps=4", *overrides])
    assert second.column("loss") == first.column("loss")[:4]
    assert second.column("grad_norm") == first.column("grad_norm")[:4]
    figures = {key: first.column(key) for key in ("loss", "grad_norm", "labels", "tokens")}
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("ETTIN_WRITE_GOLDEN"):
        FILE.write_text(json.dumps(known | {objective: figures}, indent=1) + "\n")
        return
    golden = known[objective]
    assert figures["labels"] == golden["labels"]
    assert figures["tokens"] == golden["tokens"]
    for key in ("loss", "grad_norm"):
        assert figures[key] == pytest.approx(golden[key], rel=1e-4 if key == "grad_norm" else 2e-5), key
