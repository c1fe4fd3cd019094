#!/usr/bin/env python
"""Vehicle steering by networks trained under a (δ, ν) budget and without one.

    python scripts/control/steering.py --trajectories 100000 --figure FILE.svg

The vehicle is that of Yin, Seiler and Arcak (arXiv 2006.07579): 28 m/s, sampled every 20 ms. Two
loops, with controllers that learn from noisy demonstrations:

- lane: four states, lateral and heading errors and their rates; a region of attraction is proved
  of the weights, and attacked by trajectories from its boundary;
- yaw: the yaw rate is fed back to the steering angle; a claim (δ, ν) of the controller, under which
  it is trained, makes the loop stable at every step of training by `passive_feedback`.

Prints a table of Markdown; exits with 1 where a trajectory left a proved region.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the folders of scripts

import keras
import numpy as np
from scipy.linalg import solve_discrete_are

import tf_lyapunov as tfl
from control.regions import picture
from tf_lyapunov.control import Plant, linear_indices, passive_feedback, region_of_attraction
from tf_lyapunov.writing import write_bytes

STEP, SPEED, MASS, INERTIA = 0.02, 28.0, 1670.0, 2100.0
TO_FRONT, TO_REAR = 0.99, 1.7  # m
FRONT, REAR = 2 * 61595.0, 2 * 52095.0  # N/rad, of both wheels
# rad of steering, m, m/s, rad, rad/s.
LARGEST, BOX = 0.5236, [2.0, 3.0, 0.4, 2.0]
SAMPLES, UNITS, PASSES = 64, 8, 150


def lane():
    """`Plant` of (e, ė, ψ, ψ̇) under the steering angle."""
    total, moment = FRONT + REAR, TO_FRONT * FRONT - TO_REAR * REAR
    turning = TO_FRONT**2 * FRONT + TO_REAR**2 * REAR
    continuous = np.array(
        [
            [0, 1, 0, 0],
            [0, -total / (MASS * SPEED), total / MASS, -moment / (MASS * SPEED)],
            [0, 0, 0, 1],
            [0, -moment / (INERTIA * SPEED), moment / INERTIA, -turning / (INERTIA * SPEED)],
        ]
    )
    enters = np.array([0, FRONT / MASS, 0, TO_FRONT * FRONT / INERTIA])
    return Plant(np.eye(4) + STEP * continuous, STEP * enters)


def regulator(plant, states=(1.0, 0.1, 5.0, 0.1), effort=20.0):
    """K of u = -Kx, linear-quadratic."""
    a, b = plant.state, plant.input
    p = solve_discrete_are(a, b, np.diag(states), effort * np.eye(1))
    return np.linalg.solve(effort + b.T @ p @ b, b.T @ p @ a)


def network(inputs, design=None):
    """Two layers without biases; `design` gives their budgets."""
    bounds = [None, None] if design is None else map(tfl.constraints.SpectralBound, design.budgets)
    first, last = bounds
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(UNITS, "tanh", use_bias=False, kernel_constraint=first),
            keras.layers.Dense(1, use_bias=False, kernel_constraint=last),
        ]
    )


def trained(model, x, u, seed):
    keras.utils.set_random_seed(seed)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    x, u = (np.tile(v, (PASSES, 1)).astype("float32") for v in (x, u))
    model.fit(x, u, batch_size=SAMPLES, shuffle=False, verbose=0)
    return model


def trained_pair(plant_inputs, x, u, claim, weights, seed):
    """Dict of a controller trained without a budget and one under the claim; and the design."""
    design = tfl.spectral_design(claim, sectors=["tanh", "linear"], weights=weights)
    models = {}
    for name, budgets in (("plain", None), ("budget", design)):
        keras.utils.set_random_seed(seed)
        models[name] = trained(network(plant_inputs, budgets), x, u, seed)
    return models, design


def lane_loops(seed):
    """Regions of attraction of both lane keepers, by name, and the claim."""
    plant, rng = lane(), np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (SAMPLES, 4)) * BOX
    u = np.clip(-x @ regulator(plant).T, -LARGEST, LARGEST)
    u += 0.2 * rng.normal(size=u.shape)
    claim = tfl.Indices.from_slopes(-1.4, 3.0)
    models, _ = trained_pair(4, x, u, claim, (0.4, 3.5), seed)
    regions = {name: region_of_attraction(plant, m, BOX) for name, m in models.items()}
    return regions, claim


def yaw():
    """`(A, B, C)` from steering to yaw rate; states are lateral speed and yaw rate."""
    total, moment = FRONT + REAR, TO_FRONT * FRONT - TO_REAR * REAR
    turning = TO_FRONT**2 * FRONT + TO_REAR**2 * REAR
    continuous = np.array(
        [
            [-total / (MASS * SPEED), -moment / (MASS * SPEED) - SPEED],
            [-moment / (INERTIA * SPEED), -turning / (INERTIA * SPEED)],
        ]
    )
    enters = np.array([[FRONT / MASS], [TO_FRONT * FRONT / INERTIA]])
    return np.eye(2) + STEP * continuous, STEP * enters, np.array([[0.0, 1.0]])


def enough(gain, delta):
    """Indices (δ, ν) of every map with this gain: uy - δy² ≥ -(L + δL²)u²."""
    return tfl.Indices(delta, -(gain + delta * gain**2) * (1 + 1e-12))


def yaw_loops(seed):
    """`(plant, claim, rows)`, a row being name, proved gain, loop, share that comes to rest."""
    a, b, c = yaw()
    plant = max(
        (linear_indices(a, b, c, delta=d) for d in (0.08, 0.1, 0.11, 0.12)),
        key=lambda found: room(found.indices),
    )
    delta = -plant.indices.nu + 0.01
    # What both sums of the theorem leave, with a margin of 0.005.
    claim = tfl.Indices(delta, -plant.indices.delta + 0.005)
    rng = np.random.default_rng(seed)
    y = rng.uniform(-1, 1, (SAMPLES, 1))
    u = np.clip(0.09 * y, -0.06, 0.06) + 0.4 * rng.normal(size=y.shape)
    models, _ = trained_pair(1, y, u, claim, (1.0, 0.1), seed)
    rows = []
    for name, model in models.items():
        gain = tfl.certify(model, y[:1].astype("float32")).gain_upper_bound
        loop = passive_feedback(plant, enough(gain, delta))
        rows.append((name, gain, loop, rest(a, b, c, model, rng)))
    return plant, claim, rows


def room(indices):
    """Largest gain that a controller may have beside a plant with these indices."""
    delta = -indices.nu + 0.01
    return (np.sqrt(1 + 4 * delta * (indices.delta - 0.005)) - 1) / (2 * delta)


def rest(a, b, c, model, rng, count=1000, steps=500):
    """Share of random starts from which the loop u = -π(y) is at rest after so many steps."""
    first, last = (np.asarray(w, np.float64) for w in model.get_weights())
    x = rng.uniform(-1, 1, (count, 2)) * [2.0, 1.0]
    for _ in range(steps):
        x = x @ a.T - np.tanh(x @ c.T @ first) @ last @ b.T
    return float(np.mean(np.linalg.norm(x, axis=1) < 1e-2))


def figure(regions):
    """Both regions in the plane of lateral and heading error, as SVG bytes."""
    labels = "lateral error, m", "heading error, rad"
    return picture(regions, (0, 2), 150, labels, "volume")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", help="SVG file to write")
    parser.add_argument(
        "--trajectories",
        type=int,
        default=10_000,
        help="inside; a tenth on the boundary",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    regions, claim = lane_loops(options.seed)
    left = 0
    print(f"{keras.backend.backend()}; lane, claim δ = {claim.delta:.4g}, ν = {claim.nu:.4g}")
    print("| controller | verdict | volume | of the simulated | rate | left, of both kinds |")
    print("|---|---|---|---|---|---|")
    for name, region in regions.items():
        if region.matrix is None:
            print(f"| {name} | {region.verdict} | | | | |\n{region.explain()}")
            continue
        count = options.trajectories
        attacks = [region.attack(count // 10), region.attack(count, inside=True)]
        gone = sum(int(a.left.sum()) for a in attacks)
        left += gone
        share = region.compare(20_000).share
        print(
            f"| {name} | {region.verdict} | {region.volume:.4g} | {100 * share:.1f}% | "
            f"{region.rate:.5f} | {gone} of {sum(map(len, attacks))} |"
        )
    plant, claim, rows = yaw_loops(options.seed)
    print(f"yaw, plant {plant}; claim δ = {claim.delta:.4g}, ν = {claim.nu:.4g}")
    print("| controller | gain | loop | δ_p + ν_c | δ_c + ν_p | comes to rest |")
    print("|---|---|---|---|---|---|")
    for name, gain, loop, share in rows:
        first, second = loop.margins
        print(
            f"| {name} | {gain:.4g} | {loop.verdict} | {first:.4g} | {second:.4g} | "
            f"{100 * share:.1f}% |"
        )
    if options.figure:
        write_bytes(options.figure, figure(regions))
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
