"""Figures of brackets show the numbers they were given, on their own and in the report."""

import json
import types

import numpy as np
import pytest

from tf_lyapunov.evaluation import perturbation_plots as plots
from tf_lyapunov.evaluation.bracket import Bracket
from tf_lyapunov.evaluation.report import render_report
from tf_lyapunov.evaluation.results import Results


def found(n=6, published=True, images=False):
    lower, upper = np.linspace(0.1, 0.2, n), np.linspace(1.0, 3.0, n)[::-1].copy()
    attack = np.array(["DDN"] * (n - 1) + ["clean"], object)
    lower[-1] = upper[-1] = 0.0
    shape = (n, 4, 4, 1) if images else (n, 3)
    labels = np.arange(n) % 3
    return Bracket(
        lower=lower, upper=upper, certified=lower, bound=lower / 2,
        published=lower / 100 if published else None, attack=attack, labels=labels,
        predictions=labels, x_adv=np.ones(shape, "float32"), predictions_adv=(labels + 1) % 3,
        zero_gradient=np.zeros(n, bool), rounding=np.zeros(n, bool), notes=("a note",),
    )  # fmt: skip


def line(figure, label):
    (axes,) = figure.axes
    return next(x for x in axes.get_lines() if x.get_label().startswith(label)).get_ydata()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_bracket_shows_every_attacked_input_nearest_first(theme):
    bracket = found()
    figure = plots.bracket_figure(bracket, title="a net", theme=theme)
    np.testing.assert_array_equal(line(figure, "smallest"), np.sort(bracket.upper[:-1]))
    np.testing.assert_array_equal(line(figure, "proved"), bracket.lower[:-1][::-1])
    np.testing.assert_array_equal(line(figure, "published"), bracket.published[:-1][::-1])
    assert figure.axes[0].get_yscale() == "log" and figure.axes[0].get_title() == "a net"


def test_histograms_count_every_input_once():
    figure = plots.distance_histogram(found(), bins=4)
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert sum(heights) == 10  # two ends of five brackets


def test_boxes_need_finite_numbers():
    figure = plots.boxplots({"a": [1.0, 2.0, np.inf], "b": [3.0]}, log=True)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match=r"finite numbers. Received: none in \['b'\]"):
        plots.boxplots({"a": [1.0], "b": [np.nan]})


def test_class_changes_write_the_counts():
    counts = plots.change_counts([0, 0, 2], [1, 1, 0], 3)
    figure = plots.class_changes(counts, ["x", "y", "z"])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["0", "2", "0", "0", "0", "0", "1", "0", "0"]
    for bad in ({"counts": np.ones((2, 3))}, {"counts": np.ones((2, 2)), "names": ["x"]}):
        with pytest.raises(ValueError, match=r"`counts`|`names`"):
            plots.class_changes(**bad)


def test_galleries_show_clean_change_and_perturbed():
    clean = np.zeros((2, 4, 4, 1))
    figure = plots.gallery(clean, clean + 0.5, ["one", "two"])
    assert len(figure.axes) == 6
    change = figure.axes[1].images[0].get_array()
    assert np.all(change == 0.5) and figure.axes[1].get_title() == "±0.5"
    assert len(plots.gallery(clean, [clean + 1, clean + 2]).axes) == 10
    coloured = np.zeros((1, 4, 4, 3))
    assert len(plots.gallery(coloured, coloured).axes) == 3
    for bad in (np.zeros((2, 5, 5, 1)), np.zeros((2, 4, 4, 2)), np.zeros(3)):
        with pytest.raises(ValueError, match="`perturbed` must"):
            plots.gallery(clean, bad)
    with pytest.raises(ValueError, match="`titles`"):
        plots.gallery(clean, clean, ["one"])


def test_curves_leave_out_what_is_missing():
    figure = plots.relative_curves([1, 2, 3], {"claimed": [1, 2, 3], "measured": [1.0, None, 2.0]})
    assert np.isnan(line(figure, "measured")[1])
    panels = {"accuracy": [0.9, 0.8], "found": [1.0, None]}
    assert len(plots.regularization_curves([0.0, 1.0], panels).axes) == 2
    for draw in (plots.relative_curves, plots.regularization_curves):
        with pytest.raises(ValueError, match="must have 2 points"):
            draw([0.0, 1.0], {"accuracy": [1.0]})


def test_nothing_attacked_is_nothing_to_draw():
    nothing = types.SimpleNamespace(found=np.zeros(3, bool))
    with pytest.raises(ValueError, match="no input was perturbed"):
        plots.bracket_figure(nothing)
    assert list(plots.report_entries({"lower": []})) == []


def test_the_report_holds_table_and_figures_of_a_bracket():
    bracket = found(images=True)
    record = bracket.record(np.zeros((6, 4, 4, 1)), images=2)
    results = Results(title="net", bracket=record)
    assert Results.from_json(results.to_json()).bracket == json.loads(json.dumps(record))
    page = render_report(results)
    assert "How far apart are proof and attack?" in page and "a note" in page
    assert page.count("<figure>") == 5 and "DDN (5)" in page
    assert "published rules (no proof)" in page
    plain = render_report(Results(title="net", bracket=found(published=False).record()))
    assert plain.count("<figure>") == 4 and "published rules (no proof)" not in plain
    assert "proof and attack" not in render_report(Results(title="net"))
