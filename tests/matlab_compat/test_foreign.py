"""Networks of other tools: matrices in their order and orientation, or a refusal that says why."""

import json

import keras
import numpy as np
import pytest
from command_line import call
from scipy.io import savemat
from scipy.sparse import csc_matrix

from tf_lyapunov.cli import BAD_INPUT, DONE
from tf_lyapunov.errors import ModelFileError
from tf_lyapunov.matlab import import_network

SIZES = (4, 5, 5, 3)


def numbers(transposed=False):
    rng = np.random.default_rng(0)
    pairs = list(zip(SIZES, SIZES[1:], strict=False))
    matrices = [np.float64(np.float32(rng.normal(size=(n, m)))) for m, n in pairs]
    vectors = [np.float64(np.float32(rng.normal(size=n))) for _, n in pairs]
    return [m.T if transposed else m for m in matrices], vectors


def cell(items, columns=False):
    held = np.empty((len(items), 1) if columns else (1, len(items)), object)
    for k, item in enumerate(items):
        held.reshape(-1)[k] = item
    return held


def expected(x, last=lambda z: z):
    """y = W₃ tanh(W₂ relu(W₁ x + b₁) + b₂) + b₃, by the numbers of the file."""
    (first, second, third), (a, b, c) = numbers()
    hidden = np.maximum(first @ x + a, 0)
    return last(third @ np.tanh(second @ hidden + b) + c)


LAYOUTS = {
    "cells": (lambda w, b: {"weights": cell(w), "biases": cell(b, True)}, "weights", "biases"),
    "sparse": (
        lambda w, b: {"weights": cell([csc_matrix(w[0]), *w[1:]]), "biases": cell(b)},
        "weights", "biases",
    ),
    "struct": (
        lambda w, b: {
            "p": {f"W{k}": m for k, m in enumerate(w, 9)},
            "q": {f"b{k}": v[:, None] for k, v in enumerate(b, 9)},
        },
        "p", "q",
    ),
    "fields": (
        lambda w, b: {"net": {"W": cell(w), "b": cell(b), "name": "mine"}}, "net.W", "net.b",
    ),
    "struct array": (
        lambda w, b: {
            "net": np.array([(m, v) for m, v in zip(w, b, strict=True)],
                            dtype=[("W", object), ("b", object)])
        },
        "net.W", "net.b",
    ),
    "names": (
        lambda w, b: {**{f"W{k}": m for k, m in enumerate(w)},
                      **{f"b{k}": v for k, v in enumerate(b)}},
        "W0,W1, W2", "b0,b1,b2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_chain_computes_what_its_matrices_say(tmp_path, layout, transposed):
    make, weights, biases = LAYOUTS[layout]
    savemat(tmp_path / "a.mat", make(*numbers(transposed)))
    found = import_network(
        tmp_path / "a.mat", weights=weights, biases=biases, activation="poslin,tansig"
    )
    assert found.orientation == ("in-out" if transposed else "out-in") and found.rounding == 0
    x = np.random.default_rng(1).normal(size=4)
    y = keras.ops.convert_to_numpy(found.model(np.float32(x)[None]))[0]
    np.testing.assert_allclose(y, expected(np.float64(np.float32(x))), rtol=2e-5, atol=2e-5)


def test_square_matrices_need_their_orientation(tmp_path):
    square = np.array([[1.0, 2.0], [0.0, 1.0]])
    savemat(tmp_path / "a.mat", {"w": cell([square, square]), "b": cell([np.ones(2)] * 2)})
    with pytest.raises(ValueError, match=r"State `orientation`.*2×2, 2×2"):
        import_network(tmp_path / "a.mat", weights="w", biases="b")
    for orientation, kernel in (("out-in", square.T), ("in-out", square)):
        found = import_network(tmp_path / "a.mat", weights="w", biases="b", orientation=orientation)
        np.testing.assert_array_equal(found.model.layers[0].kernel, kernel)


def test_biases_may_be_missing_and_rounding_is_said(tmp_path):
    savemat(tmp_path / "a.mat", {"w": cell([np.full((3, 2), 0.1), np.full((1, 3), 0.7)])})
    found = import_network(tmp_path / "a.mat", weights="w", activation="tanh")
    assert [layer.use_bias for layer in found.model.layers] == [False, False]
    assert 0 < found.rounding <= 2.0**-24 and "rounded to float32" in found.explain()


@pytest.mark.parametrize("content, names, message", [
    ({"w": cell([np.ones((2, 3)), np.ones((2, 3))])}, {}, "no chain"),
    ({"w": cell([np.ones((2, 3))]), "b": cell([np.ones(3), np.ones(2)])}, {"biases": "b"},
     "1 matrices and 2 biases"),
    ({"w": cell([np.ones((4, 3))]), "b": cell([np.ones(5)])}, {"biases": "b"}, "no chain"),
    ({"w": cell([np.ones((4, 3))])}, {"biases": "b"}, "no variable b"),
    ({"w": cell([np.array([[1.0, np.nan]])])}, {}, "NaN"),
    ({"w": cell([np.array([[1j, 1]])])}, {}, "complex numbers"),
    ({"w": cell(["text"])}, {}, "no array of real numbers"),
    ({"w": cell([np.ones((2, 2, 2))])}, {}, "must be a matrix"),
    ({"w": cell([np.zeros((0, 2))])}, {}, "is empty"),
    ({"w": {"B": np.ones((2, 2)), "A": np.ones((2, 2))}}, {}, "order of the fields"),
    ({"w": {"a": np.ones((2, 2))}}, {"weights": "w.c"}, "no field c"),
    ({"w": np.ones((2, 2))}, {"weights": "w.c"}, "no struct"),
    ({"w": cell([np.ones((4, 3))])}, {"orientation": "in-out", "biases": "v",},
     "no variable v"),
])  # fmt: skip
def test_what_is_no_chain_is_refused(tmp_path, content, names, message):
    savemat(tmp_path / "a.mat", content)
    with pytest.raises(ModelFileError) as error:
        import_network(tmp_path / "a.mat", **{"weights": "w", **names})
    assert message in str(error.value) and "Received" in str(error.value)


@pytest.mark.parametrize("settings, message", [
    ({"weights": "w;v"}, "Names are variables"),
    ({"weights": "w", "orientation": "up"}, "`orientation`"),
    ({"weights": "w", "activation": "spam"}, "Received: 'spam'"),
    ({"weights": "w", "activation": "relu,relu"}, "one per hidden layer, 1"),
])  # fmt: skip
def test_wrong_settings_are_named(tmp_path, settings, message):
    savemat(tmp_path / "a.mat", {"w": cell([np.ones((2, 3)), np.ones((1, 2))])})
    with pytest.raises(ValueError, match=message):
        import_network(tmp_path / "a.mat", **settings)


def test_numbers_beyond_float32_are_refused(tmp_path):
    savemat(tmp_path / "a.mat", {"w": cell([np.full((2, 3), 1e39)])})
    with pytest.raises(ValueError, match="that float32 holds"):
        import_network(tmp_path / "a.mat", weights="w", orientation="in-out")


def test_the_command_writes_a_model_that_certify_reads(tmp_path, capsys):
    matrices, vectors = numbers()
    savemat(tmp_path / "net.mat", {"weights": cell(matrices), "biases": cell(vectors)})
    arguments = ("--weights", "weights", "--biases", "biases", "--activation", "relu")
    out = tmp_path / "net.keras"
    code, text, _ = call(capsys, "import-mat", tmp_path / "net.mat", *arguments, "--out", out)
    assert code == DONE and "weights{1}: 4 to 5, relu" in text and "read as out-in" in text
    model = keras.saving.load_model(out)
    np.testing.assert_array_equal(model.layers[2].kernel, matrices[2].T)
    code, _, err = call(capsys, "import-mat", tmp_path / "net.mat", *arguments, "--out", out)
    assert code == BAD_INPUT and "--overwrite" in err
    code, text, _ = call(
        capsys, "import-mat", tmp_path / "net.mat", *arguments, "--out", out, "--overwrite",
        "--json",
    )  # fmt: skip
    assert code == DONE and json.loads(text)["orientation"] == "out-in"
    for wrong, message in (
        (("--weights", "weights"), "goes with `--out`"),
        (("--biases", "biases"), "go with `--weights`"),
        (("--weights", "spam", "--out", tmp_path / "x.keras"), "no variable spam"),
    ):
        code, _, err = call(capsys, "import-mat", tmp_path / "net.mat", *wrong)
        assert code == BAD_INPUT and message in err
    assert not (tmp_path / "x.keras").exists()
