"""Layers as operators: adjoints are adjoints, bounds those of the written-out chain, none below."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.bounds import operators, tails
from tf_lyapunov.bounds.budget import Budget
from tf_lyapunov.bounds.liplt import Products, liplt
from tf_lyapunov.bounds.operators import OperatorChain, OperatorProducts
from tf_lyapunov.certification import certify, read_network


def network_of(*parts, shape=(6, 5, 2), seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(shape), *parts, layers.Flatten(), layers.Dense(3)])
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "variance" in weight.path:
            weight.assign(rng.uniform(0.5, 2.0, weight.shape))
    return read_network(model)


def stack(seed=0):
    return network_of(
        layers.Conv2D(3, 3, padding="same", activation="relu"),
        layers.ZeroPadding2D(1),
        layers.Conv2D(4, 3, strides=2),
        layers.BatchNormalization(),
        layers.LeakyReLU(0.2),
        layers.AveragePooling2D(2, 1),
        layers.Conv2DTranspose(2, 3, strides=2, activation="tanh"),
        layers.DepthwiseConv2D(2),
        seed=seed,
    )


def chain_of(network):
    return OperatorChain.before(tails.Reader(network), network.logits)


def test_applications_and_adjoints_are_those_of_the_matrices():
    for node in chain_of(stack()).nodes:
        matrix, rng = np.asarray(node.dense), np.random.default_rng(0)
        x, c = rng.normal(size=(4, matrix.shape[1])), rng.normal(size=(4, len(matrix)))
        np.testing.assert_allclose(operators.applied(node, x), x @ matrix.T, atol=1e-13)
        np.testing.assert_allclose(operators.adjoint(node, c), c @ matrix, atol=1e-13)
        norm = np.linalg.norm(np.abs(matrix), 2)
        assert norm <= operators.absolute_norm(node) < 4 * norm


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_is_that_of_the_matrices_written_out(seed):
    network = stack(seed)
    chain = tails.dense_tail(network).chain
    found = OperatorProducts(chain_of(network), Budget())
    assert found.gain() == pytest.approx(liplt(chain).gain_upper_bound, rel=1e-9)
    gains, off = Products(chain).pair_gains(), ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(found.pair_gains()[off], gains[off], rtol=1e-9)
    assert found.gain() < 0.9 * np.prod(chain_of(network).norms)
    # Norms of every product, with the mean slopes between, from below.
    for (first, last), norm in found.norms.items():
        product = chain.weights[first]
        for k in range(first, last):
            product = chain.sectors[k].m * chain.weights[k + 1] @ product
        assert np.linalg.norm(product, 2) <= norm <= np.linalg.norm(product, 2) * (1 + 1e-9)


@pytest.mark.parametrize("held", [150, 700])
def test_products_too_large_to_hold_are_bounded_by_gram_matrices_in_parts(monkeypatch, held):
    network = stack()
    chain = chain_of(network)
    expected = OperatorProducts(chain, Budget())
    monkeypatch.setattr(operators, "_HELD", held)
    sweep = operators._Sweep(expected, 0, True)
    assert not sweep.is_whole and len(sweep.norms()) == len(chain.nodes)
    found = OperatorProducts(chain, Budget())
    for pair, norm in expected.norms.items():
        assert norm * (1 - 1e-9) <= found.norms[pair] <= norm * (1 + 1e-6)


def test_without_time_or_a_short_side_it_is_still_above_and_not_beyond_the_product(monkeypatch):
    network = stack()
    chain = chain_of(network)
    exact = OperatorProducts(chain, Budget())
    monkeypatch.setattr(operators, "_SIDE", 3)  # the outputs alone
    some = OperatorProducts(chain, Budget())
    monkeypatch.setattr(operators, "_SIDE", 0)
    none = OperatorProducts(chain, Budget())
    assert exact.gain() < some.gain() < none.gain()
    assert none.gain() <= np.prod(chain.norms) * (1 + 1e-12) and none.pair_gains() is None
    off = ~np.eye(3, dtype=bool)
    assert np.all(exact.pair_gains()[off] <= some.pair_gains()[off] * (1 + 1e-12))
    for pair, norm in exact.norms.items():
        assert norm <= none.norms[pair] * (1 + 1e-9)


def test_layers_beyond_the_limit_stay_in_the_chain_of_a_certificate(monkeypatch, tmp_path):
    monkeypatch.setattr(tails, "MATERIALISED", 2000)
    network = stack()
    assert tails.dense_tail(network).start != "input"
    x = np.random.default_rng(0).normal(size=(200, 6, 5, 2)).astype("float32")
    composed = certify(network.model, x)
    moved = (x + 1e-2 * np.random.default_rng(1).normal(size=x.shape)).astype("float32")
    change = network.model.predict(moved, verbose=0) - network.model.predict(x, verbose=0)
    sizes = np.linalg.norm((moved - x).reshape(200, -1), axis=1)
    slope = np.max(np.linalg.norm(change, axis=1) / sizes)
    for method in ("liplt", "closed_form"):
        found = certify(network.model, x, method=method)
        assert slope <= found.gain_upper_bound < 0.9 * composed.gain_upper_bound
        assert np.all(found.radius >= composed.radius)
        assert any("as operators" in text for text in found.assumptions)
    with pytest.raises(ValueError, match="that are not written out yet"):
        found.save(tmp_path / "proof.npz")


def test_logits_of_a_large_convolution_have_a_chain_too(monkeypatch):
    monkeypatch.setattr(tails, "MATERIALISED", 10)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.Conv2D(3, 3),
            layers.GlobalAveragePooling2D(),
        ]
    )
    x = np.random.default_rng(0).normal(size=(5, 6, 6, 1)).astype("float32")
    composed = certify(model, x).gain_upper_bound
    for method in ("auto", "liplt"):
        assert certify(model, x, method=method).gain_upper_bound < 0.9 * composed
