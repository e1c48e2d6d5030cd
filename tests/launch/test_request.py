"""Time limits of sbatch and the margin before them."""

from __future__ import annotations

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.launch.request import parse_time_limit, resolve_margin


@pytest.mark.parametrize(
    ("time", "given", "margin"),
    [
        (None, None, 300),
        ("24:00:00", None, 300),
        ("UNLIMITED", None, 300),
        ("10", None, 150),
        ("1", None, 15),
        ("1-0", 7200, 7200),
        ("2:30", 149, 149),
        ("1-01:30", 91_799, 91_799),
    ],
)
def test_resolve_margin_of_time_limit_is_a_fraction_unless_given(
    time: str | None, given: int | None, margin: int
) -> None:
    assert resolve_margin(given, time) == margin


@pytest.mark.parametrize(
    ("time", "seconds"), [("90", 5400), ("1:30", 90), ("1:00:30", 3630), ("2-3", 183_600), ("1-00:01:01", 86_461)]
)
def test_parse_time_limit_matches_sbatch_and_limits_the_margin(time: str, seconds: int) -> None:
    assert parse_time_limit(time) == seconds
    with pytest.raises(UserError, match=f"--margin-seconds {seconds}: must be less than --time {time}"):
        resolve_margin(seconds, time)
