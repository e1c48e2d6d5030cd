"""Charts: ticks are round, thinning keeps spikes, medians neither lag nor follow them, any numbers can be drawn."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings, strategies as st

from megatron_ettin.report.curves import (
    MOST_POINTS,
    Chart,
    Curve,
    clip_limit,
    colour_places,
    medians,
    png,
    smooth,
    svg,
    thin,
    tick_text,
    ticks,
)


def chart(*segments, unit="nats", marks=()):
    return Chart("Loss", unit, [Curve("a", 0, segments)], marks)


def test_thin_long_curve_keeps_the_spikes():
    y = [1.0] * 100_000
    y[54_321], y[77_777] = 9.0, -9.0
    points = thin(range(len(y)), y)
    assert len(points) <= MOST_POINTS
    assert (54_321, 9.0) in points
    assert (77_777, -9.0) in points
    assert points == sorted(points)


def test_medians_with_spikes_neither_lag_nor_follow_them():
    x = [float(step) for step in range(10_000)]
    y = [10 - step / 1_000 + (50 if step % 100 == 50 else 0) for step in range(10_000)]
    assert max(abs(value - (10 - position / 1_000)) for position, value in medians(x, y)) < 0.01


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (2.9, 11.1, [4, 6, 8, 10]), (-1e-3, 1e-3, [-1e-3, -5e-4, 0, 5e-4, 1e-3])],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e6))
def test_ticks_of_any_range_are_few_and_inside_it(low, share):
    span = share * max(abs(low), 1e-9)
    high = low + span
    found = ticks(low, high)
    assert len(found) <= 8
    assert all(low - span * 1e-6 <= tick <= high + span * 1e-6 for tick in found)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1e7, "10M"), (248_000, "248K"), (3e-3, "0.003"), (2.5, "2.5"), (1e-10, "1e-10")]
)
def test_tick_text_is_short_with_unit_suffixes(value, text):
    assert tick_text(value) == text


NUMBERS = st.floats(min_value=-1e30, max_value=1e30, allow_subnormal=False)


@settings(max_examples=30)
@given(st.lists(NUMBERS, min_size=1, max_size=90))
def test_svg_of_any_numbers_has_finite_coordinates(y):
    drawn = svg(chart(([float(step) for step in range(1, len(y) + 1)], y)))
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_svg_of_two_phases_draws_separate_strokes_with_their_names():
    drawn = svg(chart(([1.0, 2.0], [3.0, 2.0]), ([3.0, 4.0], [2.5, 2.0]), marks=[(0.0, "pretrain"), (2.0, "decay")]))
    (path,) = re.findall(r' d="([^"]*)"', drawn)
    assert path.count("M") == 2
    assert path.count("L") == 2
    assert ">pretrain</text>" in drawn
    assert ">decay</text>" in drawn


def test_svg_single_evaluation_is_drawn_as_a_dot():
    assert svg(Chart("Validation loss", "nats", [Curve("a", 0, [([5.0], [2.0])], dotted=True)])).count("<circle") == 1


def test_svg_clipped_chart_marks_the_values_above():
    steps = [float(step) for step in range(1, 101)]
    norms = [100.0 if step in (40, 80) else 1.0 + step / 200 for step in range(100)]
    drawn = Chart("Gradient norm", "norm", [Curve("a", 0, [(steps, norms)])], clipped=True)
    assert drawn.ceiling < 2
    assert not drawn.logarithmic
    assert svg(drawn).count("<title>100 at") == 2


@pytest.mark.parametrize("most", [1.0, 1.9])
def test_clip_limit_without_outliers_is_the_highest_value(most):
    assert clip_limit([0.5] * 50 + [1.0] * 49 + [most]) == most


@pytest.mark.parametrize(
    ("objectives", "places"),
    [
        (["mlm", "clm"], [0, 1]),
        (["clm", "mlm"], [1, 0]),
        (["clm"], [1]),
        (["clm", "clm", "mlm", "mlm"], [1, 2, 0, 3]),
    ],
)
def test_colour_places_of_encoder_and_decoder_are_theirs_in_any_order(objectives, places):
    assert colour_places(objectives) == places


def test_smooth_short_segment_is_drawn_as_it_is():
    assert smooth([1.0, 2.0], [5.0, 9.0]) == [(1.0, 5.0), (2.0, 9.0)]


def test_chart_wide_span_uses_a_logarithmic_axis():
    steps = [float(step) for step in range(1, 20)]
    assert chart((steps, [1.0] * 18 + [1e6])).logarithmic
    assert not chart((steps, [1.0] * 18 + [10.0])).logarithmic
    assert not chart((steps, [0.0] * 18 + [10.0])).logarithmic
    assert "1M" in svg(chart((steps, [1.0] * 18 + [1e6])))


def test_png_of_single_point_chart_is_a_png():
    assert png([chart(([1.0], [2.0]))]).startswith(b"\x89PNG")
