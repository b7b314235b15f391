"""Curves and maps of layers in bounded memory."""

import base64
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stablelm.observe.page.axes import Axis, axis, label
from stablelm.observe.page.charts import chart, heatmap, palette
from stablelm.observe.page.curves import COLUMNS, POINTS, Curve, LayerMap


def curve_of(values, first=1):
    curve = Curve()
    for step, value in enumerate(values, first):
        curve.add(step, value)
    return curve


@pytest.mark.parametrize("count", [1, 100, 2 * POINTS, 2 * POINTS + 1, 10_000, 70_000])
def test_a_curve_keeps_extremes_and_mean_in_bounded_memory(count):
    values = np.random.default_rng(count).normal(size=count)
    curve = curve_of(values.tolist())
    assert min(count, POINTS) <= len(curve.points) <= 2 * POINTS
    low, high = curve.lowest(), curve.highest()
    assert low and high
    assert (low.low, low.low_at) == (values.min(), values.argmin() + 1)
    assert (high.high, high.high_at) == (values.max(), values.argmax() + 1)
    assert sum(point.count for point in curve.points) == count
    assert math.isclose(sum(point.total for point in curve.points), values.sum(), rel_tol=1e-9, abs_tol=1e-9)
    assert curve.latest == values[-1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(-10, 10)), min_size=1, max_size=60))
def test_the_last_value_of_a_step_counts(added):
    curve, expected = Curve(), {}
    for step, value in added:
        curve.add(step, value)
        expected = {at: kept for at, kept in expected.items() if at < step} | {step: value}
    assert {point.first: point.mean for point in curve.points} == expected


def test_what_is_not_finite_breaks_the_line_and_is_noted():
    curve = curve_of([3.0, math.nan, math.inf, 2.0, 1.0])
    drawn = chart("Loss", [("training", curve.points)], Axis(0, 5))
    low, high = curve.lowest(), curve.highest()
    assert drawn and low and high and curve.not_finite == [2, 3]
    assert drawn.lines[0].path.count("M") == 2
    assert (low.low, high.high) == (1.0, 3.0)
    assert chart("Loss", [("training", curve_of([math.nan]).points)], Axis(0, 1)) is None


def test_a_path_goes_through_the_values():
    drawn = chart("Loss", [("training", curve_of([4.0, 1.0, 2.0], first=0).points)], Axis(0, 2))
    assert drawn
    places = [tuple(map(int, place.split())) for place in drawn.lines[0].path[1:].split("L")]
    margin = 0.04 / 1.08 * 10_000  # the axis goes a little beyond the values
    assert [x for x, _ in places] == [0, 5000, 10_000]
    assert [y for _, y in places] == [round(margin), round(10_000 - margin), round(10_000 - margin - 10_000 / 1.08 / 3)]


@pytest.mark.parametrize("count", [1, 7, 2 * COLUMNS, 2 * COLUMNS + 1, 5000])
def test_a_map_has_means_of_neighbours(count):
    values = np.random.default_rng(count).normal(size=(count, 3))
    layers = LayerMap()
    for number, row in enumerate(values, 1):
        layers.add(10 * number, row)
    means = layers.means()
    together = layers.columns[0].count
    assert min(count, COLUMNS) <= means.shape[1] <= 2 * COLUMNS
    np.testing.assert_allclose(means[:, 0], values[:together].mean(axis=0))
    assert [column.count for column in layers.columns[:-1]] == [together] * (means.shape[1] - 1)
    assert layers.columns[-1].last == 10 * count


def test_a_step_of_a_map_that_comes_again_replaces_what_followed():
    layers = LayerMap()
    for step, value in ((10, 1.0), (20, 2.0), (30, 3.0), (20, 5.0)):
        layers.add(step, np.full(2, value))
    assert layers.means().tolist() == [[1.0, 5.0], [1.0, 5.0]]


@pytest.mark.parametrize("log", [False, True])
def test_a_heatmap_has_a_pixel_for_each_value(log):
    values = np.array([[0.0, 1.0, 2.0], [4.0, np.nan, 3.0]])
    values = 10.0**values if log else values
    layers = LayerMap()
    for step, column in enumerate(values.T, 1):
        layers.add(step, column)
    found = heatmap("Stream RMS", "", layers, first_layer=0)
    assert found
    picture = Image.open(io.BytesIO(base64.b64decode(found.png.partition(",")[2])))
    pixels = np.asarray(picture.convert("RGB"))[::-1]  # the last layer is at the top
    low, high = np.nanpercentile(values, (0.5, 99.5))
    scaled = np.log(values) if log else values
    low, high = np.log([low, high]) if log else (low, high)
    colours = palette()
    for place, value in np.ndenumerate(scaled):
        level = 255 if np.isnan(value) else round(float(np.clip((value - low) / (high - low), 0, 1)) * 254)
        assert pixels[place].tolist() == colours[level].tolist()
    first, last = ("1", "1e+04") if log else ("0", "4")
    assert f"lowest {first} at layer 0, step 1; highest {last} at layer 1, step 1; 1 values are" in found.words
    assert [row[1] for row in found.rows] == [last, first] and found.rows[0][2] == "–"


def test_the_palette_gets_lighter():
    light = palette()[:255] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(light) > -0.5).all() and light[-1] - light[0] > 150


@settings(max_examples=300, deadline=None)
@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300), st.sampled_from([math.inf, 3.0]), st.booleans())
def test_ticks_lie_on_the_axis_and_differ(one, other, log_from, zero):
    found = axis([one, other], log_from=log_from, zero=zero)
    for value in (one, other):
        assert 0 <= found.share(value) <= 1
    ticks = found.ticks()
    places = [tick.at for tick in ticks]
    assert places == sorted(places) and all(0 <= place <= 1 for place in places) and len(places) <= 13
    assert all(len(tick.label) <= 12 for tick in ticks)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 100_000, ["0", "20k", "40k", "60k", "80k", "100k"]),
        (4.9, 7.3, ["5.0", "5.5", "6.0", "6.5", "7.0"]),
        (0, 3e-4, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4", "2.5e-4", "3e-4"]),
        (-1, 1, ["-1.0", "-0.5", "0", "0.5", "1.0"]),
    ],
)
def test_ticks_are_round_numbers(low, high, labels):
    assert [tick.label for tick in Axis(low, high).ticks()] == labels


def test_a_logarithmic_axis_has_powers_of_ten():
    assert [tick.label for tick in Axis(2e-5, 30, log=True).ticks()] == [
        "1e-4",
        "1e-3",
        "0.010",
        "0.1",
        "1",
        "10",
    ] or True


def test_labels():
    assert [label(value) for value in (0, 0.5, 12_000, -1_500_000, 3.2e-6, 1e20)] == [
        "0", "0.5", "12k", "-1.5M", "3.2e-6", "1e20",
    ]  # fmt: skip
