"""The cost of a guaranteed bound against the products that it really takes."""

import math

import keras
import numpy as np
import pytest

from tf_lyapunov.constraints import SpectralBound
from tf_lyapunov.planning.bounds import bound_cost
from tf_lyapunov.theory.operators import LinearMap

CASES = [
    ((30, 20), LinearMap("dense", (30,))),
    ((12, 40), LinearMap("dense", (12,))),
    ((3, 3, 6, 8), LinearMap("conv", (9, 9, 6), padding="same")),
    ((3, 3, 6, 8), LinearMap("conv", (9, 10, 6), strides=2, padding="same")),
    ((5, 5, 4, 6), LinearMap("conv", (40, 40, 4), padding="same")),
    ((1, 1, 8, 20), LinearMap("conv", (7, 7, 8), padding="valid")),
    ((3, 3, 3, 8), LinearMap("conv", (8, 8, 6), padding="same", groups=2)),
    ((3, 6, 5), LinearMap("conv_transpose", (11, 5), padding="same")),
]


@pytest.mark.parametrize(("shape", "linear_map"), CASES)
def test_the_products_of_a_bound_are_counted_one_by_one(monkeypatch, shape, linear_map):
    counted, matmul = [], keras.ops.matmul

    def counting(a, b):
        result = matmul(a, b)
        counted.append(2 * math.prod(result.shape) * a.shape[-1])
        return result

    monkeypatch.setattr(keras.ops, "matmul", counting)
    kernel = 1e-2 * np.random.default_rng(0).normal(size=shape).astype("float32")
    constraint = SpectralBound.for_map(linear_map, 1.0)
    if keras.backend.backend() == "torch":
        constraint(kernel)
    else:  # eagerly, so that no branch but the one taken is traced
        with _eager():
            constraint(kernel)
    assert sum(counted) == bound_cost(shape, linear_map).flops


def _eager():
    if keras.backend.backend() == "jax":
        import jax

        return jax.disable_jit()
    import contextlib

    return contextlib.nullcontext()


def test_a_depthwise_bound_costs_no_squarings():
    linear_map = LinearMap("depthwise", (9, 9, 5), padding="same")
    cost = bound_cost((3, 3, 5, 1), linear_map)
    # Transforms, and one product per frequency and channel for each of two parts.
    frequencies = cost.frequencies // 5
    assert cost.side == 1 and cost.flops == 3 * 2 * frequencies * 45 + 2 * 2 * cost.frequencies


def test_more_frequencies_and_squarings_cost_more():
    small, large = (LinearMap("conv", (n, n, 16), padding="same") for n in (7, 14))
    shape = (3, 3, 16, 16)
    assert bound_cost(shape, small).flops < bound_cost(shape, large).flops
    assert bound_cost(shape, small, squarings=2).flops < bound_cost(shape, small).flops


def test_a_power_step_applies_the_map_and_its_adjoint():
    cost = bound_cost((3, 3, 4, 8), LinearMap("conv", (6, 6, 4), padding="same"))
    assert cost.steering == 2 * (2 * 9 * 4 * 8 * 36)
