"""Layers of pipeline stages against every possible split."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_ettin.config.flops import layer_operations, split_evenly
from megatron_ettin.config.layouts import stage_layers
from tests.config.test_resolve import parse


def dearest(costs: list[float], lengths: list[int]) -> float:
    ends = [0, *itertools.accumulate(lengths)]
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize("seed", range(20))
def test_split_evenly_matches_the_best_of_all_splits(seed: int) -> None:
    drawn = random.Random(seed)
    costs = [drawn.choice([1.0, 1.0, 1.7, drawn.random(), 9.0]) for _ in range(drawn.randint(4, 12))]
    stages = drawn.randint(1, 4)
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    every = [[b - a for a, b in itertools.pairwise([0, *cut, len(costs)])] for cut in cuts]
    found = split_evenly(costs, stages)
    assert sum(found) == len(costs)
    assert min(found) >= 1
    assert dearest(costs, found) == pytest.approx(min(dearest(costs, split) for split in every))


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
    pairs = {  # of query and key a token: both ways, or keys up to the token; within the window of a local layer
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
    """The splits of docs/layouts.md."""
    assert stage_layers(parse(size, objective, phase, overrides=["parallel.pp=4"])) == layers
