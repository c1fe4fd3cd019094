#!/usr/bin/env python
"""Examples of RobustNeuralNetworks.jl, rebuilt: what they show, and what is proved here.

    python scripts/dynamics/peer_examples.py --only observer
    python scripts/dynamics/peer_examples.py --only mnist --data-dir DIRECTORY

- mnist: two sandwich layers of 64 units and a linear one, of gain 5 together, on all of MNIST;
  beside a plain network of the same sizes. Their page has 97.24% and 96.60%.
- observer: a box between two springs in a viscous fluid; a contracting recurrent equilibrium
  network estimates position and velocity from the noisy position alone. They train on states and
  have noiseless data; here nothing but sequences is seen.

The third, identification from simulated data, is the tutorial docs/tutorials/soft_sensor.py. Prints
tables of Markdown.
"""

import argparse
import time

import keras
import numpy as np

import tf_lyapunov as tfl
from tf_lyapunov.dynamics import Contracting, certify_dynamics
from tf_lyapunov.dynamics.systems import system_of

GAIN, HIDDEN, RADII = 5.0, (64, 64), (0.05, 0.1, 0.2)
# Amplitudes of uniform noise on pixels in [0, 1].
NOISE = (0.0, 0.4, 0.8)
# Of the box: kg, N/m, kg/m, s.
MASS, SPRING, VISCOUS, STEP = 1.0, 5.0, 0.5, 0.05
STEPS, SETTLED, ERROR = 120, 40, 0.01


def fitted(model, x, y, loss, *, epochs, batch, rate=0.005):
    """CPU seconds of Adam at a rate that falls to zero."""
    begin = time.process_time()
    steps = epochs * -(-len(x) // batch)
    decay = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(keras.optimizers.Adam(decay), loss)
    model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0)
    return time.process_time() - begin


def classifier(robust):
    """784-64-64-10 with ReLU: sandwich layers of gain 5 together, or plain ones."""
    if not robust:
        layers = [keras.layers.Dense(units, "relu") for units in HIDDEN]
        return keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
    each = GAIN ** (1 / 3) * (1 - 1e-6)
    kinds = [(units, "relu") for units in HIDDEN] + [(10, "linear")]
    layers = [tfl.layers.SandwichDense(*kind, max_gain=each) for kind in kinds]
    return keras.Sequential([keras.Input((784,)), *layers])


def mnist(options):
    """Prints accuracy, proved gain and certified accuracy of both networks."""
    data = tfl.datasets.load("mnist", options.data_dir)
    x, x_test = np.concatenate([data.x_val, data.x_train]), data.x_test
    x, x_test = (v.reshape(len(v), -1).astype("float32") + 0.5 for v in (x, x_test))
    y, y_test = np.concatenate([data.y_val, data.y_train]), data.y_test
    noises = " | ".join(f"noise {size}" for size in NOISE[1:])
    radii = " | ".join(f"proved at {radius}" for radius in RADII)
    print(f"| network | accuracy | {noises} | gain proved | {radii} | CPU s |")
    print("|---" * (len(NOISE) + len(RADII) + 3) + "|")
    for name, robust in (("sandwich, gain 5", True), ("plain", False)):
        keras.utils.set_random_seed(options.seed)
        model = classifier(robust)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        seconds = fitted(model, x, y, loss, epochs=options.epochs, batch=128)
        rng, shares = np.random.default_rng(options.seed), []
        for size in NOISE:
            noisy = x_test + size * rng.uniform(-1, 1, x_test.shape).astype("float32")
            found = np.argmax(model.predict(noisy, batch_size=1000, verbose=0), axis=1)
            shares.append(float(np.mean(found == y_test)))
        proof = tfl.certify(model, x_test, y_test)
        proved = [proof.certified_accuracy(radius) for radius in RADII]
        cells = [f"{100 * share:.2f}%" for share in shares] + [f"{proof.gain_upper_bound:.4g}"]
        cells += [f"{100 * share:.2f}%" for share in proved] + [f"{seconds:.0f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def boxes(count, rng, steps=STEPS):
    """Noisy positions (count, steps, 1) and states (count, steps, 2) of free oscillations."""
    states = rng.uniform(-0.5, 0.5, (count, 2))
    found = []
    inner = 10  # Euler's rule at a tenth of the sampling time
    for _ in range(steps):
        found.append(states)
        for _ in range(inner):
            position, speed = states.T
            force = -SPRING * position - VISCOUS * speed * np.abs(speed)
            states = states + STEP / inner * np.stack([speed, force / MASS], axis=1)
    truth = np.stack(found, axis=1)
    seen = truth[..., :1] + ERROR * rng.normal(size=(count, steps, 1))
    return seen.astype("float32"), truth.astype("float32")


def observer_network(rate=0.97, states=6):
    layer = tfl.layers.RecurrentEquilibrium(
        2, states, Contracting(rate), "tanh", blocks=1, feedthrough=True, return_sequences=True
    )
    return keras.Sequential([keras.Input((None, 1)), layer]), layer


def settled(y_true, y_pred):
    """Mean square error once the first steps are over."""
    return keras.ops.mean(keras.ops.square(y_pred[:, SETTLED:] - y_true[:, SETTLED:]))


def forgetting(layer, x, rng):
    """Largest ‖Δx‖ at the end over that at the start, of pairs of random initial states; in P."""
    system = system_of(layer)
    root = np.linalg.cholesky(system.storage).T
    first = rng.normal(size=(len(x), system.states)).astype("float32")
    second = rng.normal(size=first.shape).astype("float32")
    full = tfl.layers.RecurrentEquilibrium.from_config(
        {**layer.get_config(), "return_state": True, "name": "states"}
    )
    full.build(x.shape)
    full.cell.set_weights(layer.cell.get_weights())
    ends = [
        np.asarray(keras.ops.convert_to_numpy(full(x, initial_state=[v])[1]), np.float64)
        for v in (first, second)
    ]
    before = np.linalg.norm((first - second) @ root.T, axis=1)
    return float(np.max(np.linalg.norm((ends[0] - ends[1]) @ root.T, axis=1) / before))


def observer(options):
    """Prints errors of the estimates, rate and gain as proved, and how states approach."""
    rng = np.random.default_rng(options.seed)
    keras.utils.set_random_seed(options.seed)
    x, y = boxes(200, rng)
    x_test, y_test = boxes(50, rng)
    model, layer = observer_network()
    seconds = fitted(model, x, y, settled, epochs=options.epochs * 10, batch=20, rate=0.02)
    error = (model.predict(x_test, verbose=0) - y_test)[:, SETTLED:]
    errors = np.sqrt(np.mean(error**2, axis=(0, 1)))
    spread = np.std(y_test[:, SETTLED:], axis=(0, 1))
    claim = layer.current_supply
    proof = certify_dynamics(layer, claim=claim)
    gain = certify_dynamics(layer).gain_upper_bound
    steps = 20
    reached = forgetting(layer, x_test[:, :steps], rng)
    print("| state | error (root of mean square) | the state varies by |")
    print("|---|---|---|")
    for name, e, s in zip(("position, m", "velocity, m/s"), errors, spread, strict=True):
        print(f"| {name} | {e:.4f} | {s:.4f} |")
    print(
        f"contraction {proof.verdict} at rate {proof.rate:.5f} (asked {claim.rate}), gain of the "
        f"estimates {gain:.4g}; states of {steps} steps ago: {reached:.3g} of their difference "
        f"remains, proved {proof.rate**steps:.3g}; {seconds:.0f} CPU s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=["mnist", "observer"], required=True)
    parser.add_argument("--data-dir", help="of TensorFlow Datasets")
    parser.add_argument("--epochs", type=int, default=12, help="of MNIST; ten times for sequences")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{keras.backend.backend()}, seed {options.seed}")
    for name in options.only:
        {"mnist": mnist, "observer": observer}[name](options)


if __name__ == "__main__":
    main()
