"""Figures show the data they were given, in both themes, with or without gaps."""

import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tf_lyapunov.evaluation import plots
from tf_lyapunov.evaluation.results import Results

ROWS = [
    {"radius": 0.1, "clean": 0.9, "certified": 0.6, "attacked": {"FGM": 0.8, "PGD": 0.7}},
    {"radius": 0.2, "clean": 0.9, "certified": 0.4, "attacked": {"PGD": 0.5}},
]


def line(figure, label):
    lines = [item for axes in figure.axes for item in axes.get_lines()]
    return next(item for item in lines if str(item.get_label()).startswith(label)).get_xydata()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accuracy_lines_pass_through_the_rows(theme):
    figure = plots.accuracy_by_radius(ROWS, theme=theme)
    np.testing.assert_array_equal(line(figure, "under PGD"), [[0.1, 0.7], [0.2, 0.5]])
    np.testing.assert_array_equal(line(figure, "under FGM"), [[0.1, 0.8]])
    np.testing.assert_array_equal(line(figure, "certified"), [[0.1, 0.6], [0.2, 0.4]])


def test_the_fine_certified_curve_is_preferred():
    curve = {"radius": [0.0, 0.05, 0.3], "certified": [0.9, 0.8, 0.1]}
    drawn = line(plots.accuracy_by_radius(ROWS, curve=curve), "certified")
    np.testing.assert_array_equal(drawn, np.transpose([curve["radius"], curve["certified"]]))


def test_the_bound_line_is_gain_times_radius():
    rows = [{"radius": 0.5, "output_change": {"PGD": {"mean": 0.2, "max": 0.3}}}]
    figure = plots.output_change_by_radius(rows, 2.0)
    np.testing.assert_array_equal(line(figure, "proved"), [[0, 0], [0.5, 1.0]])
    np.testing.assert_array_equal(line(figure, "largest"), [[0.5, 0.3]])


def test_up_to_eight_layers_get_a_panel_each_and_more_share_one():
    def history(layers):
        return [
            {f"{kind}/layer {i}": 1.0 for kind in ("sigma", "budget") for i in range(layers)}
            for _ in range(2)
        ]

    visible = [axes for axes in plots.layer_norms_by_epoch(history(5)).axes if axes.get_visible()]
    assert len(visible) == 5
    assert len(plots.layer_norms_by_epoch(history(9)).axes) == 1


def test_epochs_without_a_value_are_left_out():
    history = [{"cascade_margin": 0.1}, {"loss": 1.0}, {"cascade_margin": 0.3}]
    drawn = line(plots.cascade_margin_by_epoch(history), "margin")
    np.testing.assert_array_equal(drawn, [[1, 0.1], [3, 0.3]])


def test_equal_figures_give_equal_bytes_and_valid_xml():
    first, second = (plots.to_svg(plots.accuracy_by_radius(ROWS)) for _ in range(2))
    assert first == second
    ElementTree.fromstring(first)


def test_labels_are_not_parsed_as_mathematics():
    rows = [{"radius": 0.1, "clean": 1.0, "attacked": {"$\\bad{$ <b>": 0.5}}]
    svg = plots.to_svg(plots.accuracy_by_radius(rows))
    assert "$\\bad{$ &lt;b&gt;" in svg


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.accuracy_by_radius([]),
        lambda: plots.accuracy_by_radius([{"radius": 0.1, "clean": None, "attacked": None}]),
        lambda: plots.output_change_by_radius([]),
        lambda: plots.gain_comparison({}),
        lambda: plots.gain_comparison({"upper_bound": 1e6, "measured_max": 0.0}),
        lambda: plots.layer_norms_by_epoch([]),
        lambda: plots.cascade_margin_by_epoch([]),
        lambda: plots.training_by_epoch([]),
        lambda: plots.radius_histogram({"edges": [0.0, 0.0], "counts": [0]}),
    ],
)
def test_empty_data_give_an_empty_figure(draw):
    assert plots.to_svg(draw()).startswith("<?xml")


def test_unknown_themes_are_refused():
    with pytest.raises(ValueError, match="theme='blue'"):
        plots.gain_comparison({}, theme="blue")


def test_figures_are_written_whole_as_svg_and_png(tmp_path):
    figure = plots.gain_comparison({"upper_bound": 1.0})
    for suffix, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        path = plots.save(figure, tmp_path / f"gain{suffix}")
        assert path.read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 2


def test_only_figures_with_data_are_written(tmp_path):
    written = plots.write_figures(Results(title="t", rows=ROWS), tmp_path / "plots")
    assert [path.name for path in written] == ["accuracy.svg"]


def test_the_change_within_other_balls_is_not_drawn_against_the_l2_bound():
    rows = [{"radius": 0.1, "output_change": {"PGD l∞": {"mean": 9.0, "max": 9.0}}}]
    attacks = [{"name": "PGD l∞", "norm": "linf"}]
    keys = [f["key"] for f in plots.report_figures(Results(title="t", rows=rows))]
    assert "output_change" in keys
    keys = [f["key"] for f in plots.report_figures(Results(title="t", rows=rows, attacks=attacks))]
    assert "output_change" not in keys


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"tf-lyapunov\[report\]"):
        plots.gain_comparison({})
