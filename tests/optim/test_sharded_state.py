"""The boxes that cover a range of a flattened tensor, checked index by index."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_ettin.optim.sharded_state import shard_boxes


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 4), (4, 1), (2, 3, 4)])
def test_shard_boxes_cover_every_run_in_order_within_box_bound(shape: tuple[int, ...]) -> None:
    """Every range is covered in order by at most 2 x (dimensions - 1) + 1 boxes."""
    numbers = np.arange(np.prod(shape)).reshape(shape)
    for begin, end in itertools.combinations_with_replacement(range(numbers.size + 1), 2):
        boxes = list(shard_boxes(shape, begin, end))
        slices = [tuple(slice(a, a + n) for a, n in zip(offset, box, strict=True)) for offset, box in boxes]
        actual = np.concatenate([numbers[one].reshape(-1) for one in slices]) if boxes else np.empty(0, int)
        assert actual.tolist() == list(range(begin, end))
        assert len(boxes) <= 2 * len(shape) - 1


def test_shard_boxes_of_whole_rows_are_merged() -> None:
    assert list(shard_boxes((4, 6), 6, 24)) == [((1, 0), (3, 6))]
    assert list(shard_boxes((4, 6), 3, 20)) == [((0, 3), (1, 3)), ((1, 0), (2, 6)), ((3, 0), (1, 2))]
