"""Experiments of `perturbation/rebuild.py`: random and trained classifiers, and LeNet-5."""

from __future__ import annotations

import csv

import keras
import numpy as np
from keras import ops

from tf_lyapunov import datasets
from tf_lyapunov.attacks import DDN, FMN, DeepFool, Ensemble, MinimalFGS, MinimalFGV
from tf_lyapunov.certification.perturbation import minimal_perturbation_lower_bound
from tf_lyapunov.evaluation.bracket import UnsoundBound, bracket
from tf_lyapunov.experiments import checkpoints
from tf_lyapunov.layers import LocalResponseNormalization
from tf_lyapunov.theory import perturbation as theory
from tf_lyapunov.theory.balls import L2, Linf
from tf_lyapunov.training.perturbation import OutputMarginModel

# Table 3.1: inputs, classes, their interval, the parameters', and mean, median, std as published.
LINEAR = (
    (2, 5, 1, 1, (0.9283, 0.8637, 0.5557648)),
    (20, 5, 1, 1, (3.783, 3.782, 0.5845007)),
    (2, 50, 1, 1, (1.015, 0.9544, 0.5454238)),
    (2, 5, 10, 1, (4.937, 4.498, 2.636395)),
    (2, 5, 1, 10, (1.061, 1.076, 0.5375943)),
)
# Table 4.2: samples, inputs, MLPs, layers, units, classes, the intervals, and as published.
MLPS = (
    (10, 2, 100, 3, 10, 5, 1, 1, (0.6322801, 0.5546744, 0.3358796)),
    (10, 2, 100, 3, 10, 5, 100, 1, (0.6404704, 0.5849356, 0.4163827)),
    (10, 2, 100, 3, 10, 5, 1, 100, (0.4335774, 0.3039111, 0.4211190)),
    (10, 20, 100, 3, 10, 5, 1, 1, (1.1928828, 0.9919565, 0.9066600)),
    (10, 2, 100, 3, 30, 5, 1, 1, (0.6533218, 0.6304373, 0.3057876)),
    (10, 2, 100, 3, 10, 50, 1, 1, (0.6276122, 0.6120808, 0.2672927)),
    (10, 2, 100, 6, 20, 5, 1, 1, (0.6630859, 0.6050979, 0.2996120)),
    (100, 2, 10, 3, 10, 5, 10, 1, (0.6561273, 0.6170216, 0.3212896)),
)
# Table 4.3: hidden widths, and mean, median, std, min, max of the deviations as published.
TRAINED = {
    "Iris": ((5,), (0.7153, 0.5579, 0.4791929, 0.002236, 1.675)),
    "Wine": ((5, 3), (1.263, 1.131, 0.775758, 0.01861, 3.237)),
    "Spambase": ((7, 5, 3), (3.413, 3.083, 1.499317, 0.1446, 7.514)),
}
# Tables 5.2 and 5.3: ε of FGS on [0, 255]: accuracy, mean, median, rate.
LENETS = {
    "LeNet-5": ((), (None, 26.72, 25.34, 0.9994)),
    "LeNet-LRN1": ((1,), (0.9876, 25.31045, 21.88714, 0.9836)),
    "LeNet-LRN2": ((2,), (0.9848, 24.92861, 19.62794, 0.9552)),
    "LeNet-LRN3": ((1, 2), (0.9894, 25.76302, 20.96658, 0.9694)),
}
# Tables 5.1 and 5.2 for CIFAR-NIN: accuracy, mean, median, rate.
NIN = (None, 5.783, 3.093, 0.9304)


def statistics(values):
    """Mean, median, standard deviation, least, greatest and count of the finite values."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    names = ("mean", "median", "std", "min", "max")
    return {
        **{name: float(getattr(np, name)(values)) for name in names},
        "count": len(values),
    }


class Family(keras.layers.Layer):
    """Many classifiers in one: the last entry of the input, without gradient, says which."""

    def __init__(self, weights, biases):
        super().__init__()
        self.arrays = [
            tuple(self.add_weight(v.shape, keras.initializers.Constant(v), trainable=False)
                  for v in pair)
            for pair in zip(weights, biases, strict=True)
        ]  # fmt: skip

    def call(self, x):
        which = ops.cast(ops.stop_gradient(x[:, -1]), "int32")
        h = x[:, :-1]
        for number, (weight, bias) in enumerate(self.arrays):
            h = ops.tanh(h) if number else h
            h = ops.einsum("ni,nio->no", h, ops.take(weight, which, axis=0))
            h = h + ops.take(bias, which, axis=0)
        return h


def logits_and_jacobian(x, weights, biases):
    """Float64 logits of one tanh MLP (n, K), and norms of the Jacobian before its output layer."""
    h, jacobian = x, np.broadcast_to(np.eye(x.shape[1]), (len(x), x.shape[1], x.shape[1]))
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        h = np.tanh(h @ weight + bias)
        jacobian = (1 - h**2)[:, :, None] * (weight.T @ jacobian)
    norms = np.linalg.norm(jacobian, 2, axis=(1, 2)) * (1 + 1e-9)
    return h @ weights[-1] + biases[-1], norms


def lower_bounds(x, weights, biases):
    """`(sound, published)` bounds of one tanh MLP, and its decisions."""
    logits, norms = logits_and_jacobian(x, weights, biases)
    labels = logits.argmax(axis=1)
    kappa = theory.output_lower_bound(logits, weights[-1], labels)
    if len(weights) == 1:
        return kappa, kappa, labels
    hidden = [w.T for w in weights[:-1]]
    bends, gain = theory.hessian_norm_bounds(hidden, [theory.Curvature.of("tanh")] * len(hidden))
    sound = theory.smooth_lower_bound(kappa, norms, float(np.linalg.norm(bends)) * (1 + 1e-9), gain)
    pairs = [theory.CURVATURES_AS_PUBLISHED["tanh"]] * len(hidden)
    bend = theory.second_derivative_bound_as_published(hidden, pairs)
    return sound, theory.dense_bound_as_published(kappa, norms, bend, len(hidden[-1])), labels


def random_classifiers(widths, count, samples, interval, parameters, steps, seed):
    """One row of Table 3.1 or 4.2: random classifiers on random inputs.

    Returns:
        Statistics of FGS/FGV minus the published bound (the paper's) and of the smallest found
        minus the sound bound; how often something was found below each.
    """
    rng = np.random.default_rng(seed)

    def draw(shape):
        return rng.uniform(-parameters, parameters, (count, *shape)).astype("float32")

    pairs = list(zip(widths, widths[1:], strict=False))
    weights, biases = [draw(pair) for pair in pairs], [draw((b,)) for _, b in pairs]
    x = rng.uniform(-interval, interval, (count, samples, widths[0])).astype("float32")
    networks = [
        [[part[i].astype(np.float64) for part in parts] for parts in (weights, biases)]
        for i in range(count)
    ]
    bounds = [lower_bounds(x[i].astype(float), *networks[i]) for i in range(count)]
    sound, published, labels = (np.concatenate(part) for part in zip(*bounds, strict=True))
    inputs = keras.Input((widths[0] + 1,))
    model = keras.Model(inputs, Family(weights, biases)(inputs))
    which = np.repeat(np.arange(count, dtype="float32"), samples)
    rows = np.column_stack([x.reshape(count * samples, -1), which])
    paper = Ensemble(first_order())(model, rows, labels)
    best = Ensemble({"FGV": MinimalFGV(), "DeepFool": DeepFool(), "DDN": DDN(steps=steps)})(
        model, rows, labels
    )
    found = np.fmin(paper.distance, best.distance)
    nearest = np.where((best.distance <= paper.distance)[:, None] | ~paper.success[:, None],
                       best.x_adv, paper.x_adv)  # fmt: skip
    if np.any(nearest[:, -1] != which):
        raise RuntimeError("An attack changed which classifier it attacks.")
    exact = np.concatenate([
        logits_and_jacobian(nearest[which == i, :-1].astype(float), *networks[i])[0].argmax(axis=1)
        for i in range(count)
    ])  # fmt: skip
    ok = np.isfinite(found) & (found > 0)
    # Float32 sees a change a little before exact arithmetic does, which the bounds are about.
    confirmed = ok & (exact != labels)
    deviations = np.where(paper.success & (paper.distance > 0), paper.distance - published, np.nan)
    full_step = np.abs(np.sqrt(widths[0]) - published)
    return {
        "FGS with ε = 1": statistics(full_step),
        "as the paper": statistics(deviations),
        "best - sound": statistics(np.where(ok, found - sound, np.nan)),
        "best / sound": statistics(np.where(ok & (sound > 0), found / sound, np.nan)),
        "inputs": len(found),
        "found": int(ok.sum()),
        "below published": int(np.sum(confirmed & (found < published))),
        "below sound": int(np.sum(confirmed & (found < sound))),
    }, deviations


def first_order(norm=L2, limit=None):
    return {"FGS": MinimalFGS(norm, limit=limit), "FGV": MinimalFGV(norm, limit=limit)}


def every_attack(steps):
    return {
        **first_order(),
        "DeepFool": DeepFool(),
        "DDN": DDN(steps=steps),
        "FMN": FMN(L2, steps=steps),
    }


def table_data(name, spambase=None):
    """Standardised inputs and classes of one of the three data sets."""
    if name == "Spambase":
        with open(spambase, newline="") as file:
            rows = [row for row in csv.reader(file) if row]
        start = 0 if _is_number(rows[0][0]) else 1
        table = np.array(rows[start:], dtype=np.float64)
        x, y = table[:, :-1], table[:, -1].astype(int)
    else:
        from sklearn.datasets import load_iris, load_wine

        x, y = {"Iris": load_iris, "Wine": load_wine}[name](return_X_y=True)
    return ((x - x.mean(axis=0)) / x.std(axis=0)).astype("float32"), y


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def tanh_mlp(widths, seed=0):
    keras.utils.set_random_seed(seed)
    hidden = [keras.layers.Dense(w, "tanh") for w in widths[1:-1]]
    return keras.Sequential([keras.Input((widths[0],)), *hidden, keras.layers.Dense(widths[-1])])


def fitted(model, x, y, epochs, wrap=None, rate=0.01):
    trained = model if wrap is None else wrap(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trained.compile(keras.optimizers.Adam(rate), loss, jit_compile=False)
    trained.fit(x, y, batch_size=32 if len(x) < 1000 else 128, epochs=epochs, verbose=0)
    return model


def fitted_by_epochs(model, x, y, epochs, folder, identity, rate=1e-3):
    """Trains as `fitted`, printing each epoch; an interrupted run continues after its last one."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"], jit_compile=False)
    batches = datasets.Batches(x, y, batch_size=128)
    checkpoint, messages = checkpoints.newest_checkpoint(folder)
    for message in messages:
        print(message, flush=True)
    done = 0
    if checkpoint is not None and checkpoint.identity == identity:
        checkpoints.restore(model, checkpoint)
        done = checkpoint.epoch
        print(f"continues after epoch {done}", flush=True)
    for epoch in range(done, epochs):
        model.fit(
            batches,
            shuffle=False,  # they are shuffled, as a function of the epoch
            initial_epoch=epoch,
            epochs=epoch + 1,
            verbose=2,
            callbacks=[batches.epoch_callback()],
        )
        state = checkpoints.snapshot(model, epoch + 1, [], {}, identity)
        checkpoints.write_checkpoint(folder, state)
    return model


def split(x, y, seed=0):
    """Training (70%), test (20%) and validation rows."""
    order = np.random.default_rng(seed).permutation(len(x))
    a, b = int(0.7 * len(x)), int(0.9 * len(x))
    return [(x[rows], y[rows]) for rows in (order[:a], order[a:b], order[b:])]


def accuracy(model, x, y):
    return float(np.mean(np.argmax(model.predict(x, verbose=0, batch_size=512), axis=1) == y))


def trained_row(name, spambase, epochs, steps, limit=None):
    """Table 4.3 for one data set: a trained network and the bracket of its correct inputs."""
    x, y = table_data(name, spambase)
    train, test, _ = split(x, y)
    widths = (x.shape[1], *TRAINED[name][0], len(np.unique(y)))
    model = fitted(tanh_mlp(widths), *train, epochs)
    x, y = x[:limit], y[:limit]
    if name == "Spambase" and limit is not None:
        x, y = test[0][:limit], test[1][:limit]
    found = bracket(model, x, y, attacks=every_attack(steps), rules="published", time_budget=0)
    paper = Ensemble(first_order())(model, x, y)
    ok = paper.success & (paper.distance > 0)
    deviations = np.where(ok, paper.distance - found.published, np.nan)
    row = {
        "net": "-".join(map(str, widths)),
        "epochs": epochs,
        "inputs": len(x),
        "test accuracy": accuracy(model, *test),
        "as the paper": statistics(deviations),
        "best - sound": statistics(np.where(found.found, found.deviation, np.nan)),
        "bracket": found.summary(),
        "around": around(model, x, y, found, 200, 1.0),
    }
    return row, deviations, found


def around(model, x, y, found, count, seconds):
    """What relaxations on balls add to the bracket of the first inputs with both sides.

    Args:
        model, x, y: the network and the bracket's inputs.
        found: `Bracket` by the rules of layers alone.
        count, seconds: inputs at most, and seconds for each.
    """
    rows = np.flatnonzero(found.found)[:count]
    proved = minimal_perturbation_lower_bound(
        model, x[rows], found.labels[rows], time_budget=seconds * len(rows)
    )
    before, upper = found.lower[rows], found.upper[rows]
    after = np.maximum(before, proved.bound)
    if np.any(after > upper):
        raise UnsoundBound("A perturbation was found below a bound by relaxations.", rows, after,
                           upper)  # fmt: skip
    columns = {"layers": before, "relaxations": after, "smallest found": upper,
               "found / layers": upper / before, "found / relaxations": upper / after}  # fmt: skip
    quartiles = {k: np.quantile(v, (0.25, 0.5, 0.75)).tolist() for k, v in columns.items()}
    return {"inputs": len(rows), "seconds": seconds, **quartiles}


def curve(name, spambase, weights, epochs, steps, decided):
    """Figure 4.3 for one data set: accuracy, error rate and perturbations by ℓ."""
    x, y = table_data(name, spambase)
    train, _, _ = split(x, y)
    widths = (x.shape[1], *TRAINED[name][0], len(np.unique(y)))
    probe, out = tanh_mlp(widths), []
    sample = np.random.default_rng(1).permutation(len(x))[:300]
    for weight in weights:
        wrap = None if not weight else lambda m, w=weight: OutputMarginModel(m, w, decided=decided)
        probe.set_weights(fitted(tanh_mlp(widths), *train, epochs, wrap).get_weights())
        # The paper changes the decision, right or wrong.
        limited = Ensemble(first_order(Linf, 1.0))(probe, x[sample])
        nearest = Ensemble({"FGV": MinimalFGV(), "DDN": DDN(steps=steps)})(probe, x[sample])
        sizes = nearest.distance[nearest.success]
        out.append({
            "weight": weight,
            "accuracy": accuracy(probe, x, y),
            "error rate": limited.success_rate,
            "found": float(np.median(sizes)) if len(sizes) else None,
            "sound bound": _median_bound(probe, x[sample]),
        })  # fmt: skip
    return out


def _median_bound(model, x):
    arrays = [w.astype(np.float64) for w in model.get_weights()]
    return float(np.median(lower_bounds(x.astype(float), arrays[::2], arrays[1::2])[0]))


def lenet(normalised, seed=0):
    """LeNet-5 as in Caffe, with LRN after the named pooling layers (AlexNet's constants)."""
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((28, 28, 1))]
    for number, filters in enumerate((20, 50), 1):
        layers += [keras.layers.Conv2D(filters, 5), keras.layers.MaxPooling2D(2)]
        if number in normalised:
            layers.append(LocalResponseNormalization(2, 2.0, 1e-4, 0.75))
    layers += [keras.layers.Flatten(), keras.layers.Dense(500, "relu"), keras.layers.Dense(10)]
    return keras.Sequential(layers)


def nin(seed=0):
    """CIFAR-NIN. The last 1×1 convolution follows the average, with which it commutes."""
    keras.utils.set_random_seed(seed)

    def block(side, *widths):
        sides = [side] + [1] * (len(widths) - 1)
        return [
            keras.layers.Conv2D(w, k, padding="same", activation="relu")
            for w, k in zip(widths, sides, strict=True)
        ]

    layers = [keras.Input((32, 32, 3)), *block(5, 192, 160, 96)]
    layers += [keras.layers.MaxPooling2D(3, 2, padding="same"), keras.layers.Dropout(0.5)]
    layers += block(5, 192, 192, 192)
    layers += [keras.layers.AveragePooling2D(3, 2, padding="same"), keras.layers.Dropout(0.5)]
    layers += [*block(3, 192, 192), keras.layers.AveragePooling2D(8), keras.layers.Flatten()]
    return keras.Sequential([*layers, keras.layers.Dense(10)])


def lenet_fitted(name, data, epochs):
    return fitted(lenet(LENETS[name][0]), data.x_train, data.y_train, epochs, rate=1e-3)


def scaled_kernels(model, x, scale=0.9):
    """Figure 5.12 measured: medians relative to the network without scaled kernels.

    The first n convolutions' kernels are scaled, and nothing else, as the paper assumes.
    """
    kernels = [y.kernel for y in model.layers if isinstance(y, keras.layers.Conv2D)]
    before, found = [np.array(ops.convert_to_numpy(k)) for k in kernels], []
    for n in range(len(kernels) + 1):
        for number, (kernel, value) in enumerate(zip(kernels, before, strict=True)):
            kernel.assign(scale * value if number < n else value)
        here = bracket(model, x, attacks={"DeepFool": DeepFool(), "DDN": DDN(steps=50)},
                       time_budget=0)  # fmt: skip
        ok = here.found
        found.append((float(np.median(here.lower[ok])), float(np.median(here.upper[ok]))))
    for kernel, value in zip(kernels, before, strict=True):
        kernel.assign(value)
    return [
        {"kernels": n, "sound bound": low / found[0][0], "found": high / found[0][1]}
        for n, (low, high) in enumerate(found)
    ]


def image_row(model, data, images, steps):
    """Tables 5.1 to 5.3 for one network; perturbations in units of grey levels 0 … 255."""
    right = np.argmax(model.predict(data.x_test, verbose=0, batch_size=512), axis=1) == data.y_test
    rows = np.flatnonzero(right)[:images]
    x, y = data.x_test[rows], data.y_test[rows]
    attacks = {"FGV": MinimalFGV(), "DeepFool": DeepFool(), "DDN": DDN(steps=steps)}
    found = bracket(model, x, y, attacks=attacks, rules="published", time_budget=0)
    fgs = MinimalFGS(Linf, limit=100 / 255)(model, x, y)
    pixels = x[0].size
    ok = found.found
    ratios = found.lower[ok] / found.published[ok]
    return {
        "accuracy": float(np.mean(right)),
        "training images": len(data.x_train),
        "images": len(x),
        "epsilon": statistics(255 * fgs.distance),
        "rate": fgs.success_rate,
        "per pixel": {
            "published bound": float(np.mean(255 * found.published)) / pixels,
            "sound bound": float(np.mean(255 * found.lower)) / pixels,
            "found by FGS": float(
                np.nanmean(np.linalg.norm((fgs.x_adv - x).reshape(len(x), -1), axis=1)[fgs.success])
            ) * 255 / pixels,
            "smallest found": float(np.mean(255 * found.upper[ok])) / pixels,
        },
        "sound / published": statistics(ratios),
        "found / published": statistics(found.upper[ok] / found.published[ok]),
        "found / sound": statistics(found.ratio[ok]),
        "bracket": found.summary(),
    }, found, x, 255 * fgs.distance, fgs  # fmt: skip


def mnist(data_dir, limit):
    return datasets.load("mnist", data_dir, limit=limit)
