"""Rows of a step are spread evenly over data-parallel ranks and their micro-batches."""

from __future__ import annotations

import itertools

import pytest

from megatron_ettin.config.layouts import RowSplit, describe_empty_rows, full_batch_split
from megatron_ettin.config.resolve import parse

CASES_WITHOUT_VPP, CASES_WITH_VPP = (
    [
        RowSplit.of(rows, dp, most, group)
        for rows, dp, most in itertools.product((1, 2, 5, 7, 8, 15, 88, 93), (1, 2, 3, 4, 16, 32), (1, 2, 5, 16))
    ]
    for group in (1, 4)
)
CASES = [*CASES_WITHOUT_VPP, *CASES_WITH_VPP]


def rank_rows(split: RowSplit, rank: int) -> list[int]:
    return [slot for index in range(split.count) for slot in split.slots(rank, index)]


def test_row_split_slots_hold_each_row_once() -> None:
    for split in CASES:
        slots = sorted(slot for rank in range(split.dp) for slot in rank_rows(split, rank))
        assert slots == list(range(split.rows)), split


def test_row_split_ranks_and_micro_batches_have_equal_rows() -> None:
    for split in CASES:
        of_ranks = [len(rank_rows(split, rank)) for rank in range(split.dp)]
        assert max(of_ranks) - min(of_ranks) <= 1, split
        sizes = [len(split.slots(rank, index)) for rank in range(split.dp) for index in range(split.count)]
        assert max(sizes) <= split.size, split


def test_row_split_without_vpp_rank_has_at_most_a_micro_batch_of_empty_slots() -> None:
    for split in CASES_WITHOUT_VPP:
        slots = split.count * split.size
        empty = [slots - len(rank_rows(split, rank)) for rank in range(split.dp)]
        assert empty[0] < split.size, split
        assert max(empty) <= split.size, split


def test_row_split_of_dividing_rows_deals_out_consecutive_micro_batches() -> None:
    """If everything divides, full micro-batches go to the ranks in turn, as in earlier versions: losses keep their
    bits."""
    split = RowSplit.of(48, 4, 3)
    assert split.empty == 0
    for rank, index in itertools.product(range(4), range(4)):
        start = (index * 4 + rank) * 3
        assert split.slots(rank, index) == range(start, start + 3)


@pytest.mark.parametrize(
    ("size", "dp", "share"), [("17m", 64, 0), ("68m", 32, 0), ("1b", 128, 0), ("1b", 512, 0.0834), ("68m", 8, 0.006)]
)
def test_recipe_batch_on_many_ranks_leaves_few_slots_empty(size: str, dp: int, share: float) -> None:
    split = full_batch_split(parse(size, "mlm", "pretrain"), dp)
    assert split.empty / split.capacity <= share


def test_describe_empty_rows_names_slots_without_rows() -> None:
    config = parse("1b", "mlm", "pretrain")
    assert describe_empty_rows(config, 64) == (
        "2,816 rows on dp 64, 3 micro-batches of 15 each: 64 row slots of a step are empty (2.2% of the work)"
    )
    assert describe_empty_rows(config, 128) is None
