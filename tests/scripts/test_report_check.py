"""A report is pleasant on a phone and in the dark, and the check sees what would not be."""

import importlib.util
import pathlib

import numpy as np
import pytest

from tf_lyapunov.evaluation import pictures
from tf_lyapunov.evaluation.classes import class_summary
from tf_lyapunov.evaluation.report import write_report
from tf_lyapunov.evaluation.results import Results

ROOT = pathlib.Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("report_check", ROOT / "scripts/report_check.py")
report_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report_check)
pytestmark = pytest.mark.skipif(
    bool(report_check.missing_browser()), reason=report_check.missing_browser() or "present"
)
LONG = "<b>a-name</b>_without_any_place_to_break_it_anywhere_" + 60 * "x"


@pytest.fixture(scope="module")
def browser():
    with report_check.Browser() as held:
        yield held


def results():
    row = {"radius": 0.1, "count": 90, "clean": 0.9, "certified": 0.5, "attacked": {LONG: 0.6}}
    picture = pictures.encode(np.zeros((6, 6, 1)), np.linspace(-1, 1, 36).reshape(6, 6, 1))
    example = {"index": 1, "label": 0, "radius": 0.1, "distance": 0.2, "prediction_adv": 1}
    change = {"feature": "1", "index": 0, "from": 1.0, "to": -1.0}
    other = {"name": LONG, "features": 3, "changed": 1, "changes": [change]}
    labels = np.repeat(np.arange(15), 6)
    counts = [{"radius": r / 10, "certified": [3] * 15, "attacked": [4] * 15} for r in range(1, 5)]
    return Results(
        title=LONG,
        dataset={"class_names": [LONG, "b"]},
        rows=[row],
        history=[{"loss": 1.0, "accuracy": 0.5}, {"loss": 0.5, "accuracy": 0.8}],
        layers=[{"name": LONG, "sigma_upper_bound": 1.0, "budget": 1.1}],
        examples=[{**example, "inputs": [{"name": "", "picture": picture}, other]}],
        classes=class_summary(labels, np.roll(labels, 1), counts, attacks=[LONG]),
        gain={"upper_bound": 1.0, "claimed": 2.0, "measured_max": 0.9},
    )


@pytest.mark.parametrize("view", [(1280, "light"), (390, "dark")])
def test_readers_at_a_desk_and_with_a_phone_find_nothing_in_their_way(browser, tmp_path, view):
    page = write_report(results(), tmp_path / "report.html")
    axe = report_check.find_axe()
    assert report_check.check(browser, page, axe, tmp_path / "shots", [view]) == []
    assert len(list((tmp_path / "shots").iterdir())) == 1
    if axe is None:
        pytest.skip("all but axe was checked: axe-core-python is not installed")


def test_wide_pages_requests_silent_charts_and_pale_text_are_seen(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><html lang=en><title>t</title><body><main><h1>t</h1>"
        "<p style='width:2000px;color:#eee;background:#fff'>pale</p><img src='missing.png'>"
        "<svg class=chart width=100 height=100><rect class=hit width=100 height=100 /></svg>"
    )
    axe = report_check.find_axe()
    troubles = "\n".join(report_check.check(browser, page, axe, views=[(390, "light")]))
    for trouble in ("the page is 20", "missing.png", "shows 0 tables of values"):
        assert trouble in troubles
    assert axe is None or ("color-contrast" in troubles and "image-alt" in troubles)
