"""Measurements of `bounds.py`, in a process of their own.

    timed_bounds.py ROOT TASK ARGUMENTS [+ TASK ARGUMENTS ...]

Prints `[CPU seconds, wall seconds, value]` of the library in ROOT as JSON, a line for each. What
TensorFlow traces once for any bound is left out. What it uses is in earlier builds too.
"""

import json
import sys
import time


def main(root, *calls):
    import keras

    import tf_lyapunov as tfl

    assert tfl.__file__.startswith(root), f"{tfl.__file__} is not the build in {root}."
    keras.utils.set_random_seed(0)
    Input, Conv2D, Flatten = keras.Input, keras.layers.Conv2D, keras.layers.Flatten
    tfl.lipschitz_upper_bound(
        keras.Sequential([Input((4, 4, 2)), Conv2D(2, 3, padding="same"), Flatten()])
    )
    for call in " ".join(calls).split(" + "):
        task, *arguments = call.split()
        keras.utils.set_random_seed(0)
        run = globals()[task](*arguments)
        start = time.process_time(), time.perf_counter()
        value = run()
        spent = time.process_time() - start[0], time.perf_counter() - start[1]
        print(json.dumps([*spent, value]), flush=True)


def lipschitz_upper_bound(name, side):
    import tf_lyapunov as tfl

    model = _network(name, int(side))
    return lambda: tfl.lipschitz_upper_bound(model).gain_upper_bound


def project(name, side):
    """Of kernels that were never seen, all of them beyond their budgets."""
    import numpy as np

    import tf_lyapunov as tfl

    model, rng = _network(name, int(side)), np.random.default_rng(0)
    tfl.constrain(model, {layer.name: 1.0 for layer in model.layers if hasattr(layer, "kernel")})
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            layer.kernel.assign(rng.normal(size=layer.kernel.shape))

    def run():
        tfl.project(model)

    return run


def layer_indices(inputs, outputs):
    """Radius² of the smallest cone of a leaky layer."""
    import numpy as np

    import tf_lyapunov as tfl
    from tf_lyapunov.bounds.layer_indices import layer_indices

    kernel = np.random.default_rng(0).normal(size=(int(inputs), int(outputs)))
    kernel /= np.sqrt(int(inputs))

    def run():
        found = layer_indices(kernel, tfl.Sector(0.3, 1.0))
        center = 1 / (2 * found.delta)
        return center**2 - 2 * center * found.nu

    return run


def monitored_epoch(images, watched):
    """The quickest of five epochs of a depthwise model, after one that traces."""
    import keras
    import numpy as np

    import tf_lyapunov as tfl

    layers, rng = keras.layers, np.random.default_rng(0)
    model = keras.Sequential(
        [
            keras.Input((32, 32, 16)),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    tfl.constrain(model, [1.0, 1.0])
    x = rng.normal(size=(int(images), 32, 32, 16)).astype("float32")
    y = rng.integers(0, 10, len(x))
    seconds = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.start = time.process_time()

        def on_epoch_end(self, epoch, logs=None):
            seconds.append(time.process_time() - self.start)

    monitor = tfl.callbacks.LyapunovMonitor(verbose=0, on_violation="ignore")
    callbacks = [monitor, Watch()] if watched == "watched" else [Watch()]

    def run():
        model.fit(x, y, epochs=6, verbose=0, callbacks=callbacks)
        return min(seconds[1:])

    return run


def verify_property(inputs, width, room):
    """Parts of a box on which a row of a random network is bounded, up to `room` above a sample."""
    import keras
    import numpy as np

    import tf_lyapunov as tfl

    dense, inputs, width = keras.layers.Dense, int(inputs), int(width)
    hidden = [dense(width, "relu") for _ in range(3)]
    model = keras.Sequential([keras.Input((inputs,)), *hidden, dense(5)])
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape) * 1.4 / np.sqrt(weight.shape[0]))
    x = rng.uniform(-1.0, 1.0, (100_000, inputs)).astype("float32")
    y = model.predict(x, batch_size=10_000, verbose=0)[:, 0]
    region = tfl.Region.box(np.full(inputs, -1.0), np.full(inputs, 1.0))
    property = tfl.Property.linear(np.eye(5)[0], float(y.max() + float(room) * y.std()))

    def run():
        found = tfl.verify_property(model, region, property, timeout=250)
        assert found.is_proved, found
        return found.branches

    return run


def _network(name, side):
    import keras

    if name == "DepthwiseConv2D":
        layer = keras.layers.DepthwiseConv2D(3, padding="same")
        return keras.Sequential([keras.Input((side, side, 16)), layer])
    build = getattr(keras.applications, name)
    model = build(weights=None, include_top=False, input_shape=(side, side, 3))
    if name.startswith("EfficientNet"):  # up to its first gate, a product of two signals
        gate = next(i for i, layer in enumerate(model.layers) if "se_squeeze" in layer.name)
        model = keras.Model(model.inputs, model.layers[gate - 1].output)
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
