"""Bounds around an input: radii on the reference networks, beside plain CROWN.

MNIST / 255, Adam 1e-3, batches of 128, three epochs, cross-entropy on logits, seed 0; the first
test images, one thread. Efforts, weights and limits of the search were chosen on the last 5,000
training images alone; test images are seen in this benchmark and nowhere else. `crown` is a plain
implementation of its own: dense and convolution layers as matrices, triangle relaxations, no balls
after the input, no search.

`properties`: shares of test images whose class on an l∞ ball within [0, 1] is proved, refuted or
unknown after at most `SECONDS` each, wall clock.
"""

import statistics
import time

TITLE = "Radii by bounds around each input (median l2, CPU seconds an image)"
SETTINGS = "chosen on the last 5,000 training images; figures on the first test images"
EPOCHS, IMAGES, QUICK = 3, 10, 3
_STEPS = 14
# Properties: network, radii, images, and seconds an image.
_STATUSES = "PROVED", "REFUTED", "UNKNOWN"
VERIFIED, EPSILONS, PROPERTIES, SECONDS = "784-256-128-10", (0.01, 0.02, 0.03), 20, 10.0


def networks():
    """Builders by name."""
    from keras import layers as L

    def conv(filters, size):
        return L.Conv2D(filters, size, strides=2, padding="same", activation="relu")

    return {
        "784-16-10": lambda: [L.Flatten(), L.Dense(16, "relu"), L.Dense(10)],
        "784-256-128-10": lambda: [
            L.Flatten(), L.Dense(256, "relu"), L.Dense(128, "relu"), L.Dense(10),
        ],
        "conv 16-32, 100, 10": lambda: [
            conv(16, 4), conv(32, 4), L.Flatten(), L.Dense(100, "relu"), L.Dense(10),
        ],
    }  # fmt: skip


def trained(build, x, y, epochs):
    """One network after plain training."""
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((28, 28, 1)), *build()])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss)
    model.fit(x, y, batch_size=128, epochs=epochs, verbose=0)
    return model


def measure(quick, data_dir=None):
    """Radii and seconds of every network, or why there are none."""
    import numpy as np

    from benchmarks.data import _data_dir
    from tf_lyapunov import datasets

    try:
        data = datasets.load("mnist", data_dir=data_dir or _data_dir())
    except ValueError as error:
        return {"rows": [{"network": "none", "skipped": f"no MNIST: {error}"}]}
    half = np.float32(0.5)  # data sets are centred
    x = np.concatenate([data.x_train, data.x_val]) + half
    y = np.concatenate([data.y_train, data.y_val]).astype("int64")
    images = np.asarray(data.x_test[: QUICK if quick else IMAGES]) + half
    rows, shares = [], []
    for name, build in networks().items():
        model = trained(build, x, y, 1 if quick else EPOCHS)
        rows.append({"network": name, **compared(model, images)})
        if name == VERIFIED:
            count = QUICK if quick else PROPERTIES
            given = np.asarray(data.x_test[:count]) + half, np.asarray(data.y_test[:count])
            shares = properties(model, *given)
    return {"settings": SETTINGS, "rows": rows, "properties": shares}


def properties(model, images, labels, epsilons=EPSILONS, seconds=SECONDS):
    """Shares of images by what was found of their class on the l∞ ball of every radius."""
    import tf_lyapunov as tfl

    found = []
    for epsilon in epsilons:
        results = [
            tfl.verify_property(
                model,
                tfl.Region.ball(image, epsilon, "linf", bounds=(0, 1)),
                tfl.Property.classified_as(int(label)),
                timeout=seconds,
            )
            for image, label in zip(images, labels, strict=True)
        ]
        statuses = [result.status for result in results]
        shares = {s.lower(): statuses.count(s) / len(statuses) for s in _STATUSES}
        spent = [result.seconds for result in results]
        row = {"network": VERIFIED, "linf": epsilon, "images": len(results), **shares}
        found.append({**row, "median s": statistics.median(spent), "most s": max(spent)})
    return found


def compared(model, images):
    """Medians of the methods on one network."""
    import numpy as np

    import tf_lyapunov as tfl
    from tf_lyapunov.attacks import DDN
    from tf_lyapunov.local.flow import flow_of
    from tf_lyapunov.local.radii import Prover, margin_rows
    from tf_lyapunov.program.network import read_network

    product = tfl.certify(model, images)
    flow = flow_of(read_network(model, bounded=False))
    prover, linear, seconds = Prover(flow), [], []
    plain, plain_seconds = [], []
    layers = matrices(flow, images[0])
    for image, label in zip(images, product.labels, strict=True):
        rows = margin_rows(10, int(label))
        begin = time.process_time()
        linear.append(prover.radius(image.astype(np.float64), rows, lambda r: 0.0).radius)
        seconds.append(time.process_time() - begin)
        begin = time.process_time()
        plain.append(crown_radius(layers, image.astype(np.float64).ravel(), rows))
        plain_seconds.append(time.process_time() - begin)
    found = DDN(steps=200)(model, images, product.labels)
    smallest = np.where(found.success, found.distance, np.nan)
    return {
        "product": float(np.median(product.radius)),
        "crown": statistics.median(plain),
        "linear": statistics.median(linear),
        "smallest found (DDN)": float(np.nanmedian(smallest)),
        "linear / crown": statistics.median(linear) / max(statistics.median(plain), 1e-9),
        "found / linear, least": float(np.nanmin(smallest / np.array(linear))),
        "crown, s": statistics.fmean(plain_seconds),
        "linear, s": statistics.fmean(seconds),
    }


def matrices(flow, image):
    """`(W, b)` of every linear part between the activations, by running it on unit vectors."""
    import numpy as np

    from tf_lyapunov.local import maps
    from tf_lyapunov.local.flow import trace

    traced = trace(flow, image)
    found, matrix, shift = [], None, None
    for k, link in enumerate(flow.links, 1):
        before = traced.values[k - 1].shape[1:]
        if maps.is_linear(link.operation):
            if matrix is None:
                size = int(np.prod(before))
                matrix, shift = np.eye(size), np.zeros(size)
            zero = maps.applied(link.operation, [shift.reshape(1, *before)]).reshape(-1)
            moved = maps.applied(link.operation, [(shift + matrix).reshape(-1, *before)])
            matrix, shift = moved.reshape(len(matrix), -1) - zero, zero
        else:
            found.append((matrix.T, shift))
            matrix = None
    return [*found, (matrix.T, shift)]


def crown_margins(layers, x, radius, rows):
    """CROWN's lower bounds of `rows` of the logits on the l2 ball, boxes by CROWN too."""
    import numpy as np

    def lower(rows, depth, boxes):
        c, constant = rows @ layers[depth][0], rows @ layers[depth][1]
        for (weight, bias), (low, high) in zip(layers[:depth][::-1], boxes[::-1], strict=True):
            width = np.maximum(high - low, 1e-12)
            above = np.where(low >= 0, 1.0, np.where(high <= 0, 0.0, high / width))
            below = np.where(low >= 0, 1.0, np.where(high <= 0, 0.0, high > -low))
            rest = np.where((low < 0) & (high > 0), -low * high / width, 0.0)
            constant = constant + np.minimum(c, 0) @ rest
            c = np.where(c < 0, c * above, c * below)
            constant, c = constant + c @ bias, c @ weight
        return constant + c @ x - radius * np.linalg.norm(c, axis=1)

    boxes = []
    for depth in range(len(layers) - 1):
        eye = np.eye(len(layers[depth][1]))
        boxes.append((lower(eye, depth, boxes), -lower(-eye, depth, boxes)))
    return lower(rows, len(layers) - 1, boxes)


def crown_radius(layers, x, rows):
    """The largest radius at which CROWN's margins are positive, by bisection."""
    low, high = 0.0, 2.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if crown_margins(layers, x, middle, rows).min() > 0:
            low = middle
        else:
            high = middle
    return low


def rows(section):
    """The table."""
    return [*section["rows"], *section.get("properties", [])]
