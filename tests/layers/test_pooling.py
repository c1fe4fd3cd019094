"""Pooling layers against windows cut out by hand; gradients and range at the extremes."""

import itertools
import math

import keras
import numpy as np
import pytest
from derivatives import gradient
from layer_maps import layer_matrix

from tf_lyapunov.layers.pooling import (
    GlobalL2NormPooling2D,
    L2NormPooling2D,
    LpPooling2D,
    ScaledAveragePooling2D,
    ScaledGlobalAveragePooling2D,
    window_sum_bound,
)

UNIT = 2.0**-24
GEOMETRIES = [
    (2, None, "valid"),
    (3, 2, "valid"),
    (3, 1, "same"),
    ((2, 3), (1, 2), "same"),
    ((3, 1), (2, 3), "valid"),
]


def run(layer, x, **options):
    return keras.ops.convert_to_numpy(layer(np.asarray(x, "float32"), **options))


def windows(x, layer):
    """Oracle: list of the windows' entries, (batch, out, out, channels, cells), zero padded."""
    x = x.astype(np.float64)
    starts = []
    for axis, q, s in zip((1, 2), layer.pool_size, layer.strides, strict=True):
        n = x.shape[axis]
        if layer.padding == "same":
            m = math.ceil(n / s)
            total = max((m - 1) * s + q - n, 0)
            width = [(0, 0)] * 4
            width[axis] = (total // 2, total - total // 2)
            x = np.pad(x, width)
            starts.append([i * s for i in range(m)])
        else:
            starts.append(list(range(0, n - q + 1, s)))
    (qh, qw) = layer.pool_size
    rows = [
        [x[:, i : i + qh, j : j + qw].reshape(len(x), qh * qw, -1) for j in starts[1]]
        for i in starts[0]
    ]
    return np.moveaxis(np.array(rows), (0, 1), (1, 2)).swapaxes(-1, -2)


def image(seed=0, shape=(2, 7, 6, 3)):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 8.0, math.inf])
def test_lp_pooling_is_the_norm_of_each_window(geometry, p):
    layer = LpPooling2D(*geometry, p=p)
    x = image()
    cells = windows(x, layer)
    expected = np.linalg.norm(cells, ord=p, axis=-1)
    found = run(layer, x)
    # γ of the rule in certificates: 18 units per cell and 32 more.
    assert np.all(np.abs(found - expected) <= (18 * cells.shape[-1] + 32) * UNIT * expected)
    assert layer.compute_output_shape(x.shape) == found.shape


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_scaled_average_and_norm_pooling_are_their_equations(geometry):
    average, norm = ScaledAveragePooling2D(*geometry), L2NormPooling2D(*geometry)
    cells = windows(image(), average)
    scale = window_sum_bound(average.pool_size, average.strides)
    shared = math.prod(-(-q // s) for q, s in zip(norm.pool_size, norm.strides, strict=True))
    tol = 32 * UNIT * np.abs(cells).sum(axis=-1)
    assert np.all(np.abs(run(average, image()) - cells.sum(axis=-1) / scale) <= tol)
    expected = np.linalg.norm(cells, axis=-1) / math.sqrt(shared)
    assert np.all(np.abs(run(norm, image()) - expected) <= tol)


@pytest.mark.parametrize("pool_size", [2, (3, 1)])
def test_without_overlap_the_scaled_average_has_norm_one(pool_size):
    layer = ScaledAveragePooling2D(pool_size)
    layer.build((None, 6, 6, 1))
    assert abs(np.linalg.norm(layer_matrix(layer, (6, 6, 1)), 2) - 1) <= 16 * UNIT


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("q", "s"), [(3, 2), (2, 1), (4, 3), (5, 2)])
def test_with_overlap_its_norm_grows_to_one_with_the_image(q, s, padding):
    norms = []
    for n in (q, q + 1, q + 2, 12, 40):
        layer = ScaledAveragePooling2D((q, 1), (s, 1), padding)
        norms.append(np.linalg.norm(layer_matrix(layer, (n, 1, 1)), 2))
    assert max(norms) <= 1 + 16 * UNIT
    assert norms[-1] > 0.97


def test_the_window_sum_bound_is_the_largest_response_over_frequencies():
    # ‖downsampled box filter‖² = max over θ of Σ over aliases of |B(θ_k)|²/s.
    for q, s in itertools.product(range(1, 7), range(1, 7)):
        grid = np.linspace(0, 2 * np.pi / s, 400)
        aliases = grid[:, None] + 2 * np.pi * np.arange(s)[None] / s
        response = np.abs(np.exp(1j * aliases[..., None] * np.arange(q)).sum(axis=-1)) ** 2
        assert window_sum_bound((q,), (s,)) ** 2 == pytest.approx(
            response.sum(axis=1).max() / s, rel=1e-9
        )


@pytest.mark.parametrize("keepdims", [False, True])
def test_global_pooling_is_its_equation_at_every_size(keepdims):
    average = ScaledGlobalAveragePooling2D(keepdims=keepdims)
    norm = GlobalL2NormPooling2D(keepdims=keepdims)
    for shape in ((2, 7, 6, 3), (2, 3, 4, 3)):
        x = image(shape=shape)
        wide = x.astype(np.float64)
        size = 64 * UNIT * np.linalg.norm(wide, axis=(1, 2), keepdims=keepdims)
        total = wide.sum(axis=(1, 2), keepdims=keepdims) / math.sqrt(shape[1] * shape[2])
        assert np.all(np.abs(run(average, x) - total) <= size)
        expected = np.sqrt((wide**2).sum(axis=(1, 2), keepdims=keepdims))
        assert np.all(np.abs(run(norm, x) - expected) <= size)
        assert norm.compute_output_shape(shape) == expected.shape


MAKERS = [
    lambda **kw: LpPooling2D(2, p=3.0, **kw),
    lambda **kw: LpPooling2D(3, 2, "same", p=1.5, **kw),
    lambda **kw: L2NormPooling2D(3, 2, **kw),
    lambda **kw: ScaledAveragePooling2D(2, **kw),
    lambda **kw: ScaledGlobalAveragePooling2D(**kw),
    lambda **kw: GlobalL2NormPooling2D(**kw),
]


@pytest.mark.parametrize("make", MAKERS)
def test_channels_first_is_the_same_map(make):
    x = image()
    last = run(make(data_format="channels_last"), x)
    first = run(make(data_format="channels_first"), np.moveaxis(x, -1, 1))
    assert np.allclose(np.moveaxis(first, 1, -1), last, rtol=64 * UNIT, atol=64 * UNIT)


@pytest.mark.parametrize("make", MAKERS)
def test_the_gradient_is_finite_at_zero_and_right_elsewhere(make):
    layer = make()
    layer.build((None, 4, 4, 1))
    ops = keras.ops
    assert np.all(np.isfinite(gradient(lambda x: ops.sum(layer(x)), np.zeros((1, 4, 4, 1), "f"))))
    x = image(shape=(1, 4, 4, 1)) + 3.0  # away from kinks
    direction = image(1, (1, 4, 4, 1))
    slope = float(np.sum(gradient(lambda x: ops.sum(layer(x)), x) * direction))
    step = 1e-2
    ahead, behind = (float(run(layer, x + t * step * direction).sum()) for t in (1, -1))
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("p", [1.5, 2.0, 8.0])
def test_norms_neither_overflow_nor_vanish(size, p):
    x = image(shape=(1, 4, 4, 1))
    layer = LpPooling2D(2, p=p)
    assert np.allclose(run(layer, size * x) / size, run(layer, x), rtol=1e-5)
    whole = GlobalL2NormPooling2D()
    assert np.allclose(run(whole, size * x) / size, run(whole, x), rtol=1e-5)


def test_not_a_number_is_not_hidden():
    x = np.full((1, 2, 2, 1), np.nan)
    for layer in (LpPooling2D(2), LpPooling2D(2, p=math.inf), GlobalL2NormPooling2D()):
        assert np.all(np.isnan(run(layer, x)))


def test_half_precision_computes_in_single():
    x = (300 * image(shape=(1, 4, 4, 1))).astype("float16")  # squares overflow float16
    found = keras.ops.convert_to_numpy(L2NormPooling2D(2, dtype="float16")(x)).astype(float)
    expected = run(L2NormPooling2D(2), x.astype("float32"))
    assert np.allclose(found, expected, rtol=2**-10)


@pytest.mark.parametrize("make", MAKERS)
def test_a_pooling_layer_survives_serialisation(make):
    layer = make(name="pool")
    copy = type(layer).from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert np.array_equal(run(copy, image()), run(layer, image()))


def test_an_infinite_exponent_survives_saving(tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 1)), LpPooling2D(2, p=math.inf)])
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").layers[0].p == math.inf


def test_bad_arguments_are_refused():
    for p in (0.5, math.nan, "2", True):
        with pytest.raises(ValueError, match="`p`"):
            LpPooling2D(2, p=p)
    with pytest.raises(ValueError, match="padding"):
        L2NormPooling2D(2, padding="causal")
    with pytest.raises(ValueError, match="pool_size"):
        L2NormPooling2D((2, 2, 2))
    with pytest.raises(ValueError, match="data_format"):
        GlobalL2NormPooling2D(data_format="last")
    with pytest.raises(ValueError, match="window must fit"):
        ScaledAveragePooling2D(3).build((None, 2, 5, 1))
    with pytest.raises(ValueError, match="must be known"):
        ScaledAveragePooling2D(3, 1, "same").build((None, None, 5, 1))


def test_unknown_sizes_are_fine_without_padding():
    model = keras.Sequential([keras.Input((None, None, 3)), LpPooling2D(3, 2, p=3.0)])
    layer = LpPooling2D(3, 2, p=3.0)
    for shape in ((2, 7, 6, 3), (1, 5, 9, 3)):
        assert np.allclose(
            model.predict(image(shape=shape), verbose=0), run(layer, image(shape=shape))
        )
