"""Micro-batches on the device: with padded batching they are padded at their end only, alike on all pipeline stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ettin.batching.batches import Batches
from megatron_ettin.config.resolve import parse
from megatron_ettin.parallel.env import Topology
from megatron_ettin.parallel.groups import Layout
from megatron_ettin.train.job import open_training_data
from tests.train.runs import TINY


def batches_of(corpus: Path, objective: str, overrides: list[str]) -> Batches:
    overrides = [*TINY, f"data.mixture={corpus}", "data.batching=padded", *overrides]
    config = parse("17m", objective, "pretrain", overrides=overrides)
    layout = Layout(Topology.of(config, config.parallel.pp), 0, 0, 0, 0, 0, None, None, None)
    return Batches.of(config, open_training_data(config), layout, torch.device("cpu"))


@pytest.mark.parametrize("overrides", [["batch.micro_batch_rows=4"], ["data.seq_len=256"]])
def test_padded_batches_compute_no_padding_but_at_the_end(corpus: Path, overrides: list[str]) -> None:
    batches = batches_of(corpus, "mlm", overrides)
    positions = tokens = rows = 0
    for step in range(10):
        for batch in batches.step(step):
            assert batch.input_ids.numel() - batch.tokens < 16
            assert batch.input_ids.numel() % 16 == 0
            positions += batch.input_ids.numel()
            tokens += batch.tokens
        rows += batches.sizes.size_at(step)
    # with each row padded by itself
    assert rows * batches.host.row_tokens > 1.2 * positions


def test_padded_batches_of_pipeline_stages_have_one_shape_a_step(corpus: Path) -> None:
    batches = batches_of(corpus, "mlm", ["parallel.pp=2"])
    for step in range(5):
        actual = list(batches.step(step))
        (positions,) = {batch.input_ids.numel() for batch in actual}
        assert 0 <= positions - max(batch.tokens for batch in actual) < 16


def test_batches_step_out_of_order_while_prefetching_is_made_in_process(corpus: Path) -> None:
    """A step that the replay check repeats while the loader prefetches the next one is made in this process."""
    batches = batches_of(corpus, "mlm", [])
    expected = [[batch.labels.tolist() for batch in batches.step(step)] for step in (0, 0, 1)]
    with batches.prefetched(0, None):
        actual = [[batch.labels.tolist() for batch in batches.step(step)] for step in (0, 0, 1)]
    assert actual == expected
