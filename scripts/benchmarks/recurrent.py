"""An epoch of recurrent equilibrium layers beside Keras' LSTM with as many states.

A step of an LSTM of n states and batch b takes 8bn² flops beside its inputs; one of n states and n
neurons 2bn²·(2 + 1/2 + 1), for x⁺ and v of x, v of w below the blocks, x⁺ of w. The weights are
computed once per batch, some 12 products of n columns, whatever the number of steps.
"""

import statistics
import time

TITLE = "An epoch of a recurrent equilibrium layer / Keras' LSTM of equal states"
STATES, BATCH, STEPS, FEATURES = 64, 64, 100, 8


def measure(quick):
    """CPU seconds of epochs in turn; the median of their ratios, on the backend of Keras."""
    import keras
    import numpy as np

    from tf_lyapunov.dynamics import L2Gain
    from tf_lyapunov.layers import RecurrentEquilibrium

    count, rounds = (4 * BATCH, 3) if quick else (20 * BATCH, 7)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, STEPS, FEATURES)).astype("float32")
    y = rng.integers(0, 10, count)

    def model(layer):
        found = keras.Sequential([keras.Input((STEPS, FEATURES)), layer, keras.layers.Dense(10)])
        found.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        found.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)
        return found

    kinds = {"lstm": model(keras.layers.LSTM(STATES))}
    for blocks in (1, 2, 4):
        layer = RecurrentEquilibrium(STATES, STATES, L2Gain(2.0), "tanh", blocks=blocks)
        kinds[f"{blocks} block{'s' * (blocks > 1)}"] = model(layer)
    seconds = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, network in kinds.items():
            begin = time.process_time()
            network.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)
            seconds[name].append(time.process_time() - begin)
    rows = []
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds["lstm"], strict=True))
        row = {"backend": keras.backend.backend(), "layer": name, "states": STATES}
        rows.append({**row, "CPU seconds": statistics.median(own), "of the LSTM": ratio})
    return {"rows": rows}
