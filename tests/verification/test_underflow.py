"""Numbers near both ends of float64: what underflows is counted, or nothing is claimed."""

import keras
import numpy as np
import pytest

from tf_lyapunov import Region, certify, gain_on, output_bounds
from tf_lyapunov.verification import archive, inequalities, verify
from tf_lyapunov.verification.arithmetic import norm_up, row_norms_up, scaled_up
from tf_lyapunov.verification.around.pairs import expanded
from tf_lyapunov.verification.checking import Evidence, derive
from tf_lyapunov.verification.localgains import GainClaim, derived
from tf_lyapunov.verification.network import Chain, Network, Step
from tf_lyapunov.verification.operations import Activation, Axis, Convolution, Linear, Merge
from tf_lyapunov.verification.reading import read

layers = keras.layers


def chain(*weights, outputs=1):
    """A float64 model of one ReLU unit per weight and linear outputs."""
    units = [1] * (len(weights) - 1) + [outputs]
    model = keras.Sequential([keras.Input((1,), dtype="float64")])
    for count in units[:-1]:
        model.add(layers.Dense(count, "relu", dtype="float64"))
    model.add(layers.Dense(outputs, dtype="float64"))
    for layer, weight, count in zip(model.layers, weights, units, strict=True):
        layer.set_weights([np.eye(1, count) * weight, np.zeros(count)])
    return model


def steps(*operations):
    """A `Network` of single numbers; what merges reads the step before twice."""
    found, name = [Step("input", (), (1,), None)], "input"
    for k, operation in enumerate(operations):
        inputs = (name, name) if isinstance(operation, Merge) else (name,)
        name = f"step{k}"
        found.append(Step(name, inputs, (1,), operation))
    return Network(tuple(found), name, (), ("float64",))


def times(weight):
    return Linear(np.array([[weight]]), np.zeros(1))


RELU = Activation("relu", {})


def claim_at(center, radius, norm="l2"):
    which = np.array([["l2", "linf"].index(norm)])
    return GainClaim(np.array([[center]]), np.array([radius]), np.ones(1), which)


def test_a_distance_that_underflows_is_no_infinite_radius(tmp_path):
    """f_1 - f_0 = 1e-100 - 1e-400·x is 0 at x = 1e300."""
    model, path = chain(1e-200, 1e-200, outputs=2), tmp_path / "p.npz"
    model.layers[0].activation = keras.activations.linear
    model.layers[1].set_weights([np.array([[1e-200, 0.0]]), np.array([0.0, 1e-100])])
    certificate = certify(model, np.zeros((1, 1)), method="composition")
    assert 0 < certificate.radius[0] < 1e300
    certificate.save(path)
    header, arrays = archive.read(path)
    arrays = {**arrays, "radius": np.array([np.inf])}
    archive.write(path, header, arrays)
    found = verify(path, model)
    assert not found.holds and found.radius[0] < 1e300


def test_norms_of_subnormal_numbers_are_rounded_up():
    smallest = 5e-324
    assert row_norms_up(np.array([[smallest, smallest]]))[0] >= 2 * smallest
    assert norm_up(np.full((2, 2), smallest)) >= 2 * smallest
    assert scaled_up(1e-200, np.array([0.0, 1e-200])).tolist() == [0.0, smallest]
    axes = (Axis.of(3, 1, 1, 40, "same"),)
    for weight in (smallest, 1e-310, 1e300):
        found = Convolution(np.full((1, 3, 50, 50), weight), axes, np.zeros(50))
        assert found._frequency_norm_up() >= 149 * weight


def test_slopes_and_weights_that_underflow_are_counted():
    weights = np.array([[1e300]]), np.array([[5e-324]])
    assert inequalities.liplt_gain(Chain(weights, (0.0, 0.0), ((0.0, 1.0),))) >= 5e-324 * 1e300
    mean = steps(times(5e-324), Merge("average"), times(1e300))
    assert derive(mean, Evidence()).gain >= 5e-324 * 1e300
    assert derived(mean, claim_at(1.0, 1.0), {})[0] >= 5e-324 * 1e300


def test_folded_normalizations_keep_weights_that_underflow():
    model = keras.Sequential(
        [
            keras.Input((1,), dtype="float64"),
            layers.Dense(1, use_bias=False, dtype="float64"),
            layers.BatchNormalization(dtype="float64", epsilon=1e-30),
            layers.Dense(1, use_bias=False, dtype="float64"),
        ]
    )
    model.layers[0].set_weights([np.array([[1e-200]])])
    model.layers[1].set_weights([np.full(1, v) for v in (1e-200, 0.0, 0.0, 1.0)])
    model.layers[2].set_weights([np.array([[1e300]])])
    assert derive(read(model), Evidence()).gain >= 1e-100


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(
    ("weights", "center", "gain"),
    [
        ((1e300, 1e-200, 1e-200), 1.0, 1e-100),
        ((1e300, 1e-200, 1e-200), 1e-182, 1e-100),
        ((1e-200, 1e-200, 1e300, 1e100), 1.0, 1.0),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_local_gains_count_rows_that_underflow(norm, weights, center, gain):
    found = gain_on(chain(*weights), np.array([[center]]), center / 2, norm=norm)
    assert found[0] >= gain * (1 - 1e-9)
    network = steps(*[op for w in weights for op in (times(w), RELU)][:-1])
    try:
        assert derived(network, claim_at(center, center / 2, norm), {})[0] >= gain * (1 - 1e-9)
    except OverflowError as error:
        assert "no bound" in str(error)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bounds_of_outputs_count_rows_that_underflow():
    """f = -1e-100·x, where the weights behind the first layer multiply to 0."""
    found = output_bounds(chain(1e300, 1e-200, -1e-200), Region.box(np.full(1, 0.5), np.ones(1)))
    assert found.lower[0] <= -1e-100 * (1 - 1e-9) and found.upper[0] >= -5e-101


def test_steps_of_equal_names_are_refused_or_told_apart():
    """A model may be called what the verifier calls a part of another layer."""
    dense = layers.Dense(2, "relu", name="dense")
    inner = keras.Input((2,))
    inner = keras.Model(inner, layers.Activation("tanh", name="relu")(inner), name="dense#2")
    x = keras.Input((2,))
    model = keras.Model(x, layers.Dense(2, name="out")(inner(dense(dense(x)))))
    with pytest.raises(ValueError, match=r"names of their layers\. Received: two .*dense#2/relu"):
        read(model)
    pool = layers.MaxPooling1D(2, name="pool")
    inner = keras.Input((2, 2))
    inner = keras.Model(inner, layers.Activation("tanh", name="halves 0")(inner), name="pool#2")
    x = keras.Input((4, 1))
    second = pool(layers.Reshape((4, 1))(layers.Dense(4)(layers.Flatten()(pool(x)))))
    joined = [layers.Flatten()(second), layers.Flatten()(inner(layers.Reshape((2, 2))(x)))]
    network = read(keras.Model(x, layers.Dense(2)(layers.Concatenate()(joined))))
    names = [step.name for step in expanded(network, network.gains()[1])[0].steps]
    assert len(set(names)) == len(names) and "pool#2/halves 0" in names
