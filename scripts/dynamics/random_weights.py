#!/usr/bin/env python
"""Recurrent equilibrium layers at random weights and at every step of training: is the inequality
of their supply rate proved?

    python scripts/dynamics/random_weights.py --draws 10000 --steps 200

Weights are of sizes over 10^±2, some of low rank or zero, in layers of eight sizes a rate. They are
computed by the backend's compiler, in float32, as training does; the layer's own storage and
multipliers are then checked in float64 with every rounding bounded. Training is by Adam at rate
0.1. Prints a table of Markdown; exits with 1 where a proof failed.
"""

import argparse
import sys
import time

import keras
import numpy as np

from tf_lyapunov.dynamics import Contracting, L2Gain, Supply
from tf_lyapunov.dynamics.systems import system_of_values
from tf_lyapunov.layers import RecurrentEquilibrium
from tf_lyapunov.theory.sectors import Indices
from tf_lyapunov.theory.supply_rates import supply_matrices
from tf_lyapunov.verification.dissipation import is_explicit, monotone, proves

# Functions of the numbers of outputs and inputs.
SUPPLIES = {
    "gain": lambda p, m: L2Gain(0.7),
    "indices": lambda p, m: Indices(0.6, -0.4),
    "strict": lambda p, m: Indices(0.5, 0.2 if p >= m else -0.2),
    "general": lambda p, m: Supply(-np.eye(p) - 0.1, 0.3 * np.ones((m, p)), 3 * np.eye(m)),
    "contracting": lambda p, m: Contracting(0.8),
}
SIZES, SPREAD = 8, 2.0


def layers(name, rng):
    """Eight built layers of a rate; every other one trains its rate, or solves for its neurons."""
    for number in range(SIZES):
        inputs, units, states = (int(v) for v in rng.integers(1, 8, 3))
        neurons, blocks = int(rng.integers(1, 12)), int(rng.integers(1, 5))
        supply = SUPPLIES[name](units, inputs)
        layer = RecurrentEquilibrium(
            units, states, supply, neurons=neurons, blocks=blocks,
            train_supply=number % 2 == 0 and isinstance(supply, L2Gain | Indices),
            implicit=number % 4 == 3, return_sequences=True,
        )  # fmt: skip
        layer.build((None, 5, inputs))
        yield layer


def drawn(shape, rng):
    """Random values of sizes over 10^±2, some of rank one or zero, float32."""
    value = rng.normal(size=shape) * 10.0 ** rng.uniform(-SPREAD, SPREAD)
    kind = rng.integers(6)
    if kind == 0 and value.ndim == 2:
        value = np.outer(value[:, 0], value[0])
    return (value * (kind != 1)).astype("float32")


def compiled(cell):
    """Function from raw weights to the effective ones, as training computes them."""

    def function(*sources):
        return cell._compute(list(sources), training=True)

    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function


def holds(layer, values):
    """Whether the layer's own storage and multipliers prove the rate of its weights of now."""
    names = layer.cell._effective_names
    values = {
        name: np.asarray(keras.ops.convert_to_numpy(v), np.float64)
        for name, v in zip(names, values, strict=True)
    }
    system = system_of_values(layer, layer.cell, values)
    pair = system.storage, system.multipliers
    if not (is_explicit(system) or monotone(system, system.multipliers)):
        return False
    if isinstance(system.supply, Contracting):
        return proves(system, *pair, squared_rate=np.nextafter(system.supply.rate**2, 0))
    return proves(system, *pair, supply_matrices(system.supply, system.outputs, system.inputs))


def failures_of_draws(name, draws, seed=0):
    """`(number of settings, number that is not proved)`."""
    rng = np.random.default_rng([seed, len(name)])
    count, failed = 0, 0
    for layer in layers(name, rng):
        function = compiled(layer.cell)
        for _ in range(-(-draws // SIZES)):
            sources = [drawn(v.shape, rng) for v in layer.cell._sources]
            if layer.cell.train_supply:
                layer.cell.supply_logarithms.assign(sources[-1])
            count += 1
            failed += not holds(layer, function(*sources))
    return count, failed


def failures_of_steps(name, steps, seed=0):
    """`(number of steps, number that is not proved)` of Adam at rate 0.1."""
    rng = np.random.default_rng([seed, len(name), 1])
    keras.utils.set_random_seed(seed)
    x = rng.normal(size=(8, 6, 2)).astype("float32")
    failed, count = 0, 0
    for arguments in ({"blocks": 2}, {"implicit": True, "iterations": 5}):
        supply = SUPPLIES[name](2, 2)
        layer = RecurrentEquilibrium(
            2, 3, supply, "tanh", neurons=5, return_sequences=True,
            train_supply=isinstance(supply, L2Gain | Indices), **arguments,
        )  # fmt: skip
        model = keras.Sequential([keras.Input((6, 2)), layer])
        model.compile(keras.optimizers.Adam(0.1), "mse")
        function = compiled(layer.cell)
        for _ in range(-(-steps // 2)):
            model.train_on_batch(x, np.cumsum(x, axis=1))
            sources = [keras.ops.convert_to_tensor(v) for v in layer.cell._sources]
            count += 1
            failed += not holds(layer, function(*sources))
    return count, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", nargs="+", choices=SUPPLIES, default=list(SUPPLIES))
    parser.add_argument("--draws", type=int, default=10_000, help="settings a rate")
    parser.add_argument("--steps", type=int, default=200, help="steps of training a rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{keras.backend.backend()}, seed {options.seed}")
    print("| rate | settings | not proved | steps at rate 0.1 | not proved | CPU s |")
    print("|---|---|---|---|---|---|")
    bad = 0
    for name in options.rates:
        begin = time.process_time()
        counts = (
            *failures_of_draws(name, options.draws, options.seed),
            *failures_of_steps(name, options.steps, options.seed),
        )
        bad += counts[1] + counts[3]
        seconds = time.process_time() - begin
        cells = " | ".join(str(v) for v in (name, *counts, f"{seconds:.0f}"))
        print(f"| {cells} |", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
