"""The localized-robustness rebuild: closed forms, networks, findings, reasons of its exit code."""

import copy
import importlib
import math
import pathlib
import sys

import keras
import numpy as np
import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
PARTS = ("models", "measures", "findings", "tables")


@pytest.fixture(scope="module")
def parts():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield {name: importlib.import_module(f"localized.{name}") for name in PARTS}
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in [n for n in sys.modules if n == "benchmarks" or n.startswith("benchmarks.")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def settings(parts):
    return parts["models"].Settings.of("mnist", quick=True)


def record(parts, settings, name, alpha, *, clean=0.9, error=0.1):
    """A record as the rebuild writes it; α_lim grows from half of `alpha` to it."""
    radii = settings.radii
    rows = [
        {"radius": r, "monte_carlo": a / 4, "gradient": a, "certified": 2 * a}
        for r, a in zip(radii, np.linspace(alpha / 2, alpha, len(radii)).tolist(), strict=True)
    ]
    cells = [
        {"kind": kind, "name": kind, "level": level, "error": error, "accuracy": 1 - error}
        for kind, level in (("noise", 10.0), ("fgsm", 33.0), ("pgd", 0.1), ("corruption", 3.0))
    ]
    cells.insert(
        0, {**cells[0], "kind": "clean", "level": 0.0, "error": 1 - clean, "accuracy": clean}
    )
    curve = {"outputs": "softmax", "norm": "l2", "points": 6, "directions": 20, "rows": rows}
    return {
        "name": name,
        "label": parts["models"].METHODS[name],
        "parameters": 1,
        "clean": clean,
        "gain_upper_bound": 2.0,
        "certified": {f"{r:.4g}": 0.5 for r in settings.certified},
        "broken": 0,
        "attacked_l2": 0.8,
        "training_seconds": 1.0,
        "epochs": 1,
        "curves": [{**curve, "ordered": True}],
        "cells": cells,
    }


@pytest.fixture
def records(parts, settings):
    given = {  # α_lim, clean accuracy, error otherwise: as the paper has them
        "vanilla": (4.0, 0.88, 0.32),
        "parseval": (3.0, 0.9, 0.31),
        "laplacian": (2.0, 0.87, 0.30),
        "l2nn": (1.0, 0.8, 0.28),
        "pgd": (0.5, 0.87, 0.2),
        "pgd_spectral": (0.3, 0.85, 0.2),
    }
    return {n: record(parts, settings, n, a, clean=c, error=e) for n, (a, c, e) in given.items()}


def test_the_sigmoids_closed_form_is_the_largest_chord(parts):
    radii = np.array([1.0, 6.0, 11.0, 13.0, 18.0])
    exact, touch = parts["measures"].sigmoid_exact(radii)
    logistic = lambda t: 1 / (1 + np.exp(-t))  # noqa: E731
    for radius, value in zip(radii, exact, strict=True):
        e = np.linspace(radius / 20_000, radius, 20_000)
        assert value == pytest.approx(((logistic(e - 10) - logistic(-10)) / e).max(), rel=1e-6)
    assert 12 < touch < 13 and exact[-1] == exact[-2]


def test_ascent_meets_the_proof_on_linear_maps_in_both_norms(parts):
    rows = parts["measures"].linear(dimensions=(8, 32))["rows"]
    assert len(rows) == 4
    assert all(row["disagreement"] < 1e-5 for row in rows)
    assert all(row["monte_carlo"] < 0.99 * row["certified"] for row in rows)


def test_bounded_networks_are_proved_and_scaled_logits_keep_their_radii(parts, settings):
    from tf_lyapunov.certification import certify

    small = parts["models"].dataclasses.replace(settings, filters=(2,))
    model = parts["models"].build("pgd_spectral", (8, 8, 1), 3, small)
    x = np.random.default_rng(0).random((4, 8, 8, 1)).astype("float32")
    before = certify(model, x)
    parts["models"].scale_logits(model, 8.0)
    after = certify(model, x)
    assert before.gain_upper_bound <= 1 + 1e-5
    assert after.gain_upper_bound == pytest.approx(8 * before.gain_upper_bound, rel=1e-5)
    assert np.allclose(before.radius, after.radius, rtol=1e-3, atol=1e-6)


def test_averaged_branches_stand_where_sums_were(parts):
    models = parts["models"]
    x = keras.Input((4,))
    model = keras.Model(x, keras.layers.Add(name="sum")([x, keras.layers.ReLU()(x)]))
    averaged = keras.models.clone_model(model, clone_function=models._averaged)
    value = averaged(np.array([[2.0, -2.0, 0.0, 1.0]], "float32"))
    assert np.allclose(keras.ops.convert_to_numpy(value), [[2.0, -1.0, 0.0, 1.0]])


def test_the_papers_numbers_confirm_the_papers_claims_and_others_do_not(parts, settings, records):
    find, keys = parts["findings"].findings, {**parts["models"].dataclasses.asdict(settings)}
    lines = find(records, keys)
    decided = [line for line in lines if "**" in line]
    assert len(decided) > 10
    # The made-up curves double over r, all at the same radius: two claims fail for them.
    wrong = [line for line in decided if "**no**" in line]
    assert all("constant over r" in line or "at larger r" in line for line in wrong), wrong
    assert len(wrong) == 4
    swapped = {**records, "vanilla": records["pgd"], "pgd": records["vanilla"]}
    assert sum("**no**" in line for line in find(swapped, keys)) > 10


def test_broken_certificates_and_estimates_out_of_order_are_reported(parts, records):
    problems = parts["measures"].problems
    assert problems(records["vanilla"]) == []
    broken = copy.deepcopy(records["vanilla"])
    broken["broken"] = 2
    broken["curves"][0]["ordered"] = False
    assert len(problems(broken)) == 2
    row = {"dimension": 8, "norm": "l2", "disagreement": 1e-4, "monte_carlo": 1, "gradient": 2}
    assert len(problems({"name": "linear", "rows": [row]})) == 1


def test_results_are_written_with_every_figure_that_the_records_allow(
    parts, settings, records, tmp_path
):
    how = {key: "x" for key in ("command", "date", "machine", "data")}
    how |= {"versions": {"keras": "3"}, "settings": parts["models"].dataclasses.asdict(settings)}
    text = parts["tables"].write_results(records, how, tmp_path)
    assert "A smoke test" in text and "| L2NN | 80.0%" in text
    assert (tmp_path / "comparison.csv").exists() and (tmp_path / "brackets.svg").exists()
    assert "Figures 1 and 3" not in text and "Figure 2" not in text


@pytest.mark.parametrize("norm", [2, math.inf])
def test_pairs_counted_in_a_process_of_their_own_equal_brute_force(parts, norm):
    from benchmarks.pairs import brute_force, counted

    x = np.random.default_rng(0).random((300, 20)).astype("float32")
    y = np.arange(300) % 3
    thresholds = np.array([0.7, 0.8, 0.9]) if norm == math.inf else np.array([1.2, 1.5, 1.8])
    found, took = counted(x, y, thresholds, norm)
    assert np.array_equal(found.closer, brute_force(x, y, thresholds, norm))
    assert 0 < found.closer[0] < found.opposite_pairs == 30_000
    assert took["cpu_seconds"] > 0 and found.norm == norm
