"""SDP-based Lipschitz layers: T dominates WᵀW exactly, after rounding, on every image."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from layers.test_potential import FLOAT64, layers, parts, randomise, reference, train, true_gain

from tf_lyapunov.layers.sdp import SDPLipschitzConv1D, SDPLipschitzConv2D, SDPLipschitzDense
from tf_lyapunov.theory.operators import convolution_matrix
from tf_lyapunov.theory.potential import schur_diagonal

SDP = layers(SDPLipschitzDense, SDPLipschitzConv1D, SDPLipschitzConv2D)


@settings(max_examples=25)
@given(SDP, st.integers(0, 10**6), st.sampled_from([1e-12, 1e-3, 1.0, 30.0]))
def test_no_weights_make_a_layer_exceed_its_gain(built, seed, scale):
    layer, shape = built[0](), built[1]
    layer.build((None, *shape))
    randomise(layer, seed, scale)
    assert true_gain(layer) <= layer.max_gain * FLOAT64
    assert true_gain(layer) <= layer.gain_upper_bound() * FLOAT64
    assert layer.gain_upper_bound() <= layer.max_gain * (1 + 1e-9)


@settings(max_examples=6)
@given(SDP, st.integers(0, 10**6))
def test_the_gain_holds_after_training_at_a_large_learning_rate(built, seed):
    layer, shape = built[0](), built[1]
    train(layer, shape, seed=seed)
    assert true_gain(layer) <= layer.max_gain * FLOAT64


def autocorrelation_sums(kernel):
    """Σ_lag |Σ_t ⟨K[t+lag]_i, K[t]_j⟩|, by loops over pairs of taps."""
    sizes, width = kernel.shape[:-2], kernel.shape[-1]
    by_lag = {}
    for s, t in itertools.product(np.ndindex(*sizes), repeat=2):
        lag = tuple(a - b for a, b in zip(s, t, strict=True))
        by_lag[lag] = by_lag.get(lag, np.zeros((width, width))) + kernel[s].T @ kernel[t]
    return sum(np.abs(g) for g in by_lag.values())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (SDPLipschitzDense(7), (5,)),
        (SDPLipschitzConv1D(4, 3), (6, 3)),
        (SDPLipschitzConv2D(4, (3, 2)), (5, 5, 3)),
    ],
)
def test_the_scale_is_the_published_one_to_rounding(layer, shape):
    layer.build((None, *shape))
    rng = np.random.default_rng(0)
    layer.weights_logarithm.assign(rng.standard_normal(layer.weights_logarithm.shape))
    values = layer.effective_values()
    q = np.exp(np.asarray(ops.convert_to_numpy(layer.weights_logarithm), dtype=float))
    diagonal = schur_diagonal(autocorrelation_sums(values["kernel"]), q)
    assert np.all(values["scale"] <= 2 / diagonal)
    np.testing.assert_allclose(values["scale"], 2 / diagonal, rtol=1e-4)


def test_row_sums_of_the_finite_image_are_not_what_the_scale_comes_from():
    """Terms that cancel inside an image do not at its border; the layer is safe all the same."""
    layer = SDPLipschitzConv1D(1, 2, use_bias=False)
    layer.build((None, 4, 2))
    # Neighbouring positions cancel, ⟨(1, 1), (1, -1)⟩ = 0, but not where a tap falls outside.
    layer.kernel.assign(np.array([[[1.0], [1.0]], [[1.0], [-1.0]]]))
    matrix, scale = parts(layer)
    assert true_gain(layer) <= FLOAT64
    np.testing.assert_allclose(scale, 2 / 4, rtol=1e-5)
    rows = np.abs(matrix @ matrix.T).sum(axis=1)
    assert rows.min() < rows.max() <= 4


def test_the_layer_is_safe_at_every_size_of_an_image():
    layer = SDPLipschitzConv2D(3, 3)
    layer.build((None, None, None, 2))
    randomise(layer, 0, 1.0)
    values = layer.effective_values()
    for size in [(1, 1), (2, 7), (9, 9)]:
        other = SDPLipschitzConv2D(3, 3)
        other.build((None, *size, 2))
        matrix = convolution_matrix(values["kernel"], other.linear_map).toarray()
        weighted = matrix * np.sqrt(np.resize(values["scale"], len(matrix)))[:, None]
        assert np.linalg.norm(weighted, 2) ** 2 <= 2.0
    assert layer.gain_upper_bound() < 1.01  # the size-free bound costs a little


@settings(max_examples=10)
@given(SDP, st.integers(0, 10**6))
def test_the_layer_computes_the_map_that_its_weights_say(built, seed):
    layer, shape = built[0](), built[1]
    layer.build((None, *shape))
    randomise(layer, seed, 0.5)
    x = np.random.default_rng(seed).integers(-4, 5, (3, *shape)).astype("float64")
    y = np.asarray(ops.convert_to_numpy(ops.cast(layer(x), "float64")))
    u = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}
    matrix, scale = parts(layer)
    size = 1 + np.abs(matrix.T) @ (scale * (np.abs(matrix) @ np.full(matrix.shape[1], 4) + 2))
    terms = 4 * np.prod([*layer.kernel.shape, 8.0])
    allowed = terms * u[layer.compute_dtype] * layer.max_gain * (4 + size.max())
    np.testing.assert_allclose(y, reference(layer, x), rtol=0, atol=allowed)


def test_the_weights_q_are_trained_and_bounded():
    layer = SDPLipschitzDense(6)
    before = train(layer, (4,)) and np.array(ops.convert_to_numpy(layer.weights_logarithm))
    assert np.all(before != 0)
    layer.weights_logarithm.assign(np.array([1e9, -1e9, 0, 50, -50, 1]))
    assert true_gain(layer) <= FLOAT64
    assert np.all(np.isfinite(ops.convert_to_numpy(layer(np.ones((1, 4))))))
