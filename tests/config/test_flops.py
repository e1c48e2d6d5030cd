"""Operations against brute force, published figures and torch's counter; pipeline stages against every possible
split."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ettin.batching.batches import Batches
from megatron_ettin.config.flops import (
    attended_pairs,
    flops_per_token,
    layer_operations,
    split_evenly,
    training_flops,
)
from megatron_ettin.config.layouts import stage_layers
from megatron_ettin.config.resolve import parse
from megatron_ettin.config.tables import SIZES, VOCABULARY
from megatron_ettin.parallel.groups import destroy_model_parallel
from megatron_ettin.parallel.process_groups import destroy_process_group, release_store
from megatron_ettin.train.job import open_training_data
from megatron_ettin.train.setup import build_single_process
from tests.train.runs import TINY


def most_expensive(costs: list[float], lengths: list[int]) -> float:
    ends = [0, *itertools.accumulate(lengths)]
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize("seed", range(20))
def test_split_evenly_matches_the_best_of_all_splits(seed: int) -> None:
    drawn = random.Random(seed)
    costs = [drawn.choice([1.0, 1.0, 1.7, drawn.random(), 9.0]) for _ in range(drawn.randint(4, 12))]
    stages = drawn.randint(1, 4)
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    every = [[b - a for a, b in itertools.pairwise([0, *cut, len(costs)])] for cut in cuts]
    actual = split_evenly(costs, stages)
    assert sum(actual) == len(costs)
    assert min(actual) >= 1
    assert most_expensive(costs, actual) == pytest.approx(min(most_expensive(costs, split) for split in every))


def test_split_evenly_equal_layers_gives_equal_stages() -> None:
    assert split_evenly([0.1] * 12, 4) == [3, 3, 3, 3]
    assert sorted(split_evenly([0.1] * 11, 4)) == [2, 3, 3, 3]


@pytest.mark.parametrize("objective", ["mlm", "clm", "hybrid"])
@pytest.mark.parametrize("phase", ["pretrain", "extend"])
def test_layer_operations_match_hand_calculation(objective: str, phase: str) -> None:
    """1b: hidden size 1,792, gate and up 2 x 3,840, head over 50,368 tokens; global layers at 1, 4, 7, ..."""
    costs = layer_operations(parse("1b", objective, phase))
    linear = 2 * (4 * 1792 * 1792 + 3 * 1792 * 3840)
    tokens = 1024 if phase == "pretrain" else 8192
    pairs = {  # pairs of query and key per token: all, or keys up to the query; within the window for a local layer
        "mlm": (tokens, 129 - 64 * 65 / tokens),
        "clm": ((tokens + 1) / 2, 64 - 63 * 64 / 2 / tokens),
    }
    of_global, of_local = pairs.get(objective) or [(a + b) / 2 for a, b in zip(*pairs.values(), strict=True)]
    assert costs[0] == costs[3] == pytest.approx(linear + 4 * 1792 * of_global, rel=0.002)
    assert costs[1] == costs[2] == pytest.approx(linear + 4 * 1792 * of_local, rel=0.002)
    labelled = {"mlm": 0.3, "clm": 1.0, "hybrid": 0.65}[objective]
    assert costs[27] - costs[0] == pytest.approx(2 * labelled * 1792 * (1792 + 50368), rel=0.002)


@pytest.mark.parametrize(
    ("size", "objective", "phase", "layers"),
    [
        ("1b", "clm", "pretrain", [7, 8, 8, 5]),
        ("1b", "mlm", "extend", [7, 8, 7, 6]),
        ("400m", "clm", "extend", [8, 8, 8, 4]),
    ],
)
def test_stage_layers_give_the_last_stage_fewer_for_the_head(
    size: str, objective: str, phase: str, layers: list[int]
) -> None:
    """Match the layer counts in the table of docs/layouts.md."""
    assert stage_layers(parse(size, objective, phase, overrides=["parallel.pp=4"])) == layers


def brute_force_pairs(n: int, causal: bool, window: int | None) -> int:
    def seen(query: int, key: int) -> bool:
        if causal:
            return key <= query and (window is None or query - key < window)
        return window is None or abs(query - key) <= window

    return sum(seen(q, k) for q in range(n) for k in range(n))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("n", [1, 5, 6, 64, 65, 130])
def test_attended_pairs_match_brute_force(n: int, causal: bool, window: int | None) -> None:
    assert attended_pairs(n, causal, window) == brute_force_pairs(n, causal, window)


@pytest.mark.parametrize(
    ("size", "context", "causal", "gigaflops"),
    [("1b", 1024, False, 6.07), ("1b", 8192, False, 7.61), ("1b", 1024, True, 6.32), ("1b", 8192, True, 7.09)],
)
def test_flops_per_token_match_the_published_figures(size: str, context: int, causal: bool, gigaflops: float) -> None:
    """Match the published figures, for an encoder with labels at 30 % of positions."""
    actual = flops_per_token(SIZES[size], VOCABULARY, context, causal, 64, 1.0 if causal else 0.3)
    assert actual / 1e9 == pytest.approx(gigaflops, rel=0.005)


@pytest.mark.parametrize("size", SIZES)
def test_flops_per_token_of_one_token_match_the_linear_layers(size: str) -> None:
    """Count 6 operations per parameter of the layers' matrices, plus attention to one key; no head."""
    shape = SIZES[size]
    short = flops_per_token(shape, VOCABULARY, 1, True, 64, 0.0)
    attention = 12 * shape.hidden_size * shape.num_layers
    matrices = shape.num_layers * (4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.ffn_hidden_size)
    assert short == 6 * matrices + attention


def added(into, a, b, **_) -> int:  # type: ignore[no-untyped-def]
    return int(2 * a[0] * a[1] * b[1])


def pairs_of_mask(lengths: list[int], causal: bool, window: int | None) -> int:
    """Count the attended pairs in the explicit mask of a row with these chunk lengths."""
    chunk = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(chunk))
    seen = chunk[:, None] == chunk[None]
    distance = position[:, None] - position[None]
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= (distance < window) if causal else (np.abs(distance) <= window)
    return int(seen.sum())


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_training_flops_match_torch_flop_counter(corpus: Path, objective: str) -> None:
    arguments = [*TINY, f"data.mixture={corpus}", "runtime.compile=never"]
    config = parse("17m", objective, "pretrain", overrides=arguments)
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
