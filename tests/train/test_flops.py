"""FLOP counts against torch's counter on the real model, and attended pairs against explicit masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ettin.batching.batches import Batches
from megatron_ettin.config.flops import training_flops
from megatron_ettin.config.resolve import parse
from megatron_ettin.parallel.groups import destroy_model_parallel
from megatron_ettin.parallel.process_groups import destroy_process_group, release_store
from megatron_ettin.train.job import open_training_data
from megatron_ettin.train.setup import build_single_process
from tests.train.runs import TINY


def added(into, a, b, **_) -> int:  # type: ignore[no-untyped-def]
    return int(2 * a[0] * a[1] * b[1])


def pairs_of_mask(lengths: list[int], causal: bool, window: int | None) -> int:
    """Count the attended pairs in the explicit mask of a row with these chunk lengths."""
    chunk = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(chunk))
    seen = chunk[:, None] == chunk[None]
    distance = place[:, None] - place[None]
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= (distance < window) if causal else (np.abs(distance) <= window)
    return int(seen.sum())


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_training_flops_match_torch_flop_counter(corpus: Path, objective: str) -> None:
    words = [*TINY, f"data.mixture={corpus}", "run.fuse=never"]
    config = parse("17m", objective, "pretrain", overrides=words)
    train_state = build_single_process(config, training=True)
    try:
        batches = Batches.of(config, open_training_data(config), train_state.layout, train_state.platform.device)
        (batch, *_) = batches.step(0)
        # torch's counter has no entry for addmm_
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
            total, *_ = train_state.ddp_model_chunks[0](
                batch.input_ids, batch.packed, batch.labels, batch.label_positions
            )
            total.backward()
    finally:
        train_state.close()
        destroy_model_parallel()
        destroy_process_group()
        release_store()
    counted = counter.get_flop_counts()["Global"]
    dense = sum(value for name, value in counted.items() if "attention" not in str(name))
    model, labels = config.model, batch.labels.numel()
    rows = [[length for length in row if length] for row in lengths_of(batch)]
    window = config.windows[config.causal]
    of_global, of_local = (sum(pairs_of_mask(row, config.causal, reach) for row in rows) for reach in (None, window))
    assert batch.pairs == (of_global, of_local)
    # linear layers also run over padding, which training_flops does not count as work
    tokens = batch.input_ids.numel()
    assert dense == pytest.approx(training_flops(model, model.vocab_size, tokens, labels, 0, 0), rel=0.01)
    whole = training_flops(model, model.vocab_size, tokens, labels, *batch.pairs)
    far = -(-model.num_layers // 3)
    attention = 12 * model.hidden_size * (far * of_global + (model.num_layers - far) * of_local)
    assert whole - dense == pytest.approx(attention, rel=0.01)


def lengths_of(batch) -> list[list[int]]:  # type: ignore[no-untyped-def]
    """Return the chunk lengths of each row of a micro-batch, without the padding at its end."""
    rows, row = [], []
    padding = batch.input_ids.flatten()
    at = 0
    for length in batch.packed.chunk_lengths:
        tokens = padding[at : at + length]
        if not bool((tokens == tokens[0]).all()) or length == 1:
            row.append(length)
        at += length
        if at % batch.packed.seq_len == 0:
            rows.append(row)
            row = []
    assert at == len(padding)
    assert isinstance(batch.input_ids, torch.Tensor)
    return rows
