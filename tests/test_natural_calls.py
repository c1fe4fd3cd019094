"""What somebody writes before having read anything works, or says what to write."""

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov.evaluation.accuracy import accuracy_under_attack
from tf_lyapunov.losses.classes import class_numbers

X = np.random.default_rng(0).standard_normal((6, 4)).astype("float32")


def network(outputs=3, *, built=True):
    keras.utils.set_random_seed(0)
    first = [keras.Input((4,))] if built else []
    layers = [keras.layers.Dense(5, "relu"), keras.layers.Dense(outputs)]
    return keras.Sequential([*first, *layers])


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = keras.layers.Dense(3)

    def call(self, x):
        return self.inner(x)


@pytest.fixture(scope="module")
def binary():
    return network(1)


@pytest.fixture(scope="module")
def signs(binary):
    """Labels in {0, 1}, of which the first is wrong."""
    right = (binary.predict(X, verbose=0)[:, 0] > 0).astype(int)
    right[0] = 1 - right[0]
    return right


@pytest.fixture(scope="module")
def known(binary, signs):
    """What labels in {0, 1} give."""
    return (
        tfl.certify(binary, X, signs).radius,
        tfl.attacks.FGM(tfl.L2(0.1))(binary, X, signs).success,
        np.asarray(tfl.minimal_perturbation_lower_bound(binary, X, signs)),
    )


def codings(y):
    return [y, 2 * y - 1, (2.0 * y - 1)[:, None], np.stack([1 - y, y], 1) * 2 - 1]


# One number for every layer ---------------------------------------------------------------------


@pytest.mark.parametrize("gain", [1.0, 1, np.float32(1.0)])
def test_one_number_constrains_every_layer(gain):
    model = tfl.constrain(network(), gain)
    assert [layer.kernel_constraint.max_gain for layer in model.layers] == [1.0, 1.0]
    assert all(np.linalg.norm(layer.kernel, 2) <= 1.0 for layer in model.layers)


def test_true_is_no_budget_and_the_error_says_what_to_write():
    with pytest.raises(TypeError, match=r"Received: design=True.*constrain\(model, 1.0\)"):
        tfl.constrain(network(), True)


def test_constraining_a_model_that_is_not_built_says_how_to_build_it():
    with pytest.raises(ValueError, match=r"unbuilt model.*model.build"):
        tfl.constrain(network(built=False), 1.0)


# Models that are not built ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: network(built=False), Own])
def test_certify_builds_a_model_on_the_inputs_as_fit_does(make):
    model = make()
    proof = tfl.certify(model, X)
    assert np.all(proof.radius > 0)
    assert model.built
    again = tfl.certify(model, X[:2])  # of another number of rows
    np.testing.assert_allclose(again.radius, proof.radius[:2], rtol=1e-5)


def test_attacks_brackets_and_bounds_build_a_model_too():
    assert tfl.attacks.FGM(tfl.L2(0.1))(network(built=False), X).x_adv.shape == X.shape
    assert np.all(tfl.minimal_perturbation_lower_bound(network(built=False), X).bound > 0)
    found = tfl.bracket(network(built=False), X[:1])
    assert 0 < found.lower[0] <= found.upper[0]


def test_without_inputs_an_error_says_how_to_build():
    with pytest.raises(ValueError, match=r"Call it on data or `model.build"):
        tfl.lipschitz_upper_bound(network(built=False))


# Plans ------------------------------------------------------------------------------------------


def test_a_plan_needs_nothing_but_a_model():
    model = network()
    assert tfl.planning.plan_model(model).chosen.fits
    assert "8xH100" in str(tfl.planning.plan_model(model, "8xH100").cluster)


def test_a_plan_takes_the_optimizer_that_the_model_is_compiled_with():
    plain, adam = network(), network()
    adam.compile("adam", "mse")
    sizes = [tfl.planning.plan_model(m).chosen.memory for m in (plain, adam)]
    assert sizes[1].total > sizes[0].total


# Labels of two classes --------------------------------------------------------------------------


@pytest.mark.parametrize("coding", (1, 2, 3))
def test_labels_of_a_network_trained_by_hkr_mean_the_same_everywhere(binary, signs, known, coding):
    """The trouble: ±1 trains a network, and `certify` and the attacks refused it."""
    y = codings(signs)[coding]
    radius, success, bound = known
    np.testing.assert_array_equal(tfl.certify(binary, X, y).radius, radius)
    np.testing.assert_array_equal(tfl.attacks.FGM(tfl.L2(0.1))(binary, X, y).success, success)
    assert radius[0] == 0 and success[0]
    row = accuracy_under_attack(binary, X, y, {}, [0.0])[0]
    assert row["clean"] == pytest.approx(5 / 6)
    found = tfl.minimal_perturbation_lower_bound(binary, X, y)
    np.testing.assert_array_equal(np.asarray(found), bound)
    if coding == 1:
        assert tfl.bracket(binary, X[:1], y[:1]).upper[0] == 0


def test_losses_and_metrics_take_both_codings_of_one_output(binary, signs):
    f = binary(X)
    for loss in (tfl.losses.KR(), tfl.losses.HKR(), tfl.losses.HingeMargin()):
        values = [float(loss(y.astype("float32"), f)) for y in codings(signs[:, None])[:2]]
        assert values[0] == values[1]
    metric = tfl.metrics.CertifiedAccuracy(0.0, gain=1.0)
    found = []
    for y in (signs, 2 * signs - 1):
        metric.reset_state()
        metric.update_state(y, f)
        found.append(float(metric.result()))
    assert found == pytest.approx([5 / 6, 5 / 6])


def test_three_kinds_of_labels_for_one_output_are_refused_everywhere(binary):
    y = np.array([-1, 0, 1, 1, 0, -1])
    for call in (
        lambda: tfl.certify(binary, X, y),
        lambda: tfl.attacks.FGM(tfl.L2(0.1))(binary, X, y),
        lambda: accuracy_under_attack(binary, X, y, {}, [0.0]),
        lambda: tfl.losses.HKR()(y, binary(X)),
    ):
        with pytest.raises(ValueError, match=r"0 and 1, or -1 and 1.*Received"):
            call()
    metric = tfl.metrics.CertifiedAccuracy(0.0, gain=1.0)
    metric.update_state(y, binary(X))
    assert np.isnan(float(metric.result()))


def test_rows_of_signs_name_a_class_of_several():
    rows = np.array([[1, -1, -1], [-1, -1, 1]])
    assert class_numbers(rows, 2, 3).tolist() == [0, 2]
    np.testing.assert_array_equal(
        tfl.certify(network(), X[:2], rows).radius, tfl.certify(network(), X[:2], [0, 2]).radius
    )
    for wrong in ([[1, 1, -1]], [[0, -1, 1]], [[-1, -1, -1]], [[0.5, 0.5, 0]]):
        with pytest.raises(ValueError, match="a single 1"):
            class_numbers(wrong, 1, 3)


def test_signs_are_no_class_numbers_of_two_outputs():
    with pytest.raises(ValueError, match=r"from 0 to 1, one class.*Received: values from -1 to 1"):
        class_numbers([-1, 1], 2, 2)


def test_adversarial_training_takes_signs():
    model = network(1)
    trained = tfl.training.AdversarialModel(model, tfl.attacks.FGM(tfl.L2(0.1)))
    trained.compile("sgd", tfl.losses.HKR())
    y = np.array([-1.0, 1, 1, -1, 1, -1])
    history = trained.fit(X, y, epochs=1, verbose=0, batch_size=6)
    assert np.isfinite(history.history["loss"][0])
