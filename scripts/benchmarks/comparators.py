"""Time of an epoch by training method against plain training, interleaved in one run.

All but L2NN train one small residual network, with the method's own constraints; L2NN trains its
own, of the same filters and widths, and its constraints alone are shown apart. Rounds, ratios and
CPU seconds are those of `overhead`.
"""

TITLE = "An epoch by training method / plain training"

RADIUS, STEPS = 0.1, 10
FILTERS, WIDTH = 16, 64
BATCH = 128


def measure(quick):
    """Ratios of every method to plain training of the same network."""
    from benchmarks.data import mnist_or_digits
    from benchmarks.overhead import _epochs, _rows

    x, y, source = mnist_or_digits()
    count = BATCH * (2 if quick else 12)
    shape = "x".join(map(str, x.shape[1:]))
    methods = {name: (method(x.shape[1:]), []) for name, method in _methods().items()}
    seconds = _epochs(methods, x[:count], y[:count], 2 if quick else 7)
    return {
        "network": f"residual CNN {shape}, {FILTERS} filters ({source}), batch {BATCH}",
        "attack": f"l∞ {RADIUS}, {STEPS} steps",
        "rows": _rows("", seconds),
    }


def rows(section):
    """The table: methods and what they cost."""
    names = {"variant": "method", "CPU s": "CPU s", "ratio, CPU": "ratio", "least CPU": "least",
             "most CPU": "most", "ratio, wall": "ratio, wall"}  # fmt: skip
    return [{names[key]: row[key] for key in names} for row in section["rows"]]


def _methods():
    """Dict from names to functions from an input shape to a compiled model."""
    from tf_lyapunov.attacks import FGM, PGD
    from tf_lyapunov.constraints import ParsevalFrame
    from tf_lyapunov.theory.balls import Linf
    from tf_lyapunov.training import AdversarialModel, LaplacianModel, NonexpansiveModel, l2nn

    pgd = PGD(Linf(RADIUS), steps=STEPS, random_start=True)
    relus = [f"relu_{i}" for i in range(3)]

    def frame(linear, size):
        return ParsevalFrame()

    def l2nn_of(shape, penalty):
        return l2nn(shape, 10, filters=(FILTERS, FILTERS), widths=(WIDTH,), penalty=penalty)

    return {
        "plain": lambda s: _compiled(_network(s)),
        "Parseval (P)": lambda s: _compiled(_network(s, frame, average=True)),
        "Laplacian (L)": lambda s: _compiled(LaplacianModel(_network(s), relus)),
        "P+L": lambda s: _compiled(LaplacianModel(_network(s, frame, average=True), relus)),
        "spectral bound 1": lambda s: _compiled(_network(s, _bound)),
        "L2NN": lambda s: _compiled(NonexpansiveModel(l2nn_of(s, 1e-3), distance=0.1)),
        "L2NN's network, cross-entropy": lambda s: _compiled(l2nn_of(s, 0.0)),
        "FGM": lambda s: _compiled(AdversarialModel(_network(s), FGM(Linf(RADIUS)))),
        f"PGD-{STEPS}": lambda s: _compiled(AdversarialModel(_network(s), pgd)),
        f"TRADES-{STEPS}": lambda s: _compiled(AdversarialModel(_network(s), pgd, trades_beta=6.0)),
        f"PGD-{STEPS} + spectral": lambda s: _compiled(AdversarialModel(_network(s, _bound), pgd)),
    }


def _bound(linear, size):
    from tf_lyapunov.constraints import SpectralBound

    if linear == "dense":
        return SpectralBound(1.0)
    return SpectralBound(1.0, input_shape=size, strides=1, padding="same")


def _network(shape, constraint=lambda linear, size: None, average=False):
    """Two residual blocks, a pooling after each, and two dense layers; the same initial weights."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)

    def convolution(h):
        bound = constraint("convolution", tuple(h.shape[1:3]))
        return layers.Conv2D(FILTERS, 3, padding="same", kernel_constraint=bound)(h)

    inputs = keras.Input(shape)
    h = inputs
    for block in range(2):
        h = convolution(h)
        branch = convolution(layers.ReLU(name=f"relu_{block}")(h))
        h = (layers.Average() if average else layers.Add())([h, branch])
        h = layers.AveragePooling2D(2)(h)
    h = layers.Dense(WIDTH, kernel_constraint=constraint("dense", None))(layers.Flatten()(h))
    h = layers.ReLU(name="relu_2")(h)
    return keras.Model(inputs, layers.Dense(10, kernel_constraint=constraint("dense", None))(h))


def _compiled(model):
    import keras

    from tf_lyapunov.training import NonexpansiveModel

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        keras.optimizers.Adam(1e-3), None if isinstance(model, NonexpansiveModel) else loss
    )
    return model
