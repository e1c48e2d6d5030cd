"""Rows of padded batching are laid end to end: losses and dropout masks stay, and only a micro-batch's end is padded."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ettin.batching.batches import Batches
from megatron_ettin.config.resolve import parse
from megatron_ettin.model.dropout import token_keys
from megatron_ettin.model.packed import pack_rows
from megatron_ettin.parallel.groups import Layout
from megatron_ettin.parallel.topology import Topology
from megatron_ettin.train.job import open_training_data
from tests.train.runs import TINY


def batches_of(corpus: Path, objective: str, words: list[str]) -> Batches:
    words = [*TINY, f"data.mixture={corpus}", "data.batching=padded", *words]
    config = parse("17m", objective, "pretrain", overrides=words)
    layout = Layout(Topology.of(config, config.parallel.pp), 0, 0, 0, 0, 0, None, None, None)
    return Batches.of(config, open_training_data(config), layout, torch.device("cpu"))


@pytest.mark.parametrize("words", [["batch.micro_batch_rows=4"], ["data.seq_len=256"]])
def test_padded_batches_compute_no_padding_but_at_the_end(corpus: Path, words: list[str]) -> None:
    batches = batches_of(corpus, "mlm", words)
    positions = tokens = rows = 0
    for step in range(10):
        for batch in batches.step(step):
            assert batch.input_ids.numel() - batch.tokens < 16
            assert batch.input_ids.numel() % 16 == 0
            positions += batch.input_ids.numel()
            tokens += batch.tokens
        rows += batches.sizes.size_at(step)
    # with each row padded by itself
    assert rows * batches.row_tokens > 1.2 * positions


def test_padded_batches_of_pipeline_stages_have_one_shape_a_step(corpus: Path) -> None:
    batches = batches_of(corpus, "mlm", ["parallel.pp=2"])
    for step in range(5):
        actual = list(batches.step(step))
        (positions,) = {batch.input_ids.numel() for batch in actual}
        assert 0 <= positions - max(batch.tokens for batch in actual) < 16


@pytest.mark.parametrize("objective", ["mlm", "clm", "hybrid_mntp"])
def test_padded_batch_has_losses_of_rows_in_places_of_their_own(
    corpus: Path, build_model: Callable[[Any], Any], objective: str
) -> None:
    words = ["data.clm_fraction=0:0.5"] if objective == "hybrid_mntp" else []
    flat = batches_of(corpus, objective, ["batch.micro_batch_rows=8", *words])
    padded = dataclasses.replace(flat)
    padded.__dict__["host"] = dataclasses.replace(flat.host, flat_multiple=0)
    model = build_model(flat.config)
    actual = []
    for batches in (flat, padded):
        (batch,) = batches.step(3)
        _, losses, _ = model(batch.input_ids, batch.packed, batch.labels, batch.label_positions)
        actual.append((losses, batch.causal_labels, batch.tokens, batch.pairs))
    assert torch.allclose(actual[0][0], actual[1][0], atol=1e-5)
    assert actual[0][1:] == actual[1][1:]


def test_token_keys_of_flat_rows_equal_those_of_rows_of_their_own() -> None:
    lengths, slots = [40, 9, 64], [7, 8, 11]
    apart = token_keys(pack_rows([[n] for n in lengths], 64, slots=slots, dropout_key=5), 3, 0, 192).view(3, 64)
    expected = torch.cat([apart[i, :n] for i, n in enumerate(lengths)])
    for cp in (1, 2):
        packs = [
            pack_rows([lengths], 128, slots=slots, dropout_key=5, context=(rank, cp), flat=True) for rank in range(cp)
        ]
        size = 128 // cp
        # two calls a rank, as with sequence parallelism
        calls = itertools.product(packs, (0, size // 2))
        actual = torch.cat([token_keys(packed, 3, first, size // 2) for packed, first in calls])
        assert torch.equal(actual[: sum(lengths)], expected)
