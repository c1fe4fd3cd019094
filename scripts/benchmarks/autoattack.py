"""AutoAttack in l2 against pyautoattack: robust accuracy and time on the same models."""

import functools
import os
import time

from benchmarks.data import mnist_or_digits

TITLE = "AutoAttack against pyautoattack"
RADII = (0.5, 1.0, 1.5, 2.0)


def measure(quick):
    """Robust accuracy and seconds of both at four radii; pyautoattack gets a copy in torch.

    The copy spares pyautoattack the cost of a bridge at every gradient. Its adversarial inputs are
    judged by the Keras model, in float64 norms, as ours are.
    """
    if os.environ.get("KERAS_BACKEND", "tensorflow") == "numpy":
        return {"rows": [{"what": "skipped: attacks need gradients"}]}
    try:
        import pyautoattack
        import torch
    except ImportError:
        return {"rows": [{"what": "skipped: install tf_lyapunov[benchmark] (pyautoattack, torch)"}]}
    import numpy as np

    import tf_lyapunov as tfl

    rows = []
    for name, model, x, y in _models(32 if quick else 500):
        copy = _torch_copy(model)
        agreement = float(np.max(np.abs(_logits(copy, x) - model.predict(x, verbose=0))))
        if agreement > 1e-4:
            raise RuntimeError(f"The torch copy of {name} differs by {agreement:.3g}.")
        _ours(tfl, tfl.L2(1e-3), model, x[:8], y[:8])  # compiles
        for radius in RADII[::3] if quick else RADII:
            row = {"model": name, "ball": f"L2({radius})", "inputs": len(x)}
            ours = functools.partial(_ours, tfl, tfl.L2(radius), model, x, y)
            peer = functools.partial(_peer, pyautoattack, torch, radius, copy, x, y)
            for who, run in {"ours": ours, "peer": peer}.items():
                wall, cpu = time.perf_counter(), time.process_time()
                found = run()
                row[f"seconds, {who}"] = time.perf_counter() - wall
                row[f"CPU seconds, {who}"] = time.process_time() - cpu
                row[f"robust, {who}"] = _robust_accuracy(model, x, y, found, tfl.L2(radius))
            row["points apart"] = 100 * (row["robust, ours"] - row["robust, peer"])
            row["time ratio"] = row["seconds, ours"] / row["seconds, peer"]
            row["CPU time ratio"] = row["CPU seconds, ours"] / row["CPU seconds, peer"]
            print(row, flush=True)
            rows.append(row)
    return {"rows": rows, "summary": _summary(rows)}


def _summary(rows):
    total = {
        key: sum(row[f"{key}, ours"] for row in rows) / sum(row[f"{key}, peer"] for row in rows)
        for key in ("seconds", "CPU seconds")
    }
    return {
        "largest difference, points": max(abs(row["points apart"]) for row in rows),
        "largest loss, points": max(row["points apart"] for row in rows),
        "time ratio": total["seconds"],
        "CPU time ratio": total["CPU seconds"],
    }


def _models(inputs):
    """An MLP and a CNN trained for a short time, with images that neither has seen."""
    import keras

    from tf_lyapunov import models as zoo

    x, y, source = mnist_or_digits()
    x = (x - x.min()) / (x.max() - x.min())  # pyautoattack's box is [0, 1]
    count = min(20000, len(x) - inputs)
    builders = {
        "MLP 784-256-128-10": lambda s: zoo.mlp(s, 10, widths=[256, 128], activation="relu"),
        "CNN 16-32-100": lambda s: zoo.cnn(s, 10),
    }
    for name, build in builders.items():
        keras.utils.set_random_seed(0)
        model = build(x.shape[1:])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss)
        model.fit(x[:count], y[:count], epochs=2, batch_size=128, verbose=0)
        yield f"{name} ({source})", model, x[-inputs:], y[-inputs:].astype("int64")


def _ours(tfl, ball, model, x, y):
    return tfl.attacks.AutoAttack(ball, bounds=(0.0, 1.0))(model, x, y).x_adv


def _peer(pyautoattack, torch, radius, copy, x, y):
    attack = pyautoattack.AutoAttack(copy, norm="L2", eps=radius, seed=0)
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    found, _ = attack.run_standard_evaluation(images, torch.from_numpy(y), batch_size=256)
    return found.numpy().transpose(0, 2, 3, 1)


def _robust_accuracy(model, x, y, found, ball):
    """Share of inputs right at `found`, or whose `found` lies outside the ball (float32 slack)."""
    import numpy as np

    change = (found.astype(np.float64) - x).reshape(len(x), -1)
    inside = ball.norm(change) <= ball.radius * (1 + 1e-5)
    right = np.argmax(model.predict(x, verbose=0), axis=1) == y
    kept = np.argmax(model.predict(found, verbose=0), axis=1) == y
    return float(np.mean(right & (kept | ~inside)))


def _torch_copy(model):
    """The model as a torch module for channels-first images, layer by layer, or an error."""
    import keras
    import numpy as np
    import torch
    from torch.nn import functional

    class Copy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.steps, weights = [], []
            for layer in model.layers:
                arrays = [torch.from_numpy(np.ascontiguousarray(w)) for w in layer.get_weights()]
                weights += [torch.nn.Parameter(w, requires_grad=False) for w in arrays]
                self.steps.append((layer, weights[len(weights) - len(arrays) :]))
            self.held = torch.nn.ParameterList(weights)

        def forward(self, x):
            for layer, weights in self.steps:
                x = _applied(layer, weights, x)
            return x

    def _applied(layer, weights, x):
        kind = type(layer)
        if kind is keras.layers.InputLayer:
            return x
        if kind is keras.layers.Flatten:
            return x.permute(0, 2, 3, 1).reshape(len(x), -1)
        if kind is keras.layers.Dense:
            return _activated(layer, x @ weights[0] + weights[1])
        if kind is keras.layers.Conv2D:
            kernel = weights[0].permute(3, 2, 0, 1)
            if layer.padding == "same":
                x = functional.pad(x, _same(x.shape[2:], layer))
            return _activated(layer, functional.conv2d(x, kernel, weights[1], layer.strides))
        if kind is keras.layers.ReLU:
            return functional.relu(x)
        raise TypeError(f"No copy for layers of type {kind.__name__}.")

    def _activated(layer, x):
        name = layer.activation.__name__
        return x if name == "linear" else {"relu": functional.relu, "tanh": torch.tanh}[name](x)

    def _same(sizes, layer):
        padding = []
        for size, window, stride in zip(sizes, layer.kernel_size, layer.strides, strict=True):
            total = max((-(-size // stride) - 1) * stride + window - size, 0)
            padding = [total // 2, total - total // 2, *padding]
        return padding

    return Copy().eval()


def _logits(copy, x):
    import torch

    with torch.no_grad():
        return copy(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
