"""Cost of orthogonal kernels by the optimizer (`optimizers.Stiefel`) beside plain ones, in one run.

Adam steps of the MLP 784-256-128-10 and of three convolutions, in rotating order with plain Keras'
and with Cayley layers, which compute their kernels from raw ones in every call. CPU seconds count
all cores and leave out what the machine's other guests take.

What a step computes in 10⁶ flops (products alone; m = 784, n = 256, the small layer in brackets):

    plain        forward and gradients, per sample 1.0                             129 at batch 128
    Stiefel      + Gram matrix 2mn² = 103, its application 103, up to two squares
                 2n³ = 34 each, by how far the step went                           + 206 to 273 (23)
    + gradients  + WᵀZ 103, W·sym 103                                              + 206 (17)

No dense method goes below 206: one product measures, one corrects. The share falls as 1/batch.
"""

import statistics
import time

TITLE = "A training step with orthogonal kernels / plain"
SHAPES = ((784, 256), (256, 128), (128, 10))
GOALS = {128: 1.9, 512: 1.3}
CONVOLUTIONS = ("plain", "stiefel", "cayley")
KINDS = ("plain", "stiefel", "stiefel, tangent gradients", "cayley")


def measure(quick):
    """Ratios of epochs by kind and batch, and how far the kernels are from orthogonal after."""
    rows = []
    for batch, steps, rounds in ((128, 60, 9), (512, 20, 7)):
        steps, rounds = (10, 2) if quick else (steps, rounds)
        x, y = _data(batch * steps)
        models = {kind: _model(kind) for kind in KINDS}
        seconds = {kind: [] for kind in KINDS}
        for attempt in range(rounds + 1):
            first = attempt % len(KINDS)
            for kind in KINDS[first:] + KINDS[:first]:
                timed = _timed(models[kind], x, y, batch)
                if attempt:  # the first compiles
                    seconds[kind].append(timed)
        for kind in KINDS:
            pairs = list(zip(seconds[kind], seconds["plain"], strict=True))
            row = {"model": f"MLP, batch {batch}", "layers": kind}
            row["step, CPU ms"] = 1e3 / steps * statistics.median(a[1] for a, _ in pairs)
            for position, clock in ((1, "CPU"), (0, "wall")):
                ratios = [a[position] / b[position] for a, b in pairs]
                row[f"ratio, {clock}"] = statistics.median(ratios)
            row["GFLOP"] = _flops(kind, batch) / 1e9
            if kind.startswith("stiefel"):
                row["goal"] = GOALS[batch]
                row["steps"] = steps * (rounds + 1)
                row["largest departure"] = max(
                    layer.departure_upper_bound() for layer in models[kind].layers[:2]
                )
            rows.append(row)
    return {"rows": rows + _convolutions(quick)}


def _convolutions(quick):
    """The same of a network of three convolutions at batch 128, with `OrthogonalConv2D`."""
    batch, steps, rounds = (128, 2, 1) if quick else (128, 15, 5)
    x, y = _data(batch * steps)
    x = x.reshape(-1, 28, 28, 1)
    models = {kind: _network(kind) for kind in CONVOLUTIONS}
    seconds = {kind: [] for kind in CONVOLUTIONS}
    for attempt in range(rounds + 1):
        first = attempt % len(CONVOLUTIONS)
        for kind in CONVOLUTIONS[first:] + CONVOLUTIONS[:first]:
            timed = _timed(models[kind], x, y, batch)
            if attempt:
                seconds[kind].append(timed)
    rows = []
    for kind in CONVOLUTIONS:
        pairs = list(zip(seconds[kind], seconds["plain"], strict=True))
        row = {"model": f"convolutions, batch {batch}", "layers": kind}
        row["step, CPU ms"] = 1e3 / steps * statistics.median(a[1] for a, _ in pairs)
        for position, clock in ((1, "CPU"), (0, "wall")):
            ratios = [a[position] / b[position] for a, b in pairs]
            row[f"ratio, {clock}"] = statistics.median(ratios)
        if kind == "stiefel":
            row["goal"], row["steps"] = 1.5, steps * (rounds + 1)
            held = models[kind].layers
            row["largest departure"] = max(
                v.departure_upper_bound() for v in held if hasattr(v, "departure_upper_bound")
            )
        rows.append(row)
    return rows


def _network(kind):
    """Convolutions 28×28×1 → 14×14×16 → 7×7×32 → 7×7×32, and a dense layer."""
    import keras

    from tf_lyapunov import layers, optimizers

    keras.utils.set_random_seed(0)
    cls = {"plain": keras.layers.Conv2D, "cayley": layers.CayleyConv2D}.get(
        kind, layers.OrthogonalConv2D
    )
    padding = {} if kind == "cayley" else {"padding": "same"}
    shapes = ((16, 3, 2), (32, 3, 2), (32, 3, 1))
    hidden = [cls(n, k, s, activation="relu", **padding) for n, k, s in shapes]
    last = [keras.layers.Flatten(), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((28, 28, 1)), *hidden, *last])
    optimizer = keras.optimizers.Adam(1e-3)
    if kind == "stiefel":
        optimizer = optimizers.Stiefel(optimizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    return model


def _flops(kind, batch):
    """Products of a step; of `Stiefel` without the squares, 0 where they are not counted."""
    plain = sum(2 * batch * m * n * (2 if i == 0 else 3) for i, (m, n) in enumerate(SHAPES))
    orthogonal = sum(4 * max(s) * min(s) ** 2 for s in SHAPES[:2])
    return {"plain": plain, "cayley": 0}.get(
        kind, plain + orthogonal * (1 + kind.endswith("gradients"))
    )


def _data(count):
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.standard_normal((count, 784)).astype("float32"), rng.integers(0, 10, count)


def _model(kind):
    import keras

    from tf_lyapunov import layers, optimizers

    keras.utils.set_random_seed(0)
    cls = {"plain": keras.layers.Dense, "cayley": layers.CayleyDense}.get(
        kind, layers.OrthogonalDense
    )
    hidden = [cls(256, "relu"), cls(128, "relu")]
    model = keras.Sequential([keras.Input((784,)), *hidden, keras.layers.Dense(10)])
    optimizer = keras.optimizers.Adam(1e-3)
    if kind.startswith("stiefel"):
        optimizer = optimizers.Stiefel(optimizer, project_gradients=kind.endswith("gradients"))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, steps_per_execution=5)
    return model


def _timed(model, x, y, batch):
    started = time.perf_counter(), time.process_time()
    model.fit(x, y, batch_size=batch, shuffle=False, verbose=0)
    return time.perf_counter() - started[0], time.process_time() - started[1]
