"""Shares over tokens are read from YAML lists and from the older texts (`0:1,10B:0.5`), with the same result."""

from __future__ import annotations

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.values import parse_points, share_at, share_points


@pytest.mark.parametrize(
    ("value", "tokens", "share"),
    [
        (0.25, 10**12, 0.25),
        ("0.25", 10**12, 0.25),
        ([[0, 1], ["10B", 0.5]], 0, 1.0),
        ("0:1, 10B:0.5", 5 * 10**9, 0.75),
        ([[0, 1], [10**10, 0.5]], 2 * 10**10, 0.5),
        ([["1B", 0.2], ["2B", 0.4]], 0, 0.2),
    ],
)
def test_share_at_interpolates_between_points(value: object, tokens: int, share: float) -> None:
    assert share_at(parse_points(value, "k"), tokens) == pytest.approx(share)


@pytest.mark.parametrize(
    "value",
    [
        *("1.5", "-0.1", "half", "0:1,0:0.5", "10B:1,5B:0", "0:", True, None),
        *([0.5], [], [[0]], [[0, True]], [[0, 1], [0, 0.5]], [[0, 2]], [["x", 1]]),
    ],
)
def test_parse_points_invalid_share_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"^k: "):
        parse_points(value, "k")


@pytest.mark.parametrize(
    ("older", "value"),
    [("0:1,10B:0.5", [[0, 1], ["10B", 0.5]]), ("0.8,1500:0.3", [[0, 0.8], [1500, 0.3]]), ("0.5", 0.5)],
)
def test_share_points_as_text_parse_to_same_value(older: str, value: object) -> None:
    points = share_points(value, "k")
    assert share_points(older, "k") == points
    assert share_points(points, "k") == points
