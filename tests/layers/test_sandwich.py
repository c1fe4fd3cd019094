"""Sandwich layers: formula, gain over all activation patterns, circular convolutions."""

import functools
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from layers.test_potential import DTYPES, FLOAT64, randomise, train

from tf_lyapunov.layers.sandwich import SandwichConv2D, SandwichDense
from tf_lyapunov.spectral.orthogonal import block_fourier, fourier_bases
from tf_lyapunov.theory.orthogonal import cayley


def raw_values(layer):
    """Normalised kernel, ψ and bias of a layer in float64, by the definition."""
    kernel, length, logarithm = (
        np.asarray(ops.convert_to_numpy(v), dtype=np.float64)
        for v in (layer.kernel, layer.length, layer.psi_logarithm)
    )
    rows, units = kernel.shape[-2:]
    taps = math.prod(kernel.shape[:-2])
    usual = math.sqrt(kernel.size * 2 / (taps * (rows + units)))
    kernel = kernel * length * usual / np.linalg.norm(kernel)
    return kernel, np.exp(logarithm), np.asarray(ops.convert_to_numpy(layer.bias), float)


def matrices(layer):
    """The two linear maps, as matrices acting on row vectors, from the effective weights."""
    values = layer.effective_values()
    if isinstance(layer, SandwichDense):
        return values["inner"], values["outer"]
    bases, found = fourier_bases(layer._grid), []
    with keras.device("cpu:0"):
        for block in (values["inner"], values["outer"]):
            channels = block.shape[-2] // 2
            size = math.prod(layer._grid) * channels
            basis = np.eye(size).reshape(size, *layer._grid, channels)
            found.append(np.asarray(block_fourier(basis, block, bases)).reshape(size, -1))
    return tuple(found)


def sampled_gain(layer, seed=0, draws=40):
    """Largest ‖Q D P‖ over D = I and random activation patterns D."""
    inner, outer = matrices(layer)
    rng = np.random.default_rng(seed)
    patterns = [np.ones(inner.shape[1]), *rng.integers(0, 2, (draws, inner.shape[1]))]
    return max(np.linalg.norm((inner * d) @ outer, 2) for d in patterns)


@st.composite
def sandwiches(draw):
    arguments = {
        "dtype": draw(st.sampled_from(DTYPES)),
        "max_gain": draw(st.sampled_from([1.0, 1.0, 0.3, 2.5])),
        "use_bias": draw(st.booleans()),
    }
    channels, units = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    if draw(st.booleans()):
        return functools.partial(SandwichDense, units, **arguments), (channels,)
    strides = draw(st.integers(1, 2))
    size = tuple(strides * draw(st.integers(1, 4)) for _ in range(2))
    kernel_size = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    make = functools.partial(SandwichConv2D, min(units, 3), kernel_size, strides, **arguments)
    return make, (*size, min(channels, 3))


@settings(max_examples=25)
@given(sandwiches(), st.integers(0, 10**6), st.sampled_from([1e-12, 1e-2, 1.0, 1e3]))
def test_no_weights_make_a_layer_exceed_its_gain(built, seed, scale):
    layer, shape = built[0](), built[1]
    layer.build((None, *shape))
    randomise(layer, seed, scale)
    bound = layer.gain_upper_bound()
    assert bound <= layer.max_gain * layer.rounding_inflation * FLOAT64
    assert sampled_gain(layer, seed) <= bound * FLOAT64
    if layer.compute_dtype in ("float32", "float64"):
        assert layer.rounding_inflation == 1.0
        assert bound > 0.99 * layer.max_gain


@settings(max_examples=6)
@given(sandwiches(), st.integers(0, 10**6))
def test_the_gain_holds_after_training_at_a_large_learning_rate(built, seed):
    layer, shape = built[0](), built[1]
    train(layer, shape, seed=seed)
    assert layer.gain_upper_bound() <= layer.max_gain * layer.rounding_inflation * FLOAT64
    assert sampled_gain(layer, seed) <= layer.max_gain * layer.rounding_inflation * FLOAT64


def test_the_dense_layer_is_the_published_formula():
    layer = SandwichDense(4, dtype="float64")
    layer.build((None, 6))
    randomise(layer, 0, 0.7)
    kernel, psi, bias = raw_values(layer)
    q = cayley(kernel)
    a, b = q[:4].T, q[4:].T
    np.testing.assert_allclose(a @ a.T + b @ b.T, np.eye(4), atol=1e-13)
    x = np.random.default_rng(1).standard_normal((5, 6))
    hidden = np.maximum(math.sqrt(2) / psi * (x @ b.T) + bias, 0)
    expected = math.sqrt(2) * (hidden * psi) @ a
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, atol=1e-12)


@pytest.mark.parametrize(("size", "kernel_size"), [((4, 6), (3, 3)), ((5, 3), (2, 4))])
def test_the_convolution_is_the_published_formula_frequency_by_frequency(size, kernel_size):
    layer = SandwichConv2D(3, kernel_size, dtype="float64")
    layer.build((None, *size, 2))
    randomise(layer, 0, 0.7)
    kernel, psi, bias = raw_values(layer)
    # K̂(θ) = Σ_t K[t] exp(iθ(t - ⌊k/2⌋)), that is a kernel laid out backwards around pixel 0.
    image = np.zeros((*size, *kernel.shape[-2:]))
    for t in np.ndindex(*kernel_size):
        where = tuple((k // 2 - s) % n for s, k, n in zip(t, kernel_size, size, strict=True))
        image[where] += kernel[t]
    q = cayley(np.fft.fft2(image, axes=(0, 1)))
    x = np.random.default_rng(1).standard_normal((5, *size, 2))
    spectrum = np.fft.fft2(x, axes=(1, 2))
    hidden = np.fft.ifft2(np.einsum("nhwa,hwab->nhwb", spectrum, q[:, :, 3:]), axes=(1, 2))
    assert np.abs(hidden.imag).max() < 1e-12
    hidden = np.fft.fft2(psi * np.maximum(math.sqrt(2) / psi * hidden.real + bias, 0), axes=(1, 2))
    adjoint = np.conj(np.swapaxes(q[:, :, :3], -1, -2))
    outputs = np.fft.ifft2(np.einsum("nhwa,hwab->nhwb", hidden, adjoint), axes=(1, 2))
    expected = math.sqrt(2) * outputs.real
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, atol=1e-11)


def test_the_convolution_commutes_with_circular_shifts():
    layer = SandwichConv2D(3, 3)
    x = np.random.default_rng(0).standard_normal((2, 6, 4, 2)).astype("float32")
    shifted = ops.convert_to_numpy(layer(np.roll(x, (2, 1), axis=(1, 2))))
    expected = np.roll(ops.convert_to_numpy(layer(x)), (2, 1), axis=(1, 2))
    np.testing.assert_allclose(shifted, expected, atol=1e-5)


def test_the_gain_is_reached():
    """One unit with A = B = 1/√2: the identity up to sign, whose product of norms is 1."""
    layer = SandwichDense(1, activation="linear", dtype="float64")
    layer.build((None, 1))
    layer.kernel.assign([[0.0], [1.0]])
    layer.length.assign((math.sqrt(2) - 1) / math.sqrt(2 * 2 / 3))
    assert 1 - 1e-12 < sampled_gain(layer) <= 1.0


def test_the_two_maps_are_bounded_together_and_not_one_by_one():
    layer = SandwichDense(8, dtype="float64")
    layer.build((None, 8))
    inner, outer = matrices(layer)
    assert np.linalg.norm(inner, 2) * np.linalg.norm(outer, 2) > 1.3
    assert layer.gain_upper_bound() <= FLOAT64


def test_a_stride_rearranges_pixels_before_the_layer():
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 1)).astype("float32")
    strided, plain = SandwichConv2D(2, 1, strides=2), SandwichConv2D(2, 1)
    y = strided(x)
    patches = x.reshape(2, 2, 2, 3, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(2, 2, 3, 4)
    plain.build((None, 2, 3, 4))
    for a, b in zip(plain.trainable_variables, strided.trainable_variables, strict=True):
        a.assign(b)
    np.testing.assert_allclose(
        ops.convert_to_numpy(y), ops.convert_to_numpy(plain(patches)), atol=1e-6
    )


def test_wrong_arguments_and_shapes_are_refused():
    for call in (
        lambda: SandwichDense(0),
        lambda: SandwichDense(3, activation="silu"),
        lambda: SandwichConv2D(3, (3, 3, 3)),
        lambda: SandwichConv2D(3, strides=0),
        lambda: SandwichConv2D(3).build((None, None, 4, 3)),
        lambda: SandwichDense(3).build((None, None)),
    ):
        with pytest.raises(ValueError, match="Received"):
            call()
