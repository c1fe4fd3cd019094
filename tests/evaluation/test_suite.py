"""The suite measures what it says, cell by cell, and continues where it stopped."""

import csv
import json
import signal

import fresh_processes
import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov import Linf
from tf_lyapunov.attacks import FGSM, PGD
from tf_lyapunov.evaluation import noise, suite
from tf_lyapunov.evaluation.corruptions import CORRUPTIONS, corrupt
from tf_lyapunov.evaluation.measures import (
    SuiteResult,
    comparison_rows,
    corruption_figure,
    markdown_table,
    noise_figure,
)
from tf_lyapunov.evaluation.suite import evaluate_suite, load_suite
from tf_lyapunov.training import AdversarialModel


@pytest.fixture(scope="module")
def trained():
    """A linear classifier of bright, dark and half bright images, and 30 of them."""
    rng = np.random.default_rng(0)
    y = np.arange(30) % 3
    x = 0.3 * rng.random((30, 8, 8, 1)).astype("float32") + 0.35
    x[y == 1, :4] += 0.15
    x[y == 2, :, :4] += 0.15
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(16, "relu", name="h"),
         layers.Dense(3)]
    )  # fmt: skip
    model.compile(
        keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(np.tile(x, (300, 1, 1, 1)), np.tile(y, 300), verbose=0)
    return model, x, y


FEW = {"corruptions": ["fog", "contrast"], "severities": [1, 5], "snrs": [30.0, 0.0]}


def wrong(model, x, y):
    return float(np.mean(model.predict(x, verbose=0).argmax(1) != y))


def test_every_cell_is_the_error_on_the_inputs_that_it_names(trained):
    model, x, y = trained
    pgd = [PGD(Linf(r), steps=3, bounds=(0, 1)) for r in (0.02, 0.1)]
    found = evaluate_suite(
        model, x, y, **FEW, pgd=pgd, fgsm_snrs=[25.0], dropout_layers=["h"], seed=4
    )
    cells = {(r["kind"], r["name"], r["level"]): r["error"] for r in found.rows}
    expected = {("clean", "clean", 0.0): wrong(model, x, y)}
    for snr in FEW["snrs"]:
        noisy = noise.gaussian_noise(x, snr, seed=4)
        expected["noise", "gaussian", snr] = wrong(model, noisy, y)
    radii = Linf(noise.linf_radius(x, 25.0))
    expected["fgsm", "FGSM", 25.0] = FGSM(radii, bounds=(0, 1))(model, x, y).success_rate
    for attack in pgd:
        expected["pgd", repr(attack), attack.ball.radius] = attack(model, x, y).success_rate
    for name in FEW["corruptions"]:
        for severity in FEW["severities"]:
            images = corrupt(x, name, severity, seed=4)
            expected["corruption", name, severity] = wrong(model, images, y)
    dropped = [key for key in cells if key[0] == "dropout"]
    assert [level for _, _, level in dropped] == [0.25, 0.4]
    assert {key: v for key, v in cells.items() if key not in dropped} == expected
    assert found.clean_error < 0.2 < cells["noise", "gaussian", 0.0]  # the task is not trivial
    assert cells["pgd", repr(pgd[1]), 0.1] > found.clean_error


def test_it_continues_after_a_kill_and_computes_nothing_twice(trained, tmp_path, monkeypatch):
    model, x, y = trained
    options = {**FEW, "include": ["corruption"], "path": tmp_path / "s"}
    whole = evaluate_suite(model, x, y, **{**options, "path": None})
    calls, real = [], suite.corrupt

    def killed(images, name, severity, **kwargs):
        if name != "brightness":  # the check of the inputs
            calls.append((name, severity))
            if len(calls) == 3:
                raise KeyboardInterrupt
        return real(images, name, severity, **kwargs)

    monkeypatch.setattr(suite, "corrupt", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_suite(model, x, y, **options)
    assert len(load_suite(tmp_path / "s").rows) == 3  # clean and two cells
    resumed = evaluate_suite(model, x, y, **options)
    assert len(calls) == 5 and calls[2] == calls[3]

    def plain(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert plain(resumed.rows) == plain(whole.rows)
    with open(tmp_path / "s" / "suite.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["error"]) for row in table] == [row["error"] for row in whole.rows]
    said = []
    evaluate_suite(model, x, y, **options, progress=said.append)
    assert said == [] and len(calls) == 5


def test_a_state_of_something_else_or_damaged_is_refused(trained, tmp_path):
    model, x, y = trained
    options = {"include": ["noise"], "snrs": [10.0], "path": tmp_path}
    evaluate_suite(model, x, y, **options)
    other = keras.models.clone_model(model)
    for wrong_one in ((other, x, y), (model, 1 - x, y), (model, x, (y + 1) % 3)):
        with pytest.raises(ValueError, match="another model"):
            evaluate_suite(*wrong_one, **options)
    with pytest.raises(ValueError, match="seed is there"):
        evaluate_suite(model, x, y, **options, seed=1)
    assert evaluate_suite(other, x, y, **options, overwrite=True).rows
    (tmp_path / "suite.json").write_text(json.dumps({"version": 1, "digest": ""})[:-3])
    with pytest.raises(ValueError, match="damaged"):
        evaluate_suite(model, x, y, **options)
    with pytest.raises(ValueError, match="no suite here"):
        load_suite(tmp_path / "nowhere")


KILLED = """
import os, signal, sys, keras, numpy as np
from tf_lyapunov.evaluation.suite import evaluate_suite
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
x, y = np.random.default_rng(0).random((40, 8, 8, 1)), np.arange(40) % 3
few = {"include": ["noise", "corruption"], "corruptions": ["fog", "snow"], "severities": [1, 5]}
said = []

def progress(text):
    said.append(text)
    if sys.argv[2] == "kill" and len(said) == 9:
        os.kill(os.getpid(), signal.SIGKILL)

found = evaluate_suite(model, x, y, **few, path=sys.argv[1], progress=progress)
assert len(said) == 12 - 8, said
whole = evaluate_suite(model, x, y, **few)
assert [r["error"] for r in found.rows] == [r["error"] for r in whole.rows]
print("resumed")
"""


def test_a_killed_process_is_resumed_by_another(tmp_path):
    runs = [fresh_processes.run(KILLED, tmp_path, mode) for mode in ("kill", "resume")]
    assert runs[0].returncode == -signal.SIGKILL, runs[0].stderr[-2000:]
    assert runs[1].stdout.strip() == "resumed", runs[1].stderr[-2000:]


def test_attacks_are_told_apart_by_their_settings_and_asked_for_again_only_if_these_change(
    trained, tmp_path
):
    model, x, y = trained
    options = {"include": ["pgd"], "path": tmp_path}
    short, long = (PGD(Linf(0.05), steps=2, step=s, bounds=(0, 1)) for s in (0.01, 0.05))
    said = []
    found = evaluate_suite(model, x, y, pgd=[short, long], **options, progress=said.append)
    rates = [attack(model, x, y).success_rate for attack in (short, long)]
    assert [row["error"] for row in found.of_kind("pgd")] == rates and rates[0] < rates[1]
    assert len(said) == 3
    again = PGD(Linf(0.05), steps=2, step=0.05, bounds=(0, 1))
    evaluate_suite(model, x, y, pgd=[again], **options, progress=said.append)
    assert len(said) == 3
    evaluate_suite(model, x, y, pgd=[PGD(Linf(0.05), steps=2)], **options, progress=said.append)
    assert len(said) == 4


def test_equal_weights_in_another_architecture_are_another_model(tmp_path):
    def slope(a):
        hidden = [layers.Dense(4, name="h"), layers.LeakyReLU(a)]
        model = keras.Sequential([keras.Input((5,)), *hidden, layers.Dense(2)])
        model.set_weights([np.full(w.shape, 0.5) for w in model.get_weights()])
        return model

    x, y = np.eye(5), [0, 1, 0, 1, 0]
    options = {"include": ["noise"], "snrs": [10.0], "bounds": None, "path": tmp_path}
    evaluate_suite(slope(0.1), x, y, **options)
    said = []
    evaluate_suite(slope(0.1), x, y, **options, progress=said.append)
    assert not said
    with pytest.raises(ValueError, match="another model"):
        evaluate_suite(slope(0.2), x, y, **options)


def test_a_model_in_a_training_method_is_measured_as_itself(trained, tmp_path):
    model, x, y = trained
    options = {"include": ["dropout"], "dropout_layers": ["h"], "path": tmp_path}
    wrapped = AdversarialModel(model, PGD(Linf(0.1), steps=2))
    rows = evaluate_suite(wrapped, x, y, **options).rows
    assert evaluate_suite(model, x, y, **options).rows == rows


def test_released_arrays_take_the_place_of_our_corruptions(trained):
    model, x, y = trained
    asked = []

    def released(name, severity):
        asked.append((name, severity))
        return x[:12], (y[:12] + 1) % 3

    found = evaluate_suite(
        model, x, y, include=["corruption"], corruptions=["fog"], severities=[2], released=released
    )
    row = found.of_kind("corruption")[0]
    assert asked == [("fog", 2)] * 2 and row["count"] == 12  # once to see that they are there
    assert row["error"] == wrong(model, x[:12], (y[:12] + 1) % 3)
    with pytest.raises(ValueError, match="shape"):
        evaluate_suite(model, x, y, released=lambda *_: (x[:, 1:], y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["clean", "rain"]}, "include"),
        ({"include": "noise"}, "include"),
        ({"include": ["dropout"]}, "Dropout needs"),
        ({"include": ["dropout"], "dropout_layers": ["nowhere"]}, "nowhere"),
        ({"corruptions": ["rain"]}, "rain"),
        ({"severities": [0]}, "1 to 5"),
        ({"severities": []}, "nothing to measure"),
        ({"include": ["noise"], "snrs": []}, "nothing to measure"),
        ({"bounds": (1, 0)}, "bounds"),
        ({"bounds": (0.9, 1.0)}, "bounds"),
        ({"bounds": (0.0, np.inf)}, "bounds"),
        ({"bounds": None, "include": ["pgd"]}, "nothing to measure"),
        ({"bounds": None}, "nothing to measure"),
        ({"seed": -1}, "seed"),
        ({"pgd": [PGD(Linf([0.1] * 30))]}, "one radius"),
        ({"pgd": [PGD(Linf(0.1), targeted=True)]}, "untargeted"),
        ({"pgd": ["PGD"]}, "PGD attacks"),
    ],
)
def test_impossible_suites_are_refused_before_anything_is_measured(trained, options, message):
    model, x, y = trained
    said = []
    with pytest.raises(ValueError, match=message):
        evaluate_suite(model, x, y, **options, progress=said.append)
    assert len(said) <= 2  # dropout's names are met at its first cell


def test_corruptions_refuse_inputs_that_are_no_images():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(2)])
    x, y = np.full((4, 5), 0.5), [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"images.*include"):
        evaluate_suite(model, x, y)
    found = evaluate_suite(model, x, y, include=["noise", "fgsm"], snrs=[20.0], bounds=None)
    assert len(found.rows) == 3
    with pytest.raises(ValueError, match="finite"):
        evaluate_suite(model, x * np.nan, y)
    with pytest.raises(ValueError, match="from 0 to 1"):
        evaluate_suite(model, x, [0, 1, 2, 1], include=["noise"])


def result(clean, fog, snow):
    rows = [{"kind": "clean", "name": "clean", "level": 0.0, "error": clean}]
    for name, errors in (("fog", fog), ("snow", snow)):
        rows += [
            {"kind": "corruption", "name": name, "level": s, "error": e}
            for s, e in enumerate(errors, 1)
        ]
    return SuiteResult(rows)


def test_mce_and_relative_mce_are_their_formulas():
    own, base = result(0.1, [0.2, 0.3], [0.4, 0.5]), result(0.2, [0.4, 0.6], [0.5, 0.7])
    assert np.isclose(own.corrupted_error, 0.35)
    assert np.isclose(own.mean_corruption_error(base), 100 * (0.5 / 1.0 + 0.9 / 1.2) / 2)
    assert np.isclose(own.relative_corruption_error(base), 100 * 0.25 / 0.35)
    assert np.isclose(base.mean_corruption_error(base), 100)


def test_published_relative_mce_follows_from_the_published_errors():
    # Table 2 of Bontonou et al.: errors rounded to 0.1%, relative mCE to 1%.
    errors = {"V": (11.9, 31.6, 100), "P": (10.2, 30.5, 103), "L": (13.2, 31.3, 92),
              "PGD": (12.8, 18.8, 30), "L2NN": (20.9, 28.5, 39)}  # fmt: skip
    suites = {k: result(c / 100, [e / 100], [e / 100]) for k, (c, e, _) in errors.items()}
    for name, (_, _, published) in errors.items():
        assert abs(suites[name].relative_corruption_error(suites["V"]) - published) < 1.0


def test_comparisons_without_ground_are_refused_and_shown_as_missing():
    own, perfect = result(0.1, [0.2], [0.4]), result(0.0, [0.0], [0.0])
    with pytest.raises(ValueError, match="must not be 0"):
        own.mean_corruption_error(perfect)
    with pytest.raises(ValueError, match="positive"):
        own.relative_corruption_error(perfect)
    with pytest.raises(ValueError, match="same corruptions"):
        result(0.1, [0.2, 0.3], [0.4, 0.5]).mean_corruption_error(own)
    more = result(0.3, [0.2, 0.9], [0.4, 0.9])  # cells that only the baseline has do not count
    assert own.mean_corruption_error(more) == 100.0
    assert own.summary(perfect)["mce"] is None and "note" in own.summary(perfect)
    rows = comparison_rows({"a": own, "b": perfect}, "a")
    assert rows[0]["mce"] == 100.0 and "| b |" in markdown_table(rows)
    with pytest.raises(ValueError, match="baseline"):
        comparison_rows({"a": own}, "c")


def test_figures_show_every_model(trained):
    model, x, y = trained
    found = evaluate_suite(model, x, y, **FEW, include=["noise", "corruption"])
    both = {"one": found, "two": found}
    lines = noise_figure(both).axes[0].lines
    assert [line.get_label() for line in lines] == ["one", "two"]
    assert list(lines[0].get_xdata()) == [0.0, 30.0]
    bars = corruption_figure(both, theme="dark").axes[0].patches
    assert len(bars) == 4 and len(CORRUPTIONS) == 15
