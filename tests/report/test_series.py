"""Data of the page: each model has its colour."""

from __future__ import annotations

import pytest

from megatron_ettin.report.series import colour_indices


@pytest.mark.parametrize(
    ("objectives", "indices"),
    [
        (["mlm", "clm"], [0, 1]),
        (["clm", "mlm"], [1, 0]),
        (["clm"], [1]),
        (["clm", "clm", "mlm", "mlm"], [1, 2, 0, 3]),
    ],
)
def test_colour_indices_do_not_depend_on_order(objectives, indices):
    assert colour_indices(objectives) == indices
