"""The verifier's passes to the last bit: rounding, weights known up to an error, windows, casts."""

import dataclasses
from fractions import Fraction

import keras
import numpy as np
import pytest
from small_proofs import filled

from tf_lyapunov.verification.around.balls import Gains
from tf_lyapunov.verification.around.claims import converted, margin_rows, region_around
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.around.region import Region
from tf_lyapunov.verification.around.surroundings import Surroundings
from tf_lyapunov.verification.reading import read

layers = keras.layers


def around(model, center, radius, norm="l2"):
    network = read(model)
    return Surroundings(network, Gains(network.gains()[1]), Region(center, radius, norm))


def exact(weights, x):
    """A chain of dense layers with ReLU between, in fractions."""
    x = [Fraction(float(v)) for v in x]
    for number in range(0, len(weights), 2):
        kernel, bias = weights[number : number + 2]
        x = [
            sum(
                (v * Fraction(float(k)) for v, k in zip(x, column, strict=True)), Fraction(float(b))
            )
            for column, b in zip(kernel.T, bias, strict=True)
        ]
        if number + 2 < len(weights):
            x = [max(v, Fraction(0)) for v in x]
    return x


def test_bounds_at_a_point_are_below_the_exact_value_and_close_to_it():
    model = filled(
        keras.Sequential([keras.Input((5,)), layers.Dense(7, "relu"), layers.Dense(4)]), 3
    )
    weights = [np.asarray(w, np.float64) for w in model.get_weights()]
    rng = np.random.default_rng(0)
    above = 0
    for _ in range(10):
        x = rng.normal(size=5)
        known = around(model, x, 0.0)
        rows = np.concatenate([np.eye(4), -np.eye(4)])
        found = known.lower(known.network.logits, Functionals(rows))
        computed = np.maximum(x @ weights[0] + weights[1], 0) @ weights[2] + weights[3]
        for row, value in zip(rows, found, strict=True):
            true = sum(Fraction(float(r)) * v for r, v in zip(row, exact(weights, x), strict=True))
            assert Fraction(float(value)) <= true
            assert float(true - Fraction(float(value))) < 1e-11
            above += Fraction(float(row @ computed)) > true
    assert above > 10  # without its rounding a pass would lie above, as this product does


def test_bounds_hold_for_all_weights_within_their_errors():
    model = filled(keras.Sequential([keras.Input((4,)), layers.Dense(6, "relu"), layers.Dense(3)]))
    network, rng = read(model), np.random.default_rng(1)
    steps = []
    for step in network.steps:
        operation = step.operation
        if hasattr(operation, "weight"):
            operation = dataclasses.replace(
                operation,
                weight_error=np.full(operation.weight.shape, 0.1),
                bias_error=np.full(operation.bias.shape, 0.05),
            )
        steps.append(dataclasses.replace(step, operation=operation))
    network = dataclasses.replace(network, steps=tuple(steps))
    center = rng.normal(size=4)
    known = Surroundings(network, Gains(network.gains()[1]), Region(center, 0.3, "l2"))
    found = known.lower(network.logits, Functionals(np.concatenate([np.eye(3), -np.eye(3)])))
    kernels = [np.asarray(w, np.float64) for w in model.get_weights()]
    least = np.full(6, np.inf)
    for _ in range(3000):
        first, b, second, d = (
            w + rng.choice([-1, 1], size=w.shape) * (0.1 if w.ndim == 2 else 0.05) for w in kernels
        )
        step = rng.normal(size=4)
        x = center + 0.3 * step / np.linalg.norm(step)
        value = np.maximum(x @ first + b, 0) @ second + d
        least = np.minimum(least, np.concatenate([value, -value]))
    exact_weights = around(model, center, 0.3)
    plain = exact_weights.lower(
        network.logits, Functionals(np.concatenate([np.eye(3), -np.eye(3)]))
    )
    assert np.all(found <= least) and np.all(found < plain - 0.1)
    assert np.any(plain > least)  # so that the errors matter


def test_parts_of_signals_within_windows_move_by_what_their_inputs_move():
    ones = {"kernel_initializer": "ones", "padding": "same", "activation": "relu"}
    model = keras.Sequential(
        [keras.Input((6, 6, 1)), layers.Conv2D(1, 1, **ones), layers.Conv2D(1, 2, **ones),
         layers.Conv2D(1, 1, **ones), layers.Flatten(), layers.Dense(2)]
    )  # fmt: skip
    known = around(model, np.full((6, 6, 1), 5.0), 0.5)
    names = [step.name for step in known.network.steps]
    first, second, _ = (n for n in names if n.endswith("/relu"))
    # One entry of the first moves by the input's own distance, all of four entries summed by twice.
    assert 0.5 <= known.balls.within(first, ((2, 3), (2, 3))) <= 0.5 * (1 + 1e-6)
    assert 1.0 <= known.balls.within(second, ((2, 3), (2, 3))) <= 1.0 * (1 + 1e-6)
    rng = np.random.default_rng(2)
    step = rng.normal(size=(500, 6, 6, 1))
    step *= 0.5 / np.linalg.norm(step.reshape(500, -1), axis=1)[:, None, None, None]
    moved = np.pad(step, [(0, 0), (0, 1), (0, 1), (0, 0)])
    moved = moved[:, :-1, :-1] + moved[:, 1:, :-1] + moved[:, :-1, 1:] + moved[:, 1:, 1:]
    for window in (((0, 2), (1, 4)), ((4, 6), (4, 6)), ((0, 6), (0, 6))):
        cut = tuple(slice(a, b) for a, b in window)
        reached = np.linalg.norm(moved[(slice(None), *cut)].reshape(500, -1), axis=1).max()
        assert reached <= known.balls.within(second, window) <= known.radii[second]


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_regions_hold_the_ball_around_the_input_as_given(norm):
    given = np.full(4, 0.1)
    center = given.astype(np.float32).astype(np.float64)
    apart = {"l2": 2, "linf": 1, "l1": 4}[norm] * abs(center[0] - given[0])
    region = region_around(center, given, 0.2, norm, (-np.inf, np.inf))
    assert apart > 0 and 0.2 + apart <= region.radius <= 0.2 + apart * 1.01
    assert region_around(given, given, 0.2, norm, (-np.inf, np.inf)).radius == 0.2


def test_global_radii_in_other_norms_and_rows_of_margins():
    radius = np.array([0.0, 1.0, np.inf])
    assert converted(radius, "l2", 9) is radius and converted(radius, "l1", 9) is radius
    found = converted(radius, "linf", 9)
    assert found[0] == 0 and np.isinf(found[2]) and 1 / 3 * (1 - 1e-12) < found[1] <= 1 / 3
    assert margin_rows(1, 0).tolist() == [[-1.0]] and margin_rows(1, 1).tolist() == [[1.0]]
    assert margin_rows(3, 2).tolist() == [[-1.0, 0.0, 1.0], [0.0, -1.0, 1.0]]
