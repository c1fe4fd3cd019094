"""Numbers that are none, and inputs without a batch axis, are refused in words."""

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl

NO_SECONDS = ("a", None, -1, float("nan"), True, [1.0])


@pytest.fixture(scope="module")
def model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])


@pytest.mark.parametrize("wrong", NO_SECONDS)
def test_seconds_that_are_none_are_refused(model, wrong):
    x, region = np.zeros((1, 3)), tfl.Region.ball(np.zeros(3), 1.0)
    calls = {
        "timeout": [
            lambda: tfl.verify_property(model, region, tfl.Property.classified_as(0), timeout=wrong)
        ],
        "time_budget": [
            lambda: tfl.certify(model, x, time_budget=wrong),
            lambda: tfl.lipschitz_upper_bound(model, time_budget=wrong),
            lambda: tfl.minimal_perturbation_lower_bound(model, x, time_budget=wrong),
        ],
    }
    for name, some in calls.items():
        for call in some:
            with pytest.raises(
                ValueError, match=rf"`{name}` must be .* seconds.*Received: {name}="
            ):
                call()


@pytest.mark.parametrize("radius", ["a", None, [0.1, 0.2], np.ones(2), True])
def test_radii_that_are_no_numbers_are_refused(model, radius):
    with pytest.raises(TypeError, match=r"`radius` must be a real number\. Received: radius="):
        tfl.gain_on(model, np.zeros((1, 3)), radius)


@pytest.mark.parametrize("radius", [0, -1.0, float("inf"), float("nan")])
def test_radii_of_no_ball_are_refused(model, radius):
    with pytest.raises(ValueError, match=r"`radius` must be .*Received: radius="):
        tfl.gain_on(model, np.zeros((1, 3)), radius)


@pytest.mark.parametrize("shape", [(3,), (), (1, 1, 3)])
def test_inputs_without_their_batch_axis_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"`x` must hold inputs \(n, …\).*x\[None\]"):
        tfl.gain_on(model, np.zeros(shape), 0.1)
