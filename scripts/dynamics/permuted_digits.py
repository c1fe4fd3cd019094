#!/usr/bin/env python
"""Permuted digits as sequences: certified accuracy of a recurrent equilibrium network, and a plain
Keras LSTM of as many states under attack.

    python scripts/dynamics/permuted_digits.py --seeds 0 1

scikit-learn's 1797 digits of 8x8, pixels in [0, 1] in one fixed random order, read as 16 steps of
4 pixels; every fifth digit is for testing. Both networks are attacked (projected gradient, l2 over
the whole sequence) on the same 200 of them. Prints a table of Markdown, with CPU seconds.
"""

import argparse
import time

import keras
import numpy as np
from sklearn.datasets import load_digits

import tf_lyapunov as tfl
from tf_lyapunov.dynamics import L2Gain, certify_dynamics

RADII = (0.1, 0.25, 0.5)
STEPS, ATTACKED = 16, 200


def data():
    """`(x, y, x_test, y_test)`, sequences (n, 16, 4)."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(x.shape[1])
    x = (x[:, order] / 16.0).astype("float32").reshape(len(x), STEPS, -1)
    is_test = np.arange(len(x)) % 5 == 0
    return x[~is_test], y[~is_test], x[is_test], y[is_test]


def recurrent(states, gain):
    """Gain γ of the layer, 1/√16 of the average, 1 of the head: γ/4 together."""
    return keras.Sequential(
        [
            keras.Input((STEPS, 64 // STEPS)),
            tfl.layers.RecurrentEquilibrium(
                states, states, L2Gain(4 * gain), blocks=1, return_sequences=True
            ),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(10, kernel_constraint=tfl.constraints.SpectralBound(1.0)),
        ]
    )


def lstm(states):
    """Keras' own, which reads its last output: it learns more from that than from the average."""
    return keras.Sequential(
        [
            keras.Input((STEPS, 64 // STEPS)),
            keras.layers.LSTM(states),
            keras.layers.Dense(10),
        ]
    )


def trained(model, x, y, epochs):
    """Fits by Adam with a rate that falls to zero; CPU seconds."""
    begin = time.process_time()
    steps = epochs * int(np.ceil(len(x) / 64))
    rate = keras.optimizers.schedules.CosineDecay(0.01, steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
    return time.process_time() - begin


def under_attack(model, x, y, steps):
    """Share of right decisions that no attack of these radii changed."""
    found = []
    for radius in RADII:
        result = tfl.attacks.PGD(radius=tfl.L2(radius), steps=steps)(model, x, y)
        logits = keras.ops.convert_to_numpy(model(result.x_adv, training=False))
        found.append(float(np.mean(np.argmax(logits, axis=1) == y)))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--states", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lstm-epochs", type=int, default=90, help="it needs more")
    parser.add_argument("--gain", type=float, default=8.0)
    parser.add_argument("--attack-steps", type=int, default=20)
    options = parser.parse_args()
    x, y, x_test, y_test = data()
    some = np.random.default_rng(1).permutation(len(x_test))[:ATTACKED]
    print(f"{keras.backend.backend()}, {options.states} states, {options.epochs} epochs")
    heads = " | ".join(f"at {radius}" for radius in RADII)
    print(f"| network | seed | accuracy | {heads} | proved gain | training, CPU s |")
    print("|---|---|---|" + "---|" * len(RADII) + "---|---|")
    for seed in options.seeds:
        keras.utils.set_random_seed(seed)
        model = recurrent(options.states, options.gain)
        seconds = trained(model, x, y, options.epochs)
        proof = certify_dynamics(model, x_test, y_test, optimise=False)
        shares = [proof.certified_accuracy(r) for r in (0.0, *RADII)]
        tell("recurrent equilibrium, certified", seed, shares, proof.gain_upper_bound, seconds)
        attacked = under_attack(model, x_test[some], y_test[some], options.attack_steps)
        tell("the same, attacked", seed, [shares[0], *attacked], None, None)
        keras.utils.set_random_seed(seed)
        model = lstm(options.states)
        seconds = trained(model, x, y, options.lstm_epochs)
        logits = keras.ops.convert_to_numpy(model(x_test, training=False))
        right = float(np.mean(np.argmax(logits, axis=1) == y_test))
        attacked = under_attack(model, x_test[some], y_test[some], options.attack_steps)
        tell("LSTM, attacked", seed, [right, *attacked], None, seconds)


def tell(name, seed, shares, gain, seconds):
    """One row."""
    cells = [f"{100 * share:.1f}" for share in shares]
    cells += [
        "none" if gain is None else f"{gain:.3f}",
        "" if seconds is None else f"{seconds:.0f}",
    ]
    print(f"| {name} | {seed} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
