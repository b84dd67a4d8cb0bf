"""Charts as SVG: their marks, their geometry, and what names of others can do to them."""

import math
import xml.etree.ElementTree as ET

import pytest

from nin.display.svg_chart import (
    LABEL_DISTANCE,
    WIDTH,
    Bar,
    Box,
    Plot,
    SpreadPoint,
    bar_chart,
    line_chart,
    place_labels,
    point_chart,
    round_steps,
)


def words(drawing):
    return [node.text for node in drawing.iter("text")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.13, 0.87, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (30, 80, [20, 40, 60, 80]),
        (2.0, 2.0, [1.5, 2.0, 2.5]),
        (98.7, 99.2, [98.6, 98.8, 99, 99.2]),
    ],
)
def test_axes_have_round_marks(low, high, expected):
    assert round_steps(low, high, about=4) == pytest.approx(expected)


def test_lines_leave_out_what_is_no_number_and_keep_labels_apart():
    series = {"test": [1.0, math.nan, 3.0], "training": [1.0, 2.0, 3.0], "none": [math.nan] * 3}
    drawing = ET.fromstring(line_chart("loss", [1, 2, 3], series, x_label="epoch", format_value=str))
    curves = {group.get("class"): group for group in drawing.iter("g")}
    assert {name: curve.find("path").get("d").count("L") for name, curve in curves.items()} == {
        "test": 1,
        "training": 2,
    }
    heights = sorted(float(curve.find("text").get("y")) for curve in curves.values())
    assert heights[1] - heights[0] >= LABEL_DISTANCE
    assert {"1", "2", "3", "epoch"} <= set(words(drawing))
    assert "at the end: test 3.0; training 3.0" in drawing.get("aria-label")


def test_lines_of_percentages_end_at_a_hundred():
    chart = line_chart("accuracy, %", [1, 2], {"test": [98.0, 99.9]}, x_label="epoch", format_value=str, highest=100)
    marks = words(ET.fromstring(chart))
    assert "100" in marks
    assert not {"100.5", "101", "102"} & set(marks)


def test_points_lie_within_the_axes_with_their_spread():
    points = [SpreadPoint("original", "a", 0.9, 1.0, 1.2, 99.9), SpreadPoint("narrowed", "b", 0.4, 0.5, 0.7, 99.9)]
    drawing = ET.fromstring(point_chart(points, x_label="milliseconds", description="times", highest=100))
    (first, second), lines = drawing.findall("circle"), drawing.findall("line[@class='spread original']")
    assert (first.get("cy"), first.get("class")) == (second.get("cy"), "original")
    assert float(second.get("cx")) < float(first.get("cx"))
    assert [float(lines[0].get("x1")) < float(first.get("cx")) < float(lines[0].get("x2")) < WIDTH] == [True]
    assert not [word for word in words(drawing) if word.replace(".", "").isdigit() and float(word) > 100]


def test_bars_fill_the_width_and_escape_names():
    bars = [
        Bar("<b>", [("before", 4, 12), ("after", 1, 6)]),
        Bar("nin", [("nin", 2, 12)], (1.0, 8.0), "2.000"),
        Bar("missing", note="not installed"),
    ]
    drawing = ET.fromstring(bar_chart(bars, description="bars", note_width=WIDTH - 320))
    assert [float(rect.get("width")) for rect in drawing.iter("rect")] == [160, 40, 80]
    (spread,) = drawing.iter("line")
    assert (float(spread.get("x1")), float(spread.get("x2"))) == (40, 320)
    assert words(drawing) == ["<b>", "nin", "2.000", "missing", "not installed"]
    assert drawing.get("viewBox") == f"0 0 {WIDTH} 96"
    ET.fromstring(bar_chart([], description="no bars", note_width=9))


def test_labels_of_crowded_points_cover_nothing():
    plot = Plot(WIDTH, 272, 40, WIDTH - 6, 10, 230, (0, 2.2), (96, 98))
    spots = [(1 + i % 3 / 50, 97 + i % 4 / 50) for i in range(9)] + [(2.19, 97.9), (0.01, 96.1)]
    points = [SpreadPoint("narrowed", "90 % left", x - 0.01, x, x + 0.01, y) for x, y in spots]
    boxes = place_labels(plot, points)
    taken = [Box(plot.x(p.x) - 4, plot.y(p.y) - 4, plot.x(p.x) + 4, plot.y(p.y) + 4) for p in points]
    for i, box in enumerate(boxes):
        assert 40 <= box.left < box.right <= WIDTH
        assert 0 <= box.top < box.bottom <= 230
        assert sum(box.overlap(other) for other in (*boxes[:i], *taken)) == 0
    drawing = ET.fromstring(point_chart(points, x_label="ms", description="crowded"))
    assert drawing.findall("line[@class='leader']")  # those that had to go further away say whose they are
