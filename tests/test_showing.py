"""Results in a notebook and a console: short, readable, and on the safe side."""

import builtins
import dataclasses
import importlib
import re
import types

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov.evaluation.measures import SuiteResult
from tf_lyapunov.showing import Page, Table, share

X = np.random.default_rng(0).standard_normal((40, 4)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 40)
KINDS = ("design", "gain", "certificate", "bracket", "attack", "suite", "curve", "ranges",
         "property", "dynamics")  # fmt: skip


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(5, "relu", name="first"), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((4,)), *layers])


def dynamics():
    certificate = importlib.import_module("tf_lyapunov.dynamics.certificate")
    fields = {f.name: None for f in dataclasses.fields(certificate.DynamicsCertificate)}
    stages = (types.SimpleNamespace(name="<b>", gain_upper_bound=1.5, state_gain=None),)
    own = {"gain_upper_bound": 1.50000001, "stages": stages, "verdict": "PROVED"}
    own |= {"assumptions": ()}
    return certificate.DynamicsCertificate(**{**fields, **own})


@pytest.fixture(scope="module")
def results(model):
    cells = [
        {"kind": "clean", "name": "clean", "level": 0.0, "error": 0.25, "count": 40},
        {"kind": "noise", "name": "<i>gaussian</i>", "level": 10.0, "error": 0.5, "count": 40},
    ]
    return {
        "design": tfl.spectral_design(gain=2.0, sectors=["relu", "linear"]),
        "gain": tfl.lipschitz_upper_bound(model),
        "certificate": tfl.certify(model, X, Y),
        "bracket": tfl.bracket(model, X[:12], Y[:12], time_budget=0),
        "attack": tfl.attacks.FGM(tfl.L2(0.5))(model, X, Y),
        "suite": SuiteResult(cells),
        "ranges": tfl.output_bounds(model, tfl.Region.ball(X[0], 0.1)),
        "property": tfl.verify_property(
            model, tfl.Region.ball(X[0], 0.01, "linf"), tfl.Property.classified_as(0), timeout=5
        ),
        "dynamics": dynamics(),
        "curve": tfl.localized_robustness(model, X[:3], [0.1, 1.0], directions=4),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_at_the_end_of_a_cell_is_a_small_page(results, kind):
    html = results[kind]._repr_html_()
    assert html.startswith("<div>") and "<table" in html
    assert len(html) < 20_000
    # Text and lines take the notebook's colours, light or dark.
    assert not re.search(r"(?<!-)color:(?!currentColor)|#[0-9a-f]{3,6}|black|white", html)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_in_a_console_is_one_line_whatever_its_length(results, kind):
    line = repr(results[kind])
    assert "\n" not in line and len(line) < 300
    assert not re.search(r"\d\.\d{6,}", line)  # no digits that nobody reads


def test_names_with_markup_are_text_in_a_page(results):
    gain = results["gain"]
    named = [dataclasses.replace(c, name=f"<b>{c.name}") for c in gain.contributions]
    for result in (results["suite"], dataclasses.replace(gain, contributions=tuple(named))):
        html = result._repr_html_()
        assert "&lt;" in html and "<b>first" not in html and "<i>gaussian" not in html


def test_a_million_inputs_make_a_page_of_ten_rows():
    n = 1_000_000
    proof = tfl.certification.certificate.Certificate(
        np.full(n, 0.5), np.zeros(n), np.zeros(n), np.ones(n), 1.0, (), (), "m", "PROVED", 0.0, "d"
    )
    html = proof._repr_html_()
    assert "999990 more of 1000000" in html and len(html) < 10_000


def test_shown_guarantees_are_on_the_safe_side(results):
    proof, gain, design = results["certificate"], results["gain"], results["design"]
    shown = float(re.search(r"gain ≤ ([\d.e+-]+)", repr(gain))[1])
    assert gain.gain_upper_bound <= shown < 1.01 * gain.gain_upper_bound
    shown = float(re.search(r"median radius ([\d.e+-]+)", repr(proof))[1])
    assert 0.99 * np.median(proof.radius) <= shown <= np.median(proof.radius)
    budgets = [float(v) for v in re.findall(r">≤ ([\d.]+)</td>", design._repr_html_())]
    assert all(s <= b for s, b in zip(budgets[-2:], design.budgets, strict=True))
    assert share(0.99999) == "99.9%"


def test_large_numbers_that_stand_for_infinity_are_not_printed(results):
    """The trouble: `delta=1610612723.0000002` in the first thing that a design printed."""
    assert max(i.delta for i in results["design"].indices) > 1e6
    assert not re.search(r"\d{7}", repr(results["design"]))


def test_a_gain_is_a_number(results):
    assert float(results["gain"]) == results["gain"].gain_upper_bound


def test_attacks_count_the_inputs_that_were_right_before(model, results):
    result = results["attack"]
    right = np.argmax(model.predict(X, verbose=0), axis=1) == Y
    np.testing.assert_array_equal(result.right_before, right)
    broken = int(np.sum(result.success & right))
    summary = result.summary()
    assert (summary["right_before"], summary["broken"]) == (int(right.sum()), broken)
    assert f"{broken} of {right.sum()} inputs broken" in str(result)
    assert f"{(~right).sum()} more were misclassified before" in str(result)
    assert 0 < summary["median_distance"] == np.median(result.distance[result.broken])


# Figures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_result_draws_itself(results, kind):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = results[kind].plot()
    assert axes.lines or axes.patches
    again = axes.figure.add_subplot()
    assert results[kind].plot(axes=again) is again
    axes.figure.canvas.draw()
    matplotlib.pyplot.close(axes.figure)


def test_without_matplotlib_the_error_names_the_extra(results, monkeypatch):
    ordinary = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return ordinary(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"tf-lyapunov\[report\]"):
        results["gain"].plot()


def test_a_page_shows_notes_and_captions_and_leaves_out_empty_tables():
    html = Page(
        "T", (), (Table(("a",), ((1,),), "two < three"), Table(("b",), ())), ("n&m",)
    ).html()
    assert "two &lt; three" in html and "n&amp;m" in html and ">b<" not in html


# The monitor ------------------------------------------------------------------------------------


def trained(capsys, verbose, *callbacks):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(5, "relu", name="hidden"), keras.layers.Dense(3, name="head")]
    model = keras.Sequential([keras.Input((4,)), *layers])
    design = tfl.spectral_design(gain=2.0, sectors=["relu", "linear"])
    tfl.constrain(model, design)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, run_eagerly=True)
    monitor = tfl.callbacks.LyapunovMonitor(design, verbose=verbose)
    capsys.readouterr()
    history = model.fit(
        X, Y, batch_size=40, epochs=2, verbose=2, callbacks=[monitor, *callbacks]
    ).history
    return capsys.readouterr().out, history


def test_the_monitor_shows_two_numbers_an_epoch_and_logs_the_rest(capsys, tmp_path):
    """The trouble: a dozen numbers per layer drowned the loss in Keras' progress bar."""
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    text, history = trained(capsys, 1, logger)
    assert "sigma" not in text and "delta" not in text and "cascade" not in text
    lines = [line for line in text.splitlines() if line.startswith("LyapunovMonitor")]
    assert len(lines) == 2 and all("claim proved; gain ≤" in line for line in lines)
    assert len(re.findall(r"\d+\.?\d*(?:e[+-]\d+)?", lines[0])) <= 2
    assert len(history["sigma/hidden"]) == len(history["cascade_margin"]) == 2
    assert "sigma/hidden" in (tmp_path / "log.csv").read_text().splitlines()[0]


def test_the_monitor_shows_everything_on_request_and_nothing_on_request(capsys):
    text, _ = trained(capsys, 2)
    assert "sigma/hidden" in text and "cascade margin" in text
    text, history = trained(capsys, 0)
    assert "LyapunovMonitor" not in text and "sigma" not in text
    assert "loss" in text and "sigma/hidden" in history
