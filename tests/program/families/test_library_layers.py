"""Gains of this library's layers: never exceeded by a search, and attained or nearly so."""

import math

import keras
import numpy as np
import pytest
from derivatives import amplification

from tf_lyapunov.bounds.composition import rounding_errors
from tf_lyapunov.certification import certify, lipschitz_upper_bound, read_network, register_gain
from tf_lyapunov.layers.activations import (
    FullSort,
    GroupSort,
    Householder,
    LipschitzPReLU,
    MaxMin,
    TwoSidedReLU,
)
from tf_lyapunov.layers.centering import BatchCentering
from tf_lyapunov.layers.pooling import (
    GlobalL2NormPooling2D,
    L2NormPooling2D,
    LpPooling2D,
    ScaledAveragePooling2D,
    ScaledGlobalAveragePooling2D,
    window_sum_bound,
)
from tf_lyapunov.layers.position import PositionBias
from tf_lyapunov.layers.residual import ConvexCombination
from tf_lyapunov.layers.resizing import (
    ChannelPadding,
    InvertibleDownSampling,
    InvertibleUpSampling,
    Truncate,
)
from tf_lyapunov.layers.response import LocalResponseNormalization
from tf_lyapunov.program.families.norms import lp_pooling_gain
from tf_lyapunov.program.families.pooling import window_sum_gain
from tf_lyapunov.program.families.response import response_gain
from tf_lyapunov.program.vocabulary import RULES

# Rounding of a float32 difference of outputs of size 10, over a distance of 0.5.
FLOAT32 = 1 + 64 * 2.0**-24 * 20


def bound(layer, shape):
    model = keras.Sequential([keras.Input(shape), layer])
    return lipschitz_upper_bound(model).gain_upper_bound


# Layer, shape, expected gain, how near to it an example comes, and the example: base and change.
def spike(shape, size=1.0):
    change = np.zeros(shape, "float32")
    change[tuple(n // 2 for n in shape[:-1])] = size
    return change


ONES4 = np.ones((4, 4, 1), "float32")
CASES = [
    (MaxMin(), (6,), 1.0, 1.0, np.arange(6.0), np.eye(6)[0]),
    (GroupSort(3), (6,), 1.0, 1.0, np.arange(6.0), np.eye(6)[0]),
    (FullSort(), (6,), 1.0, 1.0, np.arange(6.0), np.eye(6)[0]),
    (Householder(), (6,), 1.0, 1.0, np.arange(6.0), np.eye(6)[0]),
    (TwoSidedReLU(), (6,), 1.0, 1.0, np.arange(6.0) - 3, np.eye(6)[0]),
    (LipschitzPReLU(-0.5), (6,), 1.0, 1.0, np.ones(6), np.eye(6)[0]),
    (InvertibleDownSampling(2), (4, 4, 2), 1.0, 1.0, np.ones((4, 4, 2)), spike((4, 4, 2))),
    (InvertibleUpSampling(2), (2, 2, 8), 1.0, 1.0, np.ones((2, 2, 8)), spike((2, 2, 8))),
    (ChannelPadding(9), (6,), 1.0, 1.0, np.ones(6), np.eye(6)[0]),
    (Truncate(2), (6,), 1.0, 1.0, np.ones(6), np.eye(6)[0]),
    (BatchCentering(), (6,), 1.0, 1.0, np.ones(6), np.ones(6)),
    (PositionBias(), (6,), 1.0, 1.0, np.ones(6), np.ones(6)),
    (ScaledAveragePooling2D(2), (4, 4, 1), 1.0, 1.0, ONES4, ONES4),
    (ScaledGlobalAveragePooling2D(), (4, 4, 1), 1.0, 1.0, ONES4, ONES4),
    (GlobalL2NormPooling2D(), (4, 4, 1), 1.0, 1.0, ONES4, ONES4),
    (L2NormPooling2D(2), (4, 4, 1), 1.0, 1.0, ONES4, ONES4),
    (L2NormPooling2D(3, 2), (5, 5, 1), 1.0, 1.0, 0 * spike((5, 5, 1)), spike((5, 5, 1))),
    (LpPooling2D(3, 2, p=4.0), (5, 5, 1), 2.0, 1.0, 0 * spike((5, 5, 1)), spike((5, 5, 1))),
    (LpPooling2D(3, 1, "same", p=math.inf), (5, 5, 1), 3.0, 1.0, 0 * spike((5, 5, 1)),
     spike((5, 5, 1))),
    (LpPooling2D(2, p=1.0), (4, 4, 1), 2.0, 1.0, ONES4, ONES4),
    (LpPooling2D(2, p=1.5), (4, 4, 1), 4 ** (2 / 3 - 1 / 2), 1.0, ONES4, ONES4),
    (LocalResponseNormalization(0, 2.0, 1.0, 0.75), (6,), 2**-0.75, 0.999, np.zeros(6),
     0.01 * np.eye(6)[0]),
    (LocalResponseNormalization(5, 1.0, 1.0, 0.5), (6,), 1.0, 0.999, np.zeros(6),
     0.01 * np.eye(6)[0]),
    (LocalResponseNormalization(2, 1.0, 1.0, 0.75), (12,), 1.2234, 0.81, np.zeros(12),
     0.01 * np.eye(12)[6]),
    (LocalResponseNormalization(2, 0.5, 3.0, 0.5), (12,), 1.1828 * 2**0.5, 0.84, np.zeros(12),
     0.01 * np.eye(12)[6]),
]  # fmt: skip


def label(value):
    return type(value).__name__ if isinstance(value, keras.Layer) else ""


@pytest.mark.parametrize(
    ("layer", "shape", "gain", "tightness", "base", "change"), CASES, ids=label
)
def test_an_example_comes_near_the_gain(layer, shape, gain, tightness, base, change):
    claimed = bound(layer, shape)
    assert claimed == pytest.approx(gain, rel=1e-4)
    ends = np.stack([base, base + change]).astype("float32")
    moved = keras.ops.convert_to_numpy(layer(ends)).astype(np.float64).reshape(2, -1)
    ratio = np.linalg.norm(moved[1] - moved[0]) / np.linalg.norm((ends[1] - ends[0]).astype(float))
    assert tightness * claimed / FLOAT32 <= ratio <= claimed * FLOAT32


@pytest.mark.parametrize(
    ("layer", "shape", "gain", "tightness", "base", "change"), CASES, ids=label
)
def test_no_search_exceeds_the_gain(layer, shape, gain, tightness, base, change):
    for distance in (0.5, 5.0):
        found = amplification(layer, shape, distance=distance, starts=8, steps=8)
        assert found <= bound(layer, shape) * FLOAT32


@pytest.mark.parametrize("p", [1.0, 1.25, 1.5, 1.75, 3.0])
@pytest.mark.parametrize(("q", "s", "padding"), [(3, 2, "valid"), (3, 1, "same"), (2, 1, "valid")])
def test_no_jacobian_of_overlapping_lp_pooling_exceeds_its_gain(p, q, s, padding):
    gain = lp_pooling_gain(p, (q, 1), (s, 1), padding, (7, 1))
    rng, largest = np.random.default_rng(0), 0.0
    pad = max((-(-7 // s) - 1) * s + q - 7, 0) if padding == "same" else 0
    starts = np.arange(0, 7 + pad - q + 1, s) - pad // 2
    for _ in range(400):
        x = rng.uniform(0.0, 1.0, 7) ** rng.choice([0.0, 1.0, 4.0])
        rows = np.zeros((len(starts), 7))
        for row, start in zip(rows, starts, strict=True):
            cells = [i for i in range(start, start + q) if 0 <= i < 7]
            row[cells] = (x[cells] / np.linalg.norm(x[cells], p)) ** (p - 1)
        largest = max(largest, np.linalg.norm(rows, 2))
    assert largest <= gain * (1 + 1e-9)
    assert largest >= 0.85 * gain


def response_jacobian(x, radius, bias, alpha, beta):
    channels = np.arange(len(x))
    near = np.abs(channels[:, None] - channels) <= radius
    d = bias + alpha * (near @ x**2)
    return np.diag(d**-beta) - 2 * alpha * beta * near * np.outer(x * d ** (-beta - 1), x)


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 11])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.75, 1.0, 3.0, 8.0])
def test_no_jacobian_of_response_normalization_exceeds_its_gain(radius, beta):
    rng = np.random.default_rng(0)
    gain = response_gain(radius, 2.0, beta, 12)
    peak = (beta / (1 + beta)) ** (beta + 1) / beta
    assert 2.0**-beta <= gain
    assert gain <= 2.0**-beta * min(1.4, 1 + 2 * beta * peak * math.sqrt(2 * radius + 1)) * 1.0001
    for _ in range(300):
        x = rng.normal(size=12) * rng.choice([0.1, 0.5, 1, 3, 30]) * (rng.random(12) < 0.7)
        assert np.linalg.norm(response_jacobian(x, radius, 2.0, 0.7, beta), 2) <= gain * (1 + 1e-9)


def test_the_sums_of_the_schur_test_are_within_its_bounds():
    # Negative control: the plain diagonal bound k^-β alone is not what the row sums obey.
    rng, beta, worst = np.random.default_rng(0), 0.75, 0.0
    rows = ((2 * beta + 1) / (2 * beta + 2)) ** beta * (2 * beta + 1) / (beta + 1)
    for _ in range(400):
        x = np.abs(rng.normal(size=12)) * rng.choice([0.3, 1.0, 3.0]) + 1e-9
        jacobian = np.abs(response_jacobian(x, 2, 1.0, 1.0, beta))
        row, column = (jacobian @ x) / x, (jacobian.T @ x) / x
        worst = max(worst, row.max())
        assert row.max() <= rows * (1 + 1e-9)
        assert math.sqrt(rows * column.max()) <= response_gain(2, 1.0, beta, 12) * (1 + 1e-9)
    assert worst > 1.0


def test_the_window_sum_is_bounded_at_known_and_unknown_sizes():
    for q, s, padding in [(3, 2, "valid"), (3, 1, "same"), (2, 2, "same"), (4, 3, "valid")]:
        unknown = window_sum_gain((q,), (s,), padding, (None,))
        assert unknown >= window_sum_bound((q,), (s,))
        known = [window_sum_gain((q,), (s,), padding, (n,)) for n in range(q, 30)]
        assert max(known) <= unknown * (1 + 1e-12)
        assert max(known) >= 0.95 * unknown


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_a_combination_weighs_the_bounds_of_its_branches(t):
    x = keras.Input((3,))
    rescaled = keras.layers.Rescaling(-5.0)(x)
    mix = ConvexCombination()
    model = keras.Model(x, mix([x, rescaled]))
    mix.mixture.assign([t])
    expected = 5 * t + (1 - t)
    assert lipschitz_upper_bound(model).gain_upper_bound == pytest.approx(expected, rel=1e-12)
    both = keras.Model(x, ConvexCombination()([x, x]))
    assert lipschitz_upper_bound(both).gain_upper_bound == pytest.approx(1.0, rel=1e-12)
    # The same branches with equal signs attain it.
    aligned = keras.Model(x, mix([x, keras.layers.Rescaling(5.0)(x)]))
    found = amplification(aligned, (3,), starts=4, steps=2)
    assert found == pytest.approx(expected, rel=1e-5)


def test_weights_outside_their_interval_are_read_as_they_are_used():
    layer = LipschitzPReLU()
    model = keras.Sequential([keras.Input((3,)), layer])
    layer.slope.assign([-40.0, 0.5, 9.0])
    (_, node) = read_network(model).nodes
    assert (node.sector.alpha, node.sector.beta) == (-1.0, 1.0)
    assert lipschitz_upper_bound(model).gain_upper_bound == 1.0


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (LipschitzPReLU(), "slope"),
        (BatchCentering(), "bias"),
        (Householder(), "angle"),
        (PositionBias(), "bias"),
    ],
    ids=label,
)
def test_weights_that_are_not_finite_are_refused(layer, name):
    model = keras.Sequential([keras.Input((4,)), layer])
    variable = getattr(layer, name)
    variable.assign(np.full(variable.shape, np.nan))
    with pytest.raises(ValueError, match="finite"):
        lipschitz_upper_bound(model)


def test_a_layer_with_a_proven_rule_cannot_be_registered_and_its_subclass_is_unknown():
    with pytest.raises(ValueError, match="keeps it"):
        register_gain(MaxMin, 1.0, assumption="none")
    assert MaxMin in RULES

    class Doubled(MaxMin):
        def call(self, x):
            return 2 * super().call(x)

    with pytest.raises(ValueError, match="Doubled"):
        lipschitz_upper_bound(keras.Sequential([keras.Input((4,)), Doubled()]))


def everything():
    """A classifier through every layer of this kind."""
    x = keras.Input((8, 8, 3))
    h = ChannelPadding(6)(x)
    h = keras.layers.Conv2D(6, 3, padding="same")(h)
    h = BatchCentering()(h)
    h = ConvexCombination()([h, MaxMin()(h)])
    h = LocalResponseNormalization(1, 1.0, 0.5, 0.6)(h)
    h = LocalResponseNormalization(2, 2.0, 0.1, 0.75)(h)
    h = GroupSort(3)(Householder()(h))
    h = LpPooling2D(2, 1, p=3.0)(h)
    h = L2NormPooling2D(3, 2, "same")(LipschitzPReLU(shared_axes=(1, 2))(h))
    h = InvertibleUpSampling(2)(InvertibleDownSampling(2)(h))
    h = ScaledAveragePooling2D(2, 1)(TwoSidedReLU()(h))
    h = keras.layers.Concatenate()([ScaledGlobalAveragePooling2D()(h), GlobalL2NormPooling2D()(h)])
    return keras.Model(x, keras.layers.Dense(3)(FullSort()(Truncate(16)(h))))


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-2, "float32"), (100.0, "float32"), (1.0, "mixed_bfloat16")]
)
def test_computed_logits_lie_within_the_rounding_allowance(scale, dtype, double_precision):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = everything()
    finally:
        keras.config.set_dtype_policy(policy)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        value = np.asarray(0.4 * rng.normal(size=weight.shape), "float32")
        if dtype != "float32":  # what the layers use
            value = (value.view("uint32") & 0xFFFF0000).view("float32")
        weight.assign(value)
    x = scale * rng.normal(size=(12, 8, 8, 3)).astype("float32")
    network = read_network(model)
    norms = np.linalg.norm(x.reshape(12, -1).astype(np.float64), axis=1)
    allowance = rounding_errors(network, norms, network.logits)
    exact = double_precision(model, (8, 8, 3)).predict(x.astype(np.float64), verbose=0)
    error = np.linalg.norm(model.predict(x, verbose=0).astype(np.float64) - exact, axis=1)
    assert np.all(error <= allowance)
    assert np.all(error > 0)
    if dtype == "float32":
        assert np.all(allowance < 2e-3 * (1 + norms))


def test_certificates_of_every_layer_together_withstand_an_attack(attack, double_precision):
    model = everything()
    x = np.random.default_rng(1).normal(size=(12, 8, 8, 3)).astype("float32")
    proof = certify(model, x)
    held = proof.radius > 0
    assert held.sum() >= 6
    exact = double_precision(model, (8, 8, 3))
    radius = proof.radius[held]
    margins = attack(exact, x[held], proof.labels[held], radius * (1 - 1e-4), steps=20)
    assert np.all(margins > 0)
    assert np.any(attack(exact, x[held], proof.labels[held], radius * 300, steps=20) < 0)
    # In float64 the logits are those of the model, and so are the radii.
    again = certify(model, x, precision="float64")
    assert np.allclose(again.margins, proof.margins, atol=1e-3)
