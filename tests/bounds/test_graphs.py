"""Networks with branches: the form computes what the model does, and certificates gain by it."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.bounds import graphs
from tf_lyapunov.bounds.budget import Budget
from tf_lyapunov.bounds.tails import Reader
from tf_lyapunov.certification import certify, read_network
from tf_lyapunov.verification import verify


def branched(seed=0):
    """All merges, pools and a function after a sum, without biases."""
    keras.utils.set_random_seed(seed)
    dense = lambda n: layers.Dense(n, use_bias=False)  # noqa: E731
    inputs = keras.Input((4, 4, 2))
    a = layers.Conv2D(2, 3, padding="same", use_bias=False, activation="relu")(inputs)
    b = layers.Conv2D(3, 2, padding="same", use_bias=False)(inputs)
    joined = layers.Concatenate(axis=2)([a, layers.Conv2D(2, 1, use_bias=False)(b)])
    x = layers.Flatten()(layers.AveragePooling2D(2)(joined))
    x = layers.ReLU()(dense(6)(x))
    y = dense(6)(layers.LeakyReLU(0.2)(dense(5)(x)))
    x = layers.ReLU()(layers.Add()([x, y]))
    y = layers.Average()([x, dense(6)(layers.ReLU()(dense(4)(x))), y])
    x = layers.Subtract()([x, y])
    x = layers.Concatenate()([x, layers.ReLU()(dense(3)(x))])
    return keras.Model(inputs, dense(4)(x))


def residual(depth=2, width=8, inputs=20, before=(), seed=0):
    keras.utils.set_random_seed(seed)
    start = x = keras.Input((inputs,))
    for layer in before:
        x = layer(x)
    x = layers.Dense(width)(x)
    for _ in range(depth):
        y = layers.Dense(width)(layers.ReLU()(layers.Dense(width)(layers.ReLU()(x))))
        x = layers.Add()([x, y])
    return keras.Model(start, layers.Dense(3)(x))


def steepest_secant(model, points=40, step=0.02):
    """Largest quotient found of the model's own differences, along its numerical Jacobians."""
    rng, shape = np.random.default_rng(0), model.input_shape[1:]
    predict = lambda x: model.predict(x.astype("float32"), verbose=0).astype(float)  # noqa: E731
    x = rng.normal(size=(points, 1, *shape)).astype("float32")
    size = int(np.prod(shape))
    unit = step * np.eye(size).reshape(1, size, *shape)
    ahead = predict((x + unit).reshape(-1, *shape)) - predict((x - unit).reshape(-1, *shape))
    best = np.linalg.svd(ahead.reshape(points, size, -1).transpose(0, 2, 1))[2][:, 0]
    ends = [(x[:, 0] + s * step * best.reshape(-1, *shape)).astype("float32") for s in (1, -1)]
    moved = np.linalg.norm((ends[0].astype(float) - ends[1]).reshape(points, -1), axis=1)
    return np.max(np.linalg.norm(predict(ends[0]) - predict(ends[1]), axis=1) / moved)


def part_of(model):
    network = read_network(model)
    return graphs.joint_part(Reader(network), network.logits), network


def test_the_form_computes_what_the_model_does():
    model = branched()
    part, _ = part_of(model)
    assert part.start == "input" and part.merges == 5
    x = np.random.default_rng(0).normal(size=(6, 4, 4, 2)).astype("float32")
    signal = x.reshape(6, -1).astype(np.float64)
    form, first = part.form, part.form.sizes[0]
    ends = np.cumsum(form.sizes)
    for begin, end, alpha in zip(ends[:-1], ends[1:], form.alphas, strict=True):
        y = signal @ form.weights[begin - first : end - first, :begin].T
        signal = np.hstack([signal, np.where(y > 0, y, alpha * y)])
    found = np.ldexp(signal @ form.outputs.T, form.exponent) @ part.weight.T
    np.testing.assert_allclose(found, model.predict(x, verbose=0), atol=1e-5)


@pytest.mark.parametrize("build", [branched, residual])
def test_certificates_lie_between_slopes_and_the_composition(build, tmp_path):
    model = build()
    shape = model.input_shape[1:]
    x = np.random.default_rng(0).normal(size=(20, *shape)).astype("float32")
    composed, found = certify(model, x), certify(model, x, method="lipsdp")
    slope = steepest_secant(model)
    assert slope * (1 - 1e-4) <= found.gain_upper_bound < 0.7 * composed.gain_upper_bound
    assert slope > 0.2 * found.gain_upper_bound
    assert np.all(found.radius >= composed.radius)
    text = found.explain()
    assert "Branches were bounded together" in text
    assert "pairs of logits: each of" in text and "one problem with all branches" in text
    found.save(tmp_path / "proof.npz")
    assert verify(tmp_path / "proof.npz", model).holds


def test_pairs_share_sound_multipliers_and_those_of_their_own_are_tighter(monkeypatch):
    model = residual()
    part, network = part_of(model)
    full = graphs.joint_gains(part, network, Budget())
    monkeypatch.setattr(graphs, "steps", lambda pairs, name: ())  # no search for a pair alone
    shared = graphs.joint_gains(part, network, Budget())
    assert len(full.searched) == 3 and shared.searched == ()
    off = ~np.eye(3, dtype=bool)
    assert np.all(np.isfinite(shared.pairs))
    assert np.all(full.pairs[off] <= shared.pairs[off] * (1 + 1e-9))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 20)).astype("float32")
    moved = x + (0.1 * rng.normal(size=x.shape)).astype("float32")
    change = model.predict(moved, verbose=0) - model.predict(x, verbose=0)
    size = np.linalg.norm(moved - x, axis=1)
    for i, j in zip(*np.tril_indices(3, -1), strict=True):
        slope = np.max(np.abs(change[:, i] - change[:, j]) / size)
        assert slope <= full.pairs[i, j] * (1 + 1e-4) and slope > 0.05 * full.pairs[i, j]


def test_a_part_begins_behind_what_has_no_matrix():
    model = residual(before=[layers.Reshape((20, 1)), layers.MaxPooling1D(2), layers.Flatten()])
    part, network = part_of(model)
    assert part.start == "flatten" or part.start == "max_pooling1d"
    bound = certify(model, np.ones((1, 20)), method="lipsdp")
    assert "Branches were bounded together" in bound.explain()
    chain = keras.Sequential([keras.Input((4,)), layers.Dense(3, "relu"), layers.Dense(2)])
    network = read_network(chain)
    assert graphs.joint_part(Reader(network), network.logits) is None


def test_parts_too_large_for_one_problem_begin_later(monkeypatch):
    model = residual(depth=3)
    whole, _ = part_of(model)
    monkeypatch.setattr(graphs, "LARGEST_SIGNALS", whole.form.total - 1)
    part, _ = part_of(model)
    assert part.form.total < whole.form.total and part.merges < whole.merges + 1
    monkeypatch.setattr(graphs, "LARGEST_SIGNALS", 3)
    assert part_of(model)[0] is None
