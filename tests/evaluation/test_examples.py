"""The weakest inputs are those with the smallest radii; what is stored is small and true."""

import base64
import io
import json
import types

import keras
import numpy as np
import pytest

from tf_lyapunov.evaluation import pictures
from tf_lyapunov.evaluation.classes import MOST_COLUMNS, MOST_ROWS, class_summary
from tf_lyapunov.evaluation.examples import bracket_examples, weakest_examples

X = np.array([[1.0, 0.0], [0.25, 0.0], [-0.5, 0.0], [3.0, 1.0], [0.5, 2.0]], np.float32)
Y = np.zeros(5, int)  # the third is misclassified


def linear_model(shape=(2,)):
    """Logits (x_0, -x_0): inputs at distance |x_0| from the other class."""
    flat = [keras.layers.Flatten()] if len(shape) > 1 else []
    model = keras.Sequential([keras.Input(shape), *flat, keras.layers.Dense(2, use_bias=False)])
    kernel = np.zeros((int(np.prod(shape)), 2))
    kernel[0] = 1.0, -1.0
    model.set_weights([kernel])
    return model


def certificate(radius):
    return types.SimpleNamespace(radius=np.asarray(radius, float))


@pytest.fixture(scope="module")
def model():
    return linear_model()


def test_the_weakest_are_right_and_come_first_and_a_typical_and_the_strongest_last(model):
    found = weakest_examples(model, X, Y, count=3)
    assert [e["index"] for e in found] == [1, 0, 3]
    assert [e["role"] for e in found] == ["weakest", "typical", "strongest"]
    for example in found:
        exact = float(X[example["index"], 0])
        # Beyond the boundary by the attacks' own step over it.
        assert exact <= example["distance"] <= exact * 1.001 and example["prediction_adv"] == 1
        assert example["radius"] is None and example["label"] == 0


def test_radii_decide_the_order_and_numbers_of_the_same_inputs_are_asked_for(model):
    found = weakest_examples(
        model, X, Y, certificate=certificate([0.01, 0.2, 0.0, 0.005, 0.3]), count=2
    )
    assert [(e["index"], e["radius"]) for e in found] == [(3, 0.005), (0, 0.01)]
    with pytest.raises(ValueError, match="`certificate` must be of the same 5 inputs"):
        weakest_examples(model, X, Y, certificate=certificate([1.0]))


def test_the_models_own_rounding_is_no_attack_on_a_certified_radius(model):
    """Radii are exact; what float32 decides within one is pushed out until float64 agrees."""
    tight = certificate(np.abs(X[:, 0].astype(float)))
    for example in weakest_examples(model, X, Y, certificate=tight):
        assert example["distance"] is None or example["distance"] >= example["radius"]


def test_nobody_right_leaves_nothing_to_show(model):
    assert weakest_examples(model, X[2:3], [0]) == []


def test_features_that_change_most_are_shown_of_what_is_no_image(model):
    (example,) = weakest_examples(model, X[:1], [0], count=1)
    (part,) = example["inputs"]
    assert part["features"] == 2 and part["changed"] == 1
    (change,) = part["changes"]
    assert change["feature"] == "1" and change["from"] == 1.0 and change["to"] < 0


def test_flattened_images_are_shown_as_pictures_in_their_own_shape():
    flat = linear_model((12,))
    x = np.linspace(0.1, 1, 12, dtype=np.float32)[None]
    (example,) = weakest_examples(flat, x, [0], shape=(3, 4, 1), count=1)
    assert example["inputs"][0]["picture"]["shape"] == [3, 4, 1]
    (example,) = weakest_examples(flat, x, [0], shape=(5, 5, 1), count=1)
    assert example["inputs"][0]["features"] == 12


def test_of_several_inputs_each_is_shown_and_one_held_fixed_does_not_change():
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    model = keras.Model([a, b], keras.layers.Add()([linear_model()(a), linear_model()(b)]))
    both = weakest_examples(model, [X[:1], X[:1]], [0], count=1)[0]
    assert [part["name"] for part in both["inputs"]] == ["a", "b"]
    assert all(part["changed"] == 1 for part in both["inputs"])
    one = weakest_examples(model, [X[:1], X[:1]], [0], count=1, perturbed="b")[0]
    assert [part["changed"] for part in one["inputs"]] == [0, 1]
    assert one["distance"] > both["distance"]


def test_the_nearest_of_a_bracket_are_shown_with_its_bounds():
    found = types.SimpleNamespace(
        found=np.array([True, False, True]),
        upper=np.array([0.5, np.inf, 0.25]),
        lower=np.array([0.4, 0.0, 0.2]),
        labels=np.array([0, 1, 2]),
        predictions_adv=np.array([1, 1, 0]),
        attack=np.array(["DDN", "", "FMN"], object),
        x_adv=X[:3] + 1,
    )
    examples = bracket_examples(found, X[:3])
    assert [(e["index"], e["radius"], e["distance"]) for e in examples] == [
        (2, 0.2, 0.25),
        (0, 0.4, 0.5),
    ]
    assert examples[0]["attack"] == "FMN" and json.dumps(examples)
    found.found[:] = False
    assert bracket_examples(found, X[:3]) == []


@pytest.mark.parametrize("shape", [(8, 8, 1), (3, 32, 32), (224, 200, 3), (1, 1, 1), (500, 3, 1)])
def test_a_stored_picture_is_small_and_shows_what_was_given(shape):
    rng = np.random.default_rng(0)
    clean = rng.normal(size=shape)
    changed = clean + 0.1 * rng.normal(size=shape)
    record = pictures.encode(clean, changed)
    assert json.loads(json.dumps(record)) == record
    assert len(json.dumps(record)) < 2 * pictures.MOST_VALUES * 4 / 3 + 300
    assert len(pictures.encode(clean, None)) == 5
    found = pictures.urls(record)
    assert set(found) == {"clean", "change", "perturbed"}
    image = pytest.importorskip("PIL.Image")
    sizes = {
        image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size for url in found.values()
    }
    assert sizes == {(record["shape"][1], record["shape"][0])}


def test_levels_lie_within_half_a_step_of_the_picture():
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(1)
    clean = rng.random((9, 7, 3))
    changed = clean + 0.3 * rng.random((9, 7, 3))
    record = pictures.encode(clean, changed)
    width = record["high"] - record["low"]
    for key, truth, steps in (("clean", clean, 0.5), ("perturbed", changed, 1.5)):
        data = base64.b64decode(pictures.urls(record)[key].split(",")[1])
        levels = np.asarray(image.open(io.BytesIO(data)), float)
        shown = record["low"] + levels * width / 255
        # One half for each rounding, of the picture, the change (255 levels) and their sum.
        assert np.abs(shown - truth).max() <= steps * width / 255 * (1 + 1e-9)


def test_unchanged_places_of_grey_pictures_are_white():
    image = pytest.importorskip("PIL.Image")
    clean, changed = np.zeros((2, 2, 1)), np.zeros((2, 2, 1))
    changed[0, 0], changed[1, 1] = 1.0, -1.0
    url = pictures.urls(pictures.encode(clean, changed))["change"]
    shown = np.asarray(image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))
    assert shown[0, 1].tolist() == [255, 255, 255]
    assert shown[0, 0].tolist() == [178, 24, 43] and shown[1, 1].tolist() == [33, 102, 172]


def test_counts_by_class_add_up_to_the_shares_of_all():
    rng = np.random.default_rng(0)
    labels, decided = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    found = class_summary(labels, decided)
    confusion = np.array(found["confusion"])
    assert confusion.sum() == 200 and np.trace(confusion) == np.sum(labels == decided)
    assert [row["clean"] for row in found["rows"]] == np.diag(confusion).tolist()
    assert [row["count"] for row in found["rows"]] == confusion.sum(axis=1).tolist()
    assert found["mistakes"][0]["count"] == (confusion - np.diag(np.diag(confusion))).max()


def test_of_many_classes_the_weakest_are_kept_and_the_record_stays_small():
    classes = 1000
    labels = np.repeat(np.arange(classes), 2)
    certified = [2] * classes
    certified[700] = 0
    by_radius = [{"radius": 0.1, "certified": certified, "attacked": [2] * classes}]
    found = class_summary(labels, labels, by_radius)
    assert len(found["rows"]) == MOST_ROWS and found["rows"][0]["class"] == 700
    assert found["confusion"] is None and found["present"] == classes > MOST_COLUMNS
    assert len(json.dumps(found)) < 6000


def test_labels_and_decisions_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="same inputs"):
        class_summary([0, 1], [0])
