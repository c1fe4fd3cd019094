"""Charts show the values they were given, proved ones on the safe side, and escape all text."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tf_lyapunov.evaluation import wording
from tf_lyapunov.evaluation.charts import Series, bar_chart, line_chart, ticks
from tf_lyapunov.evaluation.results import Results
from tf_lyapunov.evaluation.sections import charts, gain_bars, layer_bars

HOSTILE = "<script>alert('x')</script> \"&' ]]> {{ 7*7 }}"
OPTIONS = dict(alt=HOSTILE, x_label=HOSTILE, y_label=HOSTILE, x_shown=str, y_tick=str)


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


def test_charts_are_valid_xml_whatever_the_names():
    series = Series(HOSTILE, [(0.0, 1.0), (1.0, 0.5)], "clean", lambda y: HOSTILE, marker=True)
    for svg in (
        line_chart([series], **OPTIONS),
        bar_chart([(0.0, 1.0, 3, HOSTILE)], alt=HOSTILE, x_label=HOSTILE, y_label=HOSTILE,
                  colour="o0"),
    ):  # fmt: skip
        tags = {element.tag for element in ElementTree.fromstring(svg).iter()}
        assert tags <= {"svg", "g", "line", "polyline", "polygon", "circle", "rect", "text"}
        assert HOSTILE in texts(svg)


def test_a_proved_line_steps_down_at_once_so_that_it_never_claims_too_much():
    series = Series("c", [(0.0, 1.0), (1.0, 0.5), (2.0, 0.0)], "certified", str, step=True)
    line = re.search(r'polyline[^>]*points="([^"]*)"', line_chart([series], **OPTIONS))[1]
    x, y = np.array([p.split(",") for p in line.split()], float).T
    assert x[0] == x[1] and y[0] < y[1] == y[2] and x[2] == x[3] and y[2] < y[3] == y[4]
    assert series.at(0.5) == 0.5 and series.at(1.0) == 0.5 and series.at(2.5) is None
    plain = Series("m", series.points, "clean", str)
    assert plain.at(0.5) is None and plain.at(1.0) == 0.5


def test_long_lines_are_thinned_and_keep_their_last_point():
    points = [(float(i), 1.0 / (1 + i)) for i in range(5001)]
    svg = line_chart([Series("loss", points, "clean", wording.number)], **OPTIONS)
    assert len(svg) < 60_000 and f"loss: {wording.number(points[-1][1])}" in texts(svg)


@pytest.mark.parametrize("points", [[], [(None, 1.0)], [(0.0, float("nan"))]])
def test_no_points_are_no_chart(points):
    assert line_chart([Series("a", points, "clean", str)], **OPTIONS) == ""
    assert charts(Results(title="t")) == {}


@pytest.mark.parametrize("points", [[(0.0, 0.0)], [(0.0, 5.0)], [(3.0, -1.0), (3.0, -1.0)]])
def test_a_single_point_has_axes_too(points):
    svg = line_chart([Series("a", points, "o1", str, marker=True)], **OPTIONS)
    places = [float(e.get("cx")) for e in ElementTree.fromstring(svg).iter("circle")]
    assert len(places) > len(points) and np.all(np.isfinite(places))  # and the legend
    assert texts(svg).count(HOSTILE) >= 2  # both axes are named


def test_ticks_are_round_and_inside():
    for low, high in ((0.0, 1.0), (0.0, 1e-9), (-3.7, 12.9), (1, 7), (0.0, 3e12)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 8
        slack = 1e-9 * (high - low)
        assert low - slack <= found[0] and found[-1] <= high + slack
    assert all(t == int(t) for t in ticks(1, 3, whole=True))


def results():
    return Results(
        title="t",
        certificate={"curve": {"radius": [0.0, 0.15, 0.3], "certified": [0.9, 0.7, 0.2]}},
        rows=[
            {"radius": 0.1, "clean": 0.95, "certified": 0.8, "attacked": {"PGD": 0.85}},
            {"radius": 0.2, "clean": 0.95, "certified": 0.65432, "attacked": {"PGD": 0.75}},
        ],
    )


def test_values_under_the_pointer_are_the_rows_own_and_certified_ones_are_rounded_down():
    chart = charts(results())["accuracy"]
    assert [drawing["width"] for drawing in chart["drawings"]] == ["wide", "narrow"]
    for drawing in chart["drawings"]:
        shown = texts(drawing["svg"])
        place = shown.index("radius 0.2")
        assert shown[place + 1 : place + 4] == [
            "certified (proved): 65.4%",
            "clean, no change (measured): 95.0%",
            "under PGD (measured): 75.0%",
        ]
        # Between two of the grid the larger radius' share.
        assert "radius 0.15" in shown and "certified (proved): 70.0%" in shown
        assert "radius 0.3" not in shown  # farther than was attacked


def test_proved_norms_by_epoch_are_preferred_to_estimates_and_named_apart():
    history = [{"epoch": e, "sigma/a": 0.9, "budget/a": 1.0} for e in (1, 2)]
    estimated = charts(Results(title="t", history=history))["layers"]
    assert estimated["legend"][0][0] == "spectral norm (estimate)"
    history = [{**row, "sigma_upper_bound/a": 0.95} for row in history]
    proved = charts(Results(title="t", history=history))["layers"]
    assert proved["legend"][0][:2] == ("spectral norm, at most (proved)", "certified")


def test_many_layers_share_one_chart():
    row = {f"{kind}/{i}": 1.0 for kind in ("sigma_upper_bound", "budget") for i in range(30)}
    (panel,) = charts(Results(title="t", history=[row, row]))["layers"]["drawings"]
    assert "30 layers" in panel["svg"] and "100.0%" in panel["svg"]


def test_bars_of_layers_say_who_is_over_budget():
    rows = [
        {"name": "a", "sigma_upper_bound": 0.5, "budget": 1.0},
        {"name": "b", "sigma_upper_bound": 2.0, "budget": 1.0},
        {"name": "c", "sigma_upper_bound": 2.0, "budget": None},
    ]
    bars = layer_bars(rows)
    assert [(bar["name"], bar["within"], bar["width"], bar["mark"]) for bar in bars] == [
        ("a", True, "25.00", "50.00"),
        ("b", False, "100.00", "50.00"),
    ]


def test_bars_of_the_gain_round_proofs_up_and_leave_out_what_is_missing():
    bars = gain_bars(Results(title="t", gain={"upper_bound": 1.00001, "measured_max": 0.5}))
    assert [(bar["value"], bar["colour"]) for bar in bars] == [
        ("1.001", "certified"),
        ("0.5", "o0"),
    ]
    assert gain_bars(Results(title="t")) == []
