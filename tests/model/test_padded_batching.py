"""Rows of padded batching have the same losses laid end to end as one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.batching.test_batches import batches_of


@pytest.mark.parametrize("objective", ["mlm", "clm", "hybrid_mntp"])
def test_padded_batch_has_losses_of_rows_laid_out_one_by_one(
    corpus: Path, build_model: Callable[[Any], Any], objective: str
) -> None:
    overrides = ["data.clm_fraction=0:0.5"] if objective == "hybrid_mntp" else []
    flat = batches_of(corpus, objective, ["batch.micro_batch_rows=8", *overrides])
    padded = dataclasses.replace(flat, host=dataclasses.replace(flat.host, flat_multiple=0))
    model = build_model(flat.config)
    actual = []
    for batches in (flat, padded):
        (batch,) = batches.step(3)
        _, losses, _ = model(batch.input_ids, batch.packed, batch.labels, batch.label_positions)
        actual.append((losses, batch.causal_labels, batch.tokens, batch.pairs))
    assert torch.allclose(actual[0][0], actual[1][0], atol=1e-5)
    assert actual[0][1:] == actual[1][1:]
