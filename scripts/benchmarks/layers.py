"""Cost of Lipschitz layers beside plain ones of the same shape, all families, in one run.

Training: an epoch of Adam steps of batch 128 (and 1024), each variant's against plain Keras' in
rotating order. Inference: `predict` with cached weights, and after `condense`. CPU seconds count
all cores and leave out what the machine's other guests take. "Plain" is the same network of
`keras.layers.Dense` or `Conv2D`, with ReLU; for potential layers, which apply every matrix twice
(Wᵀ, then W), "plain" is the residual network x - W relu(Wᵀx + b) of the same matrices.

What a step of the MLP 784-256-128-10 must compute at batch 128, in 10⁶ flops (products alone,
in·units·batch·2 each; m = 784, n = 256 for the large layer, the small one in brackets):

    plain               forward 60, gradients 69                                  129
    frobenius           + nothing: three passes over W
    spectral            + WᵀW 2mn² = 103, three squarings 2n³ = 34 each           + 203 (21)
    almost_orthogonal   + WᵀW 103, its gradient 103                               + 206 (17)
    cayley              + VᵀV 69, inverse 33, its Newton step 67, VR 69, QᵀQ 103;
                          gradients 69, 67, 138                                   + 615 (50)
    sandwich            + as cayley with V of 784 rows, second map 3·17           + 870 (90)
    bjorck              + WᵀW 103, bounds 4·34, five steps 3·34, WP 103, XᵀX 103,
                          XC 3·17; gradients 206                                  + 1200 (130)
    plain residual      forward 119, gradients 187                                306
    convex_potential    + 2·(WᵀW 34 + 3·34)                                       + 268
    sdp                 + 2·(WᵀW 34, its gradient 34)                             + 134

Products of n columns run at up to twice the rate of those of a batch, and an Adam step reads and
writes all weights: a step with as many flops again costs 1.5 to 2 times as much. Within 1.5 lie
therefore the families that add no more than about half of their own network's flops, or none;
orthogonalising at every step adds five to ten times these. The share falls as 1/batch.

Norms are exact at every step. Between exact norms the bound ‖W‖ ≤ bound(W₀) + ‖W - W₀‖_F would
hold too, but Adam at the rate 10⁻³ moves W by up to 10⁻³√(mn) = 0.45 a step, 23% of σ(W) = 1.9.

deel-lip needs legacy Keras, hence another environment: name its Python in `DEEL_LIP_PYTHON`.
"""

import json
import os
import statistics
import subprocess
import time

TITLE = "An epoch, and inference, of Lipschitz layers / plain Keras"
BATCH, LARGE = 128, 1024
WIDTHS = (256, 128)
CHANNELS = (32, 64)
IMAGE = (16, 16, 16)
# Width of the potential networks: they keep it.
POTENTIAL = 256
FAMILIES = (
    "plain", "spectral", "frobenius", "almost_orthogonal", "bjorck", "cayley", "skew", "sandwich",
    "plain residual", "convex_potential", "sdp",
)  # fmt: skip


def measure(quick):
    """Ratios of all families, dense and convolutional; deel-lip's, where it is installed."""
    rows = []
    for kind, batch, steps, rounds in (
        ("MLP", BATCH, 100, 9), ("MLP", LARGE, 15, 5), ("conv", BATCH, 10, 5)
    ):  # fmt: skip
        models = {name: _model(kind, name) for name in FAMILIES}
        models = {name: model for name, model in models.items() if model is not None}
        x, y = _data(models["plain"].input_shape[1:], batch * (10 if quick else steps))
        found = _seconds(models, x, y, batch, 2 if quick else rounds)
        condensed = _condensed_seconds(models, x, batch, 2 if quick else rounds)
        rows += _rows(f"{kind}, batch {batch}", *found, condensed)
    return {"rows": rows, "deel_lip": _deel_lip(quick)}


def rows(section):
    """The table; deel-lip's ratios are those to its own plain network."""
    deel = section["deel_lip"]
    return section["rows"] + (deel["rows"] if "rows" in deel else [{"model": deel["skipped"]}])


def _layers(kind, name):
    """`(cls, plain residual?)` of a family, or None where it has no such layer."""
    from tf_lyapunov import layers

    pairs = {
        "spectral": ("SpectralDense", "SpectralConv2D"),
        "frobenius": ("FrobeniusDense", None),
        "almost_orthogonal": ("AlmostOrthogonalDense", "AlmostOrthogonalConv2D"),
        "bjorck": ("BjorckDense", None),
        "cayley": ("CayleyDense", "CayleyConv2D"),
        "skew": (None, "SkewOrthogonalConv2D"),
        "sandwich": ("SandwichDense", "SandwichConv2D"),
        "convex_potential": ("ConvexPotentialDense", "ConvexPotentialConv2D"),
        "sdp": ("SDPLipschitzDense", "SDPLipschitzConv2D"),
    }
    found = pairs[name][kind == "conv"]
    return None if found is None else getattr(layers, found)


def _model(kind, name):
    """Two layers of a family between the input and ten logits, compiled; None if there are none."""
    import keras

    plain = {"plain": "plain", "plain residual": "residual"}.get(name)
    cls = None if plain else _layers(kind, name)
    if plain is None and cls is None:
        return None
    keras.utils.set_random_seed(0)
    shape = (784,) if kind == "MLP" else IMAGE
    x = inputs = keras.Input(shape)
    if name in ("plain residual", "convex_potential", "sdp"):
        width = POTENTIAL if kind == "MLP" else CHANNELS[0]
        if kind == "MLP":
            x = keras.layers.Dense(width)(x)
        else:
            x = keras.layers.Conv2D(width, 1)(x)
        for _ in range(2):
            x = _residual(kind, width)(x) if plain else cls(**_kernel(kind))(x)
    else:
        for width in WIDTHS if kind == "MLP" else CHANNELS:
            arguments = {**_kernel(kind), "activation": "relu"}
            if plain:
                cls = keras.layers.Dense if kind == "MLP" else keras.layers.Conv2D
            if plain and kind == "conv":
                arguments["padding"] = "same"
            x = cls(width, **arguments)(x)
    x = keras.layers.Flatten()(x) if kind == "MLP" else keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(10)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, steps_per_execution=5)
    return model


def _kernel(kind):
    return {} if kind == "MLP" else {"kernel_size": 3}


def _residual(kind, width):
    """x - W relu(Wᵀx + b) without any bound."""
    import keras
    from keras import ops

    class Residual(keras.layers.Layer):
        def build(self, shape):
            taps = () if kind == "MLP" else (3, 3)
            self.kernel = self.add_weight(name="kernel", shape=(*taps, width, width))
            self.bias = self.add_weight(name="bias", shape=(width,))

        def call(self, x):
            if kind == "MLP":
                hidden = ops.relu(ops.matmul(x, self.kernel) + self.bias)
                return x - ops.matmul(hidden, ops.transpose(self.kernel))
            hidden = ops.relu(ops.conv(x, self.kernel, padding="same") + self.bias)
            turned = ops.swapaxes(ops.flip(self.kernel, axis=(0, 1)), -1, -2)
            return x - ops.conv(hidden, turned, padding="same")

        def compute_output_shape(self, shape):
            return shape

    return Residual()


def _data(shape, count):
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, *shape)).astype("float32")
    return x, rng.integers(0, 10, len(x))


def _seconds(models, x, y, batch, rounds):
    """Dicts from names to `[(wall, CPU)]` of epochs and of predictions, one entry per round."""
    from tf_lyapunov.layers import refresh

    epochs, predictions = {n: [] for n in models}, {n: [] for n in models}
    names = list(models)
    for attempt in range(rounds + 1):
        for name in names[attempt % len(names) :] + names[: attempt % len(names)]:
            model = models[name]
            fit = _timed(lambda m=model: m.fit(x, y, batch_size=batch, shuffle=False, verbose=0))
            refresh(model)
            predict = _timed(lambda m=model: m.predict(x, batch_size=batch, verbose=0))
            if attempt:  # the first compiles
                epochs[name].append(fit)
                predictions[name].append(predict)
    return epochs, predictions


def _condensed_seconds(models, x, batch, rounds):
    """As the predictions of `_seconds`, with the weights fixed: nothing is compared any more."""
    from tf_lyapunov.layers.condensing import condense

    seconds, names = {n: [] for n in models}, list(models)
    for model in models.values():
        condense(model)
    for attempt in range(rounds + 1):
        for name in names[attempt % len(names) :] + names[: attempt % len(names)]:
            timed = _timed(lambda m=models[name]: m.predict(x, batch_size=batch, verbose=0))
            if attempt:
                seconds[name].append(timed)
    return seconds


def _timed(action):
    started = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def _rows(kind, epochs, predictions, condensed):
    """Medians of the rounds' ratios to the plain network of the same shape."""
    found = []
    for name in epochs:
        residual = name in ("plain residual", "convex_potential", "sdp")
        base = "plain residual" if residual else "plain"
        row = {"model": kind, "layers": name, "to": base}
        measured = {"epoch": epochs, "predict": predictions, "condensed predict": condensed}
        for what, seconds in measured.items():
            row[f"{what}, CPU s"] = statistics.median(s[1] for s in seconds[name])
            for position, clock in ((1, "CPU"), (0, "wall")):
                row[f"{what} ratio, {clock}"] = statistics.median(
                    a[position] / b[position]
                    for a, b in zip(seconds[name], seconds[base], strict=True)
                )
        found.append(row)
    return found


_DEEL_LIP = """
import json, sys, time
import numpy as np, tensorflow as tf
from deel.lip import layers
keras = layers.SpectralDense.__mro__[1].__module__.split(".")[0]
K = __import__("tf_keras") if keras == "tf_keras" else tf.keras
x = np.random.default_rng(0).normal(size=(128 * int(sys.argv[1]), 784)).astype("float32")
y = np.random.default_rng(1).integers(0, 10, len(x))
def model(cls):
    m = K.Sequential([K.Input((784,)), cls(256), K.layers.ReLU(), cls(128), K.layers.ReLU(),
                      K.layers.Dense(10)])
    m.compile("adam", K.losses.SparseCategoricalCrossentropy(from_logits=True))
    return m
models = {"plain": model(K.layers.Dense), "SpectralDense": model(layers.SpectralDense)}
found = {n: [] for n in models}
for attempt in range(4):
    for n, m in models.items():
        t = time.process_time()
        m.fit(x, y, batch_size=128, verbose=0)
        if attempt: found[n].append(time.process_time() - t)
print(json.dumps(found))
"""


def _deel_lip(quick):
    """Its Björck-orthogonal dense layers against its own Keras' dense ones."""
    python = os.environ.get("DEEL_LIP_PYTHON")
    if not python:
        return {
            "skipped": "deel-lip not measured: it needs an environment with legacy Keras "
            "(DEEL_LIP_PYTHON)"
        }
    command = [python, "-c", _DEEL_LIP, "10" if quick else "100"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if result.returncode:
        last = (result.stderr.strip() or "no message").splitlines()[-1][:200]
        return {"skipped": f"deel-lip not measured: {last}"}
    seconds = json.loads(result.stdout.strip().splitlines()[-1])
    ratios = [a / b for a, b in zip(seconds["SpectralDense"], seconds["plain"], strict=True)]
    cpu = statistics.median(seconds["SpectralDense"])
    row = {"model": f"MLP, batch {BATCH}", "layers": "deel-lip SpectralDense", "to": "legacy Dense"}
    return {"rows": [{**row, "epoch, CPU s": cpu, "epoch ratio, CPU": statistics.median(ratios)}]}
