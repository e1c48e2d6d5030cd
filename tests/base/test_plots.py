"""Plots: medians neither lag nor follow spikes, buckets keep spikes, and any numbers can be drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_ettin.base.plots import (
    Curve,
    Panel,
    bucket_summary,
    clip_limit,
    draw_figure,
    draw_overview,
    draw_panel,
    format_tick,
    new_figure,
    running_median,
)


def panel(*segments, **options):
    arrays = [(np.asarray(x, float), np.asarray(y, float)) for x, y in segments]
    curve = {key: options.pop(key) for key in ("thin", "smooth", "is_sparse") if key in options}
    return Panel("Loss", "tokens", [Curve("a", 0, arrays, **curve)], **options)


def drawn(*segments, **options):
    axes = new_figure(4, 3).add_subplot()
    draw_panel(axes, panel(*segments, **options))
    return axes


def test_bucket_summary_of_long_curve_keeps_the_spikes():
    y = np.ones(100_000)
    y[54_321], y[77_777] = 9.0, -9.0
    low, middle, high = bucket_summary(y, 200)
    assert len(low) == len(middle) == len(high) == 500
    assert (low.min(), high.max()) == (-9.0, 9.0)
    assert (middle == 1.0).all()


def test_running_median_with_spikes_neither_lags_nor_follows_them():
    steps = np.arange(10_000)
    y = 10 - steps / 1_000 + np.where(steps % 100 == 50, 50, 0)
    # the ends have values on one side only
    assert np.abs(running_median(y) - (10 - steps / 1_000))[300:-300].max() < 0.02


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1e7, "10M"), (248_000, "248K"), (3e-3, "0.003"), (2.5, "2.5"), (1e-10, "1e-10")]
)
def test_format_tick_is_short_with_unit_suffixes(value, text):
    assert format_tick(value) == text


NUMBERS = st.floats(min_value=-1e30, max_value=1e30, allow_subnormal=False)


@settings(max_examples=10, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=90))
def test_figure_of_any_numbers_has_finite_coordinates(y):
    content = draw_figure(panel((range(1, len(y) + 1), y), thin=True, smooth=True), "svg").decode()
    assert "nan" not in content
    assert '"inf' not in content


def test_panel_of_two_phases_draws_separate_strokes_and_their_border():
    axes = drawn(([1, 2], [3, 2]), ([3, 4], [2.5, 2]), marks=[(0.0, "pretrain"), (2.0, "decay")])
    first, second, border = axes.lines
    assert first.get_ydata().tolist() == [3, 2]
    assert second.get_ydata().tolist() == [2.5, 2]
    assert set(border.get_xdata()) == {2.0}
    assert axes.get_legend_handles_labels()[1] == ["a"]


def test_panel_single_evaluation_is_drawn_as_a_dot():
    (line,) = drawn(([5], [2]), is_sparse=True).lines
    assert line.get_marker() == "o"


def test_panel_short_segment_is_drawn_as_it_is():
    (line,) = drawn(([1, 2], [5, 9]), thin=True, smooth=True).lines
    assert line.get_ydata().tolist() == [5, 9]


def test_panel_clipped_marks_the_values_above():
    norms = [100.0 if step in (40, 80) else 1.0 + step / 200 for step in range(100)]
    axes = drawn((range(100), norms), clipped=True)
    assert axes.get_ylim()[1] < 2
    assert axes.get_yscale() == "linear"
    assert axes.lines[-1].get_xdata().tolist() == [40, 80]


@pytest.mark.parametrize("most", [1.0, 1.9])
def test_clip_limit_without_outliers_is_the_highest_value(most):
    assert clip_limit([0.5] * 50 + [1.0] * 49 + [most]) == most


def test_panel_wide_span_uses_a_logarithmic_axis():
    for first, last, scale in ((1.0, 1e6, "log"), (1.0, 10.0, "linear"), (0.0, 10.0, "linear")):
        assert drawn((range(1, 20), [first] * 18 + [last])).get_yscale() == scale


def test_overview_of_single_point_is_a_png():
    assert draw_overview([panel(([1], [2]))]).startswith(b"\x89PNG")
