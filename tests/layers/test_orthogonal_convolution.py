"""Orthogonal convolutions with an explicit kernel, beside their materialised maps."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import tf_lyapunov as tfl
from tf_lyapunov.layers import MaxMin, OrthogonalConv2D, OrthogonalConv2DTranspose
from tf_lyapunov.optimizers import Stiefel, is_marked
from tf_lyapunov.theory.operators import convolution_matrix
from tf_lyapunov.theory.orthogonal import convolution_residual_upper_bound, polyphase

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Twenty-five steps in float32 leave ‖G - I‖ about 1e-6 a factor.
CLOSE = 2e-5


def conv(filters, size, strides=1, padding="circular", groups=1, dilation=1, **kwargs):
    arguments = (filters, size, strides, padding, None, dilation, groups)
    return functools.partial(OrthogonalConv2D, *arguments, **kwargs)


def back(filters, size, strides=1, padding="valid", **kwargs):
    return functools.partial(OrthogonalConv2DTranspose, filters, size, strides, padding, **kwargs)


# What is kept: norms of inputs, norms of gradients (orthonormal outputs), or only the bound.
GRID = [
    (conv(4, 3), (5, 4, 2), "norms"),
    (conv(3, 3), (5, 4, 3), "norms"),
    (conv(2, 3), (5, 4, 4), "gradients"),
    (conv(3, 2), (4, 5, 3), "norms"),
    (conv(3, (4, 1)), (5, 3, 3), "norms"),
    (conv(4, 5), (3, 4, 2), "norms"),  # taps reach around the image
    (conv(8, 3, 2), (5, 6, 2), "norms"),  # zeros fill the odd side up
    (conv(9, 4, 2), (4, 6, 2), "norms"),
    (conv(3, 3, 2), (6, 4, 2), "gradients"),
    (conv(2, 2, 2), (4, 4, 3), "gradients"),
    (conv(18, 4, 3), (6, 6, 2), "norms"),
    (conv(4, 5, 3), (6, 6, 1), "gradients"),
    (conv(5, 3, (1, 2)), (4, 4, 2), "norms"),
    (conv(8, 3, groups=2), (4, 5, 4), "norms"),
    (conv(4, 3, 2, groups=2), (4, 4, 4), "gradients"),
    (conv(4, 3, dilation=2), (5, 6, 4), "norms"),
    (conv(6, (2, 3), groups=3, dilation=(2, 1)), (5, 4, 3), "norms"),
    (conv(3, 1, 2), (4, 4, 3), "gradients"),  # three pixels of four are not seen
    (conv(3, 3, padding="valid"), (5, 4, 4), "gradients"),
    (conv(4, 3, 2, "valid"), (5, 6, 2), "gradients"),
    (conv(4, 2, padding="valid", groups=2, dilation=2), (5, 5, 4), "gradients"),
    (conv(8, 2, 2, "same"), (4, 6, 2), "norms"),
    (conv(4, 3, padding="same"), (5, 4, 4), None),
    (conv(12, 3, 2, "same"), (5, 4, 3), None),
    (conv(6, 4, 3, "same", groups=2), (5, 5, 2), None),
    (conv(4, 3, padding="same", dilation=2), (4, 4, 2), None),
    (conv(5, 3, padding="valid"), (4, 5, 2), None),
    (back(4, 3), (3, 4, 2), "norms"),
    (back(2, 3, 2), (3, 2, 6), "norms"),
    (back(2, 4, 3), (2, 2, 5), "norms"),
    (back(3, 2, 2, "same"), (3, 2, 4), "norms"),
    (back(1, 2, 2, "same"), (3, 2, 4), "gradients"),
    (back(2, 3, 2, "same"), (3, 2, 4), None),
    (back(2, 3), (3, 4, 4), None),
]


def stepped(layer, steps):
    """Steps of `Stiefel` along random gradients."""
    optimizer = Stiefel(keras.optimizers.Adam(0.05))
    rng = np.random.default_rng(0)
    for _ in range(steps):
        grads = [rng.standard_normal(v.shape).astype("float32") for v in layer.trainable_variables]
        optimizer.apply([ops.convert_to_tensor(g) for g in grads], layer.trainable_variables)


def built(make, shape, **kwargs):
    layer = make(**kwargs)
    layer.build((None, *shape))
    return layer


def called(layer, shape):
    """The matrix that the layer computes without its bias, column by column."""
    size = int(np.prod(shape))
    basis = np.concatenate([np.zeros((1, size)), np.eye(size)]).reshape(-1, *shape)
    values = ops.cast(layer(ops.cast(basis, layer.compute_dtype)), "float32")
    values = np.asarray(ops.convert_to_numpy(values), np.float64).reshape(size + 1, -1)
    return (values[1:] - values[0]).T


def materialised(layer, shape):
    """The same put together from the kernel in float64."""
    kernel = layer.effective_values()["kernel"]
    if layer.padding != "circular":
        return convolution_matrix(kernel, layer._map((None, *shape))).toarray()
    wrap = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    wrap = np.pad(wrap, [(0, 0), (0, 1), (0, 1), (0, 0)])
    for axis, index in enumerate(layer.wrapped_positions((None, *shape))):
        wrap = np.take(wrap, index, axis=axis + 1)
    return (
        convolution_matrix(kernel, layer._map(wrap.shape)).toarray() @ wrap.reshape(len(wrap), -1).T
    )


@pytest.mark.parametrize(("make", "shape", "keeps"), GRID)
def test_after_training_the_map_is_orthogonal_and_below_its_measured_bound(make, shape, keeps):
    check_trained(make, shape, keeps, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "shape", "keeps"), GRID)
def test_so_it_is_after_twenty_five_steps(make, shape, keeps):
    check_trained(make, shape, keeps, 25)


def check_trained(make, shape, keeps, steps):
    layer = built(make, shape)
    factors = [v for v in layer.trainable_variables if is_marked(v)]
    start = [np.array(ops.convert_to_numpy(v)) for v in factors]
    stepped(layer, steps)
    for before, v in zip(start, factors, strict=True):
        # One number of size 1 cannot turn.
        one = before.shape[-2:] == (1, 1)
        assert one or np.abs(ops.convert_to_numpy(v) - before).max() > 2e-3 * steps
    matrix = materialised(layer, shape)
    assert np.allclose(called(layer, shape), matrix, atol=1e-5)
    values = np.linalg.svd(matrix, compute_uv=False)
    assert values[0] <= layer.gain_upper_bound() <= 1 + CLOSE
    assert np.max(np.abs(values**2 - 1)) <= layer.departure_upper_bound() or keeps is None
    outputs, inputs = matrix.shape
    if keeps == "norms":
        assert outputs >= inputs and values[-1] >= 1 - CLOSE
    elif keeps == "gradients":
        assert outputs <= inputs and values[-1] >= 1 - CLOSE


@pytest.mark.parametrize(("make", "shape", "keeps"), GRID)
def test_what_is_kept_may_be_asked_for_and_nothing_else(make, shape, keeps):
    outputs = make().compute_output_shape((None, *shape))[1:]
    for asked in ("norms", "gradients"):
        layer = make(preserves=asked)
        if keeps == asked or (keeps and np.prod(outputs) == np.prod(shape)):
            layer.build((None, *shape))
            again = type(layer).from_config(layer.get_config())
            assert again.get_config() == layer.get_config()
        else:
            with pytest.raises(ValueError, match=f"preserves={asked!r} in layer"):
                layer.build((None, *shape))


def test_the_departure_of_a_kernel_that_is_none_is_bounded_for_every_size():
    rng = np.random.default_rng(3)
    for strides, size, width in (((1, 1), (3, 2), 2), ((2, 2), (3, 4), 5), ((2, 3), (1, 4), 9)):
        kernel = rng.standard_normal((*size, 2, width))
        departure = convolution_residual_upper_bound(kernel, strides)
        layer = OrthogonalConv2D(width, size, strides, "circular")
        taps = polyphase(kernel, strides)
        side = min(taps.shape[-2:])
        reached = 0.0
        for angle in rng.uniform(0, 2 * np.pi, (50, 2)):
            wave = np.exp(1j * np.add.outer(*(np.arange(n) * a for n, a in
                                              zip(taps.shape, angle, strict=False))))  # fmt: skip
            values = np.linalg.svd(np.tensordot(wave, taps, axes=2), compute_uv=False)
            assert len(values) == side
            reached = max(reached, np.max(np.abs(values**2 - 1)))
        assert 0.1 * departure < reached <= departure
        assert layer.base == tuple(min(k, s) for k, s in zip(size, strides, strict=True))


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_gains_of_other_formats_are_those_of_the_cast_kernels(dtype):
    for make, shape in ((conv(4, 3, 2), (4, 4, 1)), (back(2, 3), (3, 3, 2))):
        layer = built(make, shape, dtype=dtype)
        norm = np.linalg.norm(materialised(layer, shape), 2)
        assert norm <= layer.gain_upper_bound()
        if dtype == "float64":
            assert layer.departure_upper_bound() < CLOSE
        else:
            assert 1e-5 < layer.departure_upper_bound() < 0.5


def network(padding="circular", **options):
    keras.utils.set_random_seed(0)
    layers = [
        OrthogonalConv2D(8, 3, 2, padding, activation=MaxMin()),
        OrthogonalConv2D(8, 2, padding=padding, groups=2, activation="relu"),
        OrthogonalConv2DTranspose(2, 2, 2, use_bias=False),
    ]
    dense = [keras.layers.Flatten(), tfl.layers.OrthogonalDense(3)]
    model = keras.Sequential([keras.Input((6, 4, 2)), *layers, *dense])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(Stiefel(keras.optimizers.Adam(0.02)), loss, **options)
    return model


X = np.random.default_rng(0).standard_normal((32, 6, 4, 2)).astype("float32")
Y = (X[:, 0, 0, 0] > 0).astype("int32")


@functools.cache
def trained(padding):
    model = network(padding)
    model.fit(X, Y, batch_size=4, epochs=4, verbose=0)
    return model


@pytest.mark.parametrize("padding", ["circular", "same"])
def test_certificates_and_exports_of_a_trained_network(padding):
    model = trained(padding)
    assert all(is_marked(v) for layer in model.layers[:3] for v in (layer.mixing, layer.projectors)
               if v is not None)  # fmt: skip
    assert max(layer.departure_upper_bound() for layer in model.layers[:3]) < CLOSE
    gain = float(tfl.lipschitz_upper_bound(model, method="composition").gain_upper_bound)
    assert gain <= 1 + 4 * CLOSE and gain >= (0.99999 if padding == "circular" else 0.8)
    proof = tfl.certify(model, X, Y)
    assert proof.certified_accuracy(0.0) > 0.4
    plain = tfl.export_plain(model)
    assert all(type(v).__module__.startswith("keras.") for v in plain.layers)
    kinds = [type(v) for v in plain.layers if v.weights]
    if padding == "same":
        assert {keras.layers.Conv2D, keras.layers.Conv2DTranspose} < set(kinds)
    assert np.allclose(plain.predict(X, verbose=0), model.predict(X, verbose=0), atol=1e-5)


def test_a_saved_model_computes_the_same_and_trains_on(tmp_path):
    model = trained("circular")
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert np.array_equal(again.predict(X, verbose=0), model.predict(X, verbose=0))
    assert all(is_marked(layer.mixing) for layer in again.layers[:3])
    again.fit(X, Y, batch_size=8, verbose=0)
    assert max(layer.departure_upper_bound() for layer in again.layers[:3]) < CLOSE


def test_another_optimizer_leaves_the_manifold_and_the_gain_says_so():
    layer = built(conv(4, 3), (4, 4, 4))
    layer.mixing.assign(1.5 * layer.mixing)
    norm = np.linalg.norm(materialised(layer, (4, 4, 4)), 2)
    # The measure is a Frobenius norm: 1 + 2·(1.5² - 1) = 3.5 is the square of its bound.
    assert 1.49 < norm <= layer.gain_upper_bound() < 3.5**0.5 + 1e-3


def test_channels_first_is_the_same_map():
    x, last = X[:3], built(conv(4, 3, 2, groups=2), X.shape[1:])
    first = OrthogonalConv2D(4, 3, 2, "circular", "channels_first", 1, 2)
    first.build((None, 2, 6, 4))
    first.set_weights(last.get_weights())
    moved = np.moveaxis(ops.convert_to_numpy(first(np.moveaxis(x, -1, 1))), 1, -1)
    assert np.allclose(moved, ops.convert_to_numpy(last(x)), atol=1e-6)


def test_bad_arguments_are_refused_by_name():
    for kind in (conv, back):
        with pytest.raises(ValueError, match="not both"):
            kind(3, 2)(kernel_constraint="non_neg")
        with pytest.raises(ValueError, match=r"must be one of .*padding='reflect'"):
            kind(3, 2, padding="reflect")()
        with pytest.raises(ValueError, match="must not be steeper than 1"):
            kind(3, 2)(activation="selu")
        with pytest.raises(ValueError, match="preserves='volume'"):
            kind(3, 2)(preserves="volume")
        with pytest.raises(ValueError, match="quantize"):
            kind(3, 2)().quantize("int8")
    with pytest.raises(ValueError, match="cannot both exceed 1"):
        conv(3, 2, 2, dilation=2)()
    with pytest.raises(ValueError, match="`filters` must be divisible"):
        conv(3, 2, groups=2)()
    with pytest.raises(ValueError, match="must be divisible by `groups`"):
        built(conv(4, 2, groups=2), (4, 4, 3))
    with pytest.raises(ValueError, match="images of a known size"):
        built(conv(4, 2), (None, 4, 3))
    with pytest.raises(ValueError, match="`groups` of a OrthogonalConv2DTranspose"):
        back(4, 2)(groups=2)


SCRIPT = """
import numpy as np, sys
sys.path.insert(0, "tests")
from layers.test_orthogonal_convolution import CLOSE, GRID, X, Y, built, called, materialised
from layers.test_orthogonal_convolution import network
for make, shape, keeps in GRID[::4]:
    layer = built(make, shape)
    assert np.allclose(called(layer, shape), materialised(layer, shape), atol=1e-5), shape
model = network(jit_compile=True) if sys.argv[1] != "torch" else network()
model.fit(X, Y, batch_size=8, epochs=2, verbose=0)
assert max(layer.departure_upper_bound() for layer in model.layers[:3]) < CLOSE
print("orthogonal on", sys.argv[1])
"""


@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=pytest.mark.slow) for b in ("torch", "jax", "tensorflow")]
)
def test_the_same_holds_on_every_backend_and_compiled(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"orthogonal on {backend}" in done.stdout
