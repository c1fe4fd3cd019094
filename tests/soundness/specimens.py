"""Models in which an old fault shows, as cases of the fuzzer."""

import functools

import keras
import numpy as np
from soundness.expectations import L, dense
from soundness.generator import Case, plain
from soundness.pieces import Scaled

ROTATED = np.array([[0.8, -0.6], [0.6, 0.8]])


def case(model, *, seed=0, scale=1.0, x=None, policy="float32", twin=None):
    """A case of a model with one input; `twin` is the model in float64, or None."""
    shape = model.inputs[0].shape[1:]
    if x is None:
        x = np.random.default_rng(0).normal(size=(4, *shape)) * scale
        x = x.astype("float64" if policy == "float64" else "float32")
    make = None if twin is None else (lambda: twin)
    return plainly(Case(seed, model, make, x, [tuple(shape)], 0.0, policy, "specimen"))


def plainly(found):
    """Certified by composition, whatever its seed would choose."""
    found.method = "composition"
    return found


def functional(apply, shape=(2,), precision="auto", **options):
    start = keras.Input(shape)
    found = case(keras.Model(start, apply(start)), **options)
    found.precision = precision
    return found


def chain(layers, seed=0):
    return plainly(plain(seed, layers))


def trained():
    """Seeds choose the way to train: see `claims._trained`."""
    return plain(50, 1)


def executed_together():
    return plain(100, 1)


def normalized():
    """A normalization of gain 10 before the first stage; see `claims._trained`."""
    variance = keras.initializers.Constant(0.01)
    norm = L.BatchNormalization(moving_variance_initializer=variance)
    model = keras.Sequential([keras.Input((2,)), norm, dense(ROTATED)])
    return case(model, scale=0.05)


def pooled_images():
    pool, head = L.GlobalAveragePooling2D(), dense([[1.0, -1.0]])
    return case(keras.Sequential([keras.Input((2, 2, 1)), pool, head]))


def nested_integers():
    inner = keras.Input((2,), dtype="int32")
    nested = keras.Model(inner, dense(np.eye(2), [0.0, 0.3])(inner))
    points = np.array([[0.99, 0.0], [1.01, 0.6], [2.4, 1.9], [0.2, 0.1]], dtype="float32")
    return functional(nested, x=points)


def masked():
    """The mask leaves out the class that would win."""
    mask = np.array([[True, True, False]])

    def apply(x):
        x = dense([[1.0, -1.0, 0.0], [0.5, 0.5, 0.0]], [0.0, 0.0, 9.0])(x)
        return L.Softmax()(x, mask=mask)

    return functional(apply)


def with_keyword():
    inner = Scaled(3)
    return functional(lambda x: inner(x, scale=10.0))


def with_array():
    constant = np.array([[0.3, 0.0]], dtype="float32")
    return functional(lambda x: dense(ROTATED)(L.Add()([x, constant])), precision="float64")


def wrapped():
    relu = keras.activations.relu
    steep = functools.wraps(relu)(lambda x: 8.0 * relu(x))
    return functional(lambda x: dense(ROTATED)(dense(ROTATED, activation=steep)(x)))


def replaced():
    layer = dense(ROTATED, [0.2, 0.1])
    found = functional(lambda x: dense(np.eye(2))(layer(x)))
    original = layer.call
    layer.call = lambda *a, **o: 6.0 * original(*a, **o)
    return found


def changed_after_use():
    """A sigmoid that becomes a rectifier after the model was certified and measured."""
    import tf_lyapunov as tfl

    layer = dense(ROTATED, activation="sigmoid")
    found = functional(lambda x: dense(np.eye(2))(layer(x)))
    tfl.certify(found.model, found.x)
    tfl.lipschitz_upper_bound(found.model)
    layer.activation = keras.activations.relu
    return found


def small_variance():
    variance = keras.initializers.Constant(0.01)
    norm = L.BatchNormalization(moving_variance_initializer=variance, epsilon=1e-5)
    return functional(lambda x: dense(ROTATED)(norm(x)))


def biased():
    return functional(dense(ROTATED, [0.2, -0.2]), precision="float64")


def half():
    """Enough products in float16 for their rounding to show."""
    rng = np.random.default_rng(0)
    layers = [dense(rng.normal(size=(12, 12)) / 3, dtype="mixed_float16") for _ in range(3)]
    head = dense(rng.normal(size=(12, 2)), dtype="mixed_float16")
    model = keras.Sequential([keras.Input((12,)), *layers, head])
    found = case(model, policy="mixed_float16")
    found.precision = "model"
    return found


def tiny(precision):
    """Products below the numbers of float16, scaled up again, where the model ties."""
    matrices = (1e-4 * np.eye(2), None), (6e4 * np.eye(2), [0.0, 0.0015])

    def network(policy, dtype):
        layers = [dense(m, b, dtype=policy) for m, b in matrices]
        return keras.Sequential([keras.Input((2,), dtype=dtype), *layers])

    x = np.array([[2.68e-4, 0.0]] * 4, dtype="float32")
    model, twin = network("mixed_float16", "float32"), network("float64", "float64")
    found = case(model, x=x, policy="mixed_float16", twin=twin)
    found.precision = precision
    return found


def huge():
    """Both logits become infinite within the ball, where no more than their order is proved."""
    layer = dense(np.array([[0.9, 1.0], [0.9, 1.0]]), dtype="mixed_float16")
    x = np.array([[3e4, 3e4], [2e4, 3e4], [3e4, 2e4], [3e4, 1e4]], dtype="float32")
    model = keras.Sequential([keras.Input((2,)), layer])
    return case(model, x=x, policy="mixed_float16")


def double():
    """Inputs of type float64 whose margins are below the unit of float32."""
    x = np.random.default_rng(0).normal(size=(4, 1)) * np.ones((1, 2))
    x[:, 0] += np.array([1e-8, -1e-8, 3e-9, 2e-8])
    model = keras.Sequential(
        [keras.Input((2,), dtype="float64"), dense(np.eye(2), dtype="float64")]
    )
    found = case(model, x=x, policy="float64", twin=model)
    found.precision = "float64"
    return found


def overlapping():
    pool = L.MaxPooling1D(2, strides=1)
    return functional(lambda x: L.Flatten()(pool(x)), (6, 1))


def transposed():
    def apply(x):
        x = L.Conv1DTranspose(2, 3, strides=2, padding="same")(x)
        return L.Dense(3)(L.Flatten()(x))

    return functional(apply, (4, 1))


def forget():
    """Empties what is remembered of kernels and maps, which a fault may have made wrong."""
    from tf_lyapunov.theory import norms, operators

    norms.forget()
    operators.convolution_taps.cache_clear()
