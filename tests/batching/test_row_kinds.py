"""The number of causal rows in a hybrid step follows the share, on average and at every point of its schedule."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.batching.objectives import ObjectiveMix
from megatron_ettin.config.resolve import parse
from megatron_ettin.config.values import parse_points, share_at
from megatron_ettin.data.sampler import BatchSizes

SIZES = BatchSizes((8,), (0,))


def kinds(points: str, **changes: object) -> ObjectiveMix:
    return ObjectiveMix(("clm", "mlm"), parse_points(points, "k"), 21, "pretrain", 100.0, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "tokens", "share"),
    [
        ("0.25", 10**12, 0.25),
        ("0:1,10B:0.5", 0, 1.0),
        ("0:1, 10B:0.5", 5 * 10**9, 0.75),
        ("0:1,10B:0.5", 2 * 10**10, 0.5),
        ("1B:0.2,2B:0.4", 0, 0.2),
    ],
)
def test_share_at_interpolates_between_points(text: str, tokens: int, share: float) -> None:
    assert share_at(parse_points(text, "k"), tokens) == pytest.approx(share)


@pytest.mark.parametrize("text", ["1.5", "-0.1", "half", "0:1,0:0.5", "10B:1,5B:0", "0:", True, None, [0.5]])
def test_parse_points_invalid_share_is_refused(text: object) -> None:
    with pytest.raises(UserError, match=r"^k: "):
        parse_points(text, "k")


def test_objective_mix_pure_objective_has_all_or_no_causal_rows() -> None:
    assert ObjectiveMix(("clm",)).causal_rows(SIZES, 3) == 8
    assert ObjectiveMix(("mlm",)).causal_rows(SIZES, 3) == ObjectiveMix(("mntp",)).causal_rows(SIZES, 3) == 0


def test_objective_mix_fractional_row_is_rounded_at_random_by_seed() -> None:
    rule = kinds("0.3")
    counts = [rule.causal_rows(SIZES, step) for step in range(4000)]
    assert set(counts) == {2, 3}
    assert sum(counts) / len(counts) == pytest.approx(2.4, abs=4 * (0.24 / 4000) ** 0.5)
    again, other = kinds("0.3"), dataclasses.replace(rule, seed=22)
    assert counts == [again.causal_rows(SIZES, step) for step in range(4000)]
    assert counts != [other.causal_rows(SIZES, step) for step in range(4000)]


def test_objective_mix_causal_rows_follow_share_schedule() -> None:
    rule = kinds("0:1,8000:0")  # nominal tokens: ten steps of 8 rows of 100
    counts = [rule.causal_rows(SIZES, step) for step in range(12)]
    assert counts[0] == 8
    assert counts[10:] == [0, 0]
    assert all(abs(count - 8 * (1 - step / 10)) < 1 for step, count in enumerate(counts[:10]))


def test_clm_fraction_of_non_hybrid_or_above_one_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"data\.clm_fraction: needs objective hybrid, hybrid_mntp; all rows of mlm are alike"
    ):
        parse("17m", "mlm", "pretrain", overrides=["data.clm_fraction=0.5"])
    with pytest.raises(UserError, match=r"data\.clm_fraction: 2"):
        parse("17m", "hybrid", "pretrain", overrides=["data.clm_fraction=2"])
    assert parse("17m", "hybrid", "pretrain").data.clm_fraction == 0.5
