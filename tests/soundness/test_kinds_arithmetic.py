"""Kinds of false arithmetic: underflow, precisions, backends, kept weights.

The rule: an odd but legal model is either read rightly, and no perturbation within a certified
radius changes its decision nor does a secant exceed its proven gain, or it is refused by an error
that names what could not be read. `xfail` marks faults that are known and not yet removed.
"""

import functools

import keras
import numpy as np
import pytest
from soundness import oracles
from soundness.expectations import (
    L,
    assert_gain_sound_or_refused,
    assert_sound_or_refused,
    dense,
    inputs_near_boundaries,
    run_on,
)

import tf_lyapunov as tfl
from tf_lyapunov.bounds.composition import underflow_errors
from tf_lyapunov.program.network import read_network

# Arithmetic --------------------------------------------------------------------------------------


def test_underflow_of_float16_does_not_certify_the_wrong_class():
    policy = "mixed_float16"
    model = keras.Sequential(
        [
            keras.Input((2,)),
            dense(1e-4 * np.eye(2), dtype=policy),
            dense(6e4 * np.eye(2), [0.0, 0.0015], dtype=policy),
        ]
    )
    x = np.array([[2.68e-4, 0.0]], dtype="float32")
    own = int(np.argmax(oracles.evaluate(model, x)[0]))
    for precision in ("auto", "model", "float64"):
        certificate = tfl.certify(model, x, precision=precision)
        assert certificate.radius[0] == 0 or certificate.labels[0] == own


def test_underflow_of_float32_does_not_certify_the_wrong_class():
    model = keras.Sequential(
        [
            keras.Input((2,)),
            dense(1.2e-38 * np.eye(2)),
            dense(5e37 * np.eye(2), [0.0, 0.1]),
        ]
    )
    x = np.array([[0.9, 0.0], [0.5, 0.0]], dtype="float32")
    own = np.argmax(oracles.evaluate(model, x), axis=1)
    for precision in ("auto", "model", "float64"):
        certificate = tfl.certify(model, x, precision=precision)
        assert np.all((certificate.radius == 0) | (certificate.labels == own))


def test_subnormal_weights_are_those_that_the_device_multiplies_by():
    head = L.Dense(2, use_bias=False)
    model = keras.Sequential([keras.Input((2,)), dense(1e37 * np.eye(2)), head])
    head.set_weights([np.array([[6e-39, 0.0], [0.0, 2e-38]], dtype="float32")])
    x = np.array([[2.0, 0.3], [4.0, 1.0]], dtype="float32")
    own = np.argmax(oracles.evaluate(model, x), axis=1)
    for precision in ("auto", "model", "float64"):
        certificate = tfl.certify(model, x, precision=precision)
        assert np.all((certificate.radius == 0) | (certificate.labels == own))


@pytest.mark.parametrize("scales", [(1e37, 3e-38), (1e-38, 3e37)])
@pytest.mark.parametrize("seed", [1, 4])
def test_no_radius_ends_beyond_what_flushed_numbers_decide(scales, seed):
    # Subnormal weights meet large signals, or normal weights make subnormal products.
    rng = np.random.default_rng(seed)
    kernels = [rng.normal(size=size) * s for size, s in zip([(2, 3), (3, 3)], scales, strict=True)]
    model = keras.Sequential([keras.Input((2,)), L.Dense(3), L.Dense(3)])
    # An initializer would flush them.
    model.set_weights([kernels[0], np.zeros(3), kernels[1], np.array([0.05, 0.0, 0.0])])
    x = rng.normal(size=(6, 2)).astype("float32") * 3

    def own(points):
        return oracles.evaluate(model, points)

    own.precision = "float32"
    for method in ("composition", "linear"):
        certificate = tfl.certify(model, x, method=method, precision="float64")
        assert oracles.false_radii(own, x, certificate) == []


def test_settings_fixed_by_partial_hide_no_square_that_overflows():
    fixed = functools.partial(keras.activations.squareplus, b=4)
    last = dense([[-1.0, 0.0], [0.0, 0.0]], [300.0, 0.0], dtype="float16")
    model = keras.Sequential(
        [keras.Input((2,), dtype="float16"), L.Activation(fixed, dtype="float16"), last]
    )
    # 260² is beyond float16: the model gives -inf and NaN from there on.
    certificate = tfl.certify(model, np.array([[200.0, 0.0]], "float16"))
    assert certificate.radius[0] <= 56.0


def flushed(array):
    """As a device that sets subnormal results to zero."""
    return np.where(np.abs(array) < 2.0**-126, 0.0, array)


@pytest.mark.parametrize("kind", ["layer norm", "squareplus"])
def test_squares_that_a_device_sets_to_zero_are_counted(kind):
    """Under a root or in a divisor they lose far more than their own size."""
    if kind == "layer norm":
        layer = L.LayerNormalization(epsilon=1e-36, center=False, scale=False)
        x = np.array([[1.08e-19, -1.08e-19]])
        exact, found = (x / np.sqrt(s + 1e-36) for s in (x**2, flushed(x**2)))
    else:
        layer = L.Activation(functools.partial(keras.activations.squareplus, b=0))
        x = np.array([[-1.08e-19, 0.0]])
        exact, found = ((x + np.sqrt(s)) / 2 for s in (x**2, flushed(x**2)))
    model = keras.Sequential([keras.Input((2,)), layer])
    network = read_network(model)
    lost = underflow_errors(network, np.linalg.norm(x, axis=1), network.output)
    assert np.linalg.norm(found - exact) <= lost[0] < 1e3 * np.linalg.norm(found - exact)


def test_allowances_count_what_large_signals_lose_to_flushed_weights():
    head = L.Dense(2, use_bias=False)
    model = keras.Sequential([keras.Input((1,)), dense([[1e38]]), head])
    head.set_weights([np.array([[9e-39, 0.0]], dtype="float32")])
    x = np.array([[1.0]], dtype="float32")
    certificate = tfl.certify(model, x, precision="model")
    exact = float(np.float32(1e38)) * float(np.float32(9e-39))
    lost = exact - oracles.evaluate(model, x)[0, 0]  # 0, or 0.9 on a device that flushes
    assert certificate.float_allowance >= lost
    assert certificate.radius[0] <= 1.0


def test_inputs_of_a_float64_model_are_not_rounded():
    model = keras.Sequential(
        [keras.Input((2,), dtype="float64"), dense(np.eye(2), dtype="float64")]
    )
    base = 2.0**24
    x = np.array([[base + 1.1, base + 1.0], [base + 1.0, base + 3.0]])
    certificate = tfl.certify(model, x)
    distance = np.abs(x[:, 0] - x[:, 1]) / np.sqrt(2)
    assert np.all(certificate.radius <= distance * (1 + 1e-9))
    assert np.array_equal(certificate.predictions, np.argmax(x, axis=1))


@pytest.mark.parametrize("method", ["composition", "lipsdp", "local"])
def test_radii_of_a_float64_model_with_a_leaky_slope_stay_below_the_exact_distance(method):
    model = keras.Sequential(
        [
            keras.Input((2,), dtype="float64"),
            dense(np.eye(2), dtype="float64"),
            L.LeakyReLU(0.3, dtype="float64"),
            dense(np.eye(2), dtype="float64"),
        ]
    )
    x = np.array([[-1.0, -1.0 - 1e-8], [-1.0, -1.0 + 3e-9], [2.0, 1.0]])
    assert_sound_or_refused(model, x, methods=(method,))


BOUNDARY = """
    import keras, numpy as np, tf_lyapunov as tfl

    def check(kind):
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(1, dtype=kind)
        model = keras.Sequential([keras.Input((50,), dtype=kind), dense])
        rng = np.random.default_rng(0)
        w, b = rng.normal(size=(50, 1)).astype("float32"), np.array([0.1], dtype="float32")
        model.set_weights([w, b])
        x = rng.normal(size=(2000, 50))
        w, b = w.astype(float)[:, 0], float(b[0])
        x -= np.outer((x @ w + b) / (w @ w), w) * (1 - 1e-7 * rng.normal(size=(2000, 1)))
        x = x.astype(kind)
        try:
            proof = tfl.certify(model, x)
        except ValueError as error:
            assert kind == "float64" and "float64" in str(error), error
            return
        z = x.astype(np.longdouble) @ w.astype(np.longdouble) + b
        exact = np.abs(z) / np.sqrt(w.astype(np.longdouble) @ w.astype(np.longdouble))
        false = proof.radius > exact * (1 + 1e-9)
        false |= (proof.radius > 0) & (proof.labels != (z > 0))
        assert not false.any(), (kind, int(false.sum()), int((proof.radius > 0).sum()))

    check("float32")
    check("float64")
    print("OK")
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_radii_near_the_boundary_hold_on_other_backends_in_both_formats(backend):
    run_on(backend, BOUNDARY)


# Caches of 1-Lipschitz layers --------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_kept_weights_of_lipschitz_layers_scaled_with_their_copies_are_not_believed(factor):
    layer = tfl.layers.CayleyDense(3)
    model = keras.Sequential([keras.Input((3,)), layer])
    tfl.layers.refresh(model)
    for variable in layer.variables:
        variable.assign(factor * variable.value)
    assert_sound_or_refused(model, inputs_near_boundaries((3,)), layer.name)
    assert_gain_sound_or_refused(model, layer.name)


@pytest.mark.parametrize("precision", ["auto", "model", "float64"])
def test_no_ball_reaches_where_float16_ends(precision):
    """Both logits become infinite at 65504, where the class of the larger one is lost."""
    layer = dense([[0.9, 1.0], [0.9, 1.0]], dtype="mixed_float16")
    model = keras.Sequential([keras.Input((2,)), layer])
    x = np.array([[3e4, 2e4], [2e3, 3e3]], dtype="float32")
    certificate = tfl.certify(model, x, precision=precision)
    distance = (65504 - x.sum(axis=1, dtype=np.float64)) / np.sqrt(2)
    assert np.all(certificate.radius <= distance)
    assert certificate.radius[1] > 2000  # of 3535 to the boundary at zero


def test_an_input_that_overflows_in_a_cast_to_float16_is_outside_of_every_ball():
    head = dense([[1e-7, 0.0], [0.0, 1e-7]], [1.0, 0.0])
    layers = [L.Activation("softplus", dtype="mixed_float16"), head]
    model = keras.Sequential([keras.Input((2,)), *layers])
    x = np.ones((1, 2), dtype="float32")
    assert 0 < tfl.certify(model, x).radius[0] < 65504


def test_a_function_that_squares_its_input_ends_at_the_root_of_the_largest_number():
    layers = [dense(np.eye(2)), L.Activation("squareplus"), dense(np.eye(2), [1e30, 0.0])]
    model = keras.Sequential([keras.Input((2,)), *layers])
    x = np.ones((1, 2), dtype="float32")
    assert tfl.certify(model, x, precision="model").radius[0] <= 1.85e19


def test_normalization_in_bfloat16_is_read_on_torch():
    run_on(
        "torch",
        """
        import keras, numpy as np, tf_lyapunov as tfl
        layers = keras.layers
        keras.config.set_dtype_policy("mixed_bfloat16")
        model = keras.Sequential(
            [keras.Input((3,)), layers.Normalization(mean=0.5, variance=4.0), layers.Dense(2)]
        )
        bound = tfl.lipschitz_upper_bound(model)
        assert 0 < bound.gain_upper_bound < 10
        print("OK")
        """,
    )


def test_sums_that_overflow_before_they_are_divided_end_the_radius():
    """TensorFlow sums the windows of an average pool in the format of the signal."""

    def model(dtype):
        pool = L.AveragePooling2D(16, dtype=dtype)
        layers = [pool, L.Flatten(dtype=dtype), L.Dense(2, dtype=dtype)]
        made = keras.Sequential([keras.Input((16, 16, 1)), *layers])
        made.set_weights([np.array([[1.0, -1.0]]), np.zeros(2)])
        return made

    x = np.full((1, 16, 16, 1), 100.0)  # the sum is 25600, the mean 100
    wide, narrow = tfl.certify(model("float32"), x), tfl.certify(model("mixed_float16"), x)
    assert wide.radius[0] > 1500  # the mean is 0 at a distance of 100·√256
    # At 256 everywhere, 156·16 from x, the sum is infinite; a factor of 2 is left for rounding.
    assert 0 < narrow.radius[0] < 32752 / 16 - 1600 + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_squares_that_overflow_in_a_normalization_end_the_radius(dtype):
    """Their sum is infinite, and the output β, where the exact one still has the class of x."""
    norm = L.LayerNormalization(epsilon=1e30, dtype=dtype)
    model = keras.Sequential([keras.Input((3,)), norm, L.Dense(2, dtype=dtype)])
    kernel = np.array([[1, -1], [-0.5, 0.5], [-0.5, 0.5]], "float32")
    model.layers[-1].set_weights([kernel, np.array([0.1, 0.0])])
    certificate = tfl.certify(model, np.array([[3.0, -1.5, -1.5]]))
    # Its gain is √1.5·√2·10⁻¹⁵: the exact decision holds up to 10¹⁴.
    assert np.all(certificate.radius < 1e19)
    model.layers[-1].set_weights([kernel * 1e-10, np.array([0.1, 0.0])])
    certificate = tfl.certify(model, np.array([[3.0, -1.5, -1.5]]))
    largest = np.sqrt(np.finfo("float32").max / 2)
    assert 0.9 * largest < certificate.radius[0] < largest


def _mean_of(kind, dtype):
    """A model whose first step has the gain 1/16 or less and is larger on its way there."""
    x = keras.Input((16, 16, 1))
    if kind == "layer":
        h = L.AveragePooling2D(16, dtype=dtype)(x)
    elif kind == "merge":
        scaled = L.Rescaling(1 / 256, dtype=dtype)(x)
        h = L.Average(dtype=dtype)([scaled] * 256)
    else:
        h = L.Normalization(mean=-60000.0, variance=60000.0**2, dtype=dtype)(x)
    y = L.Dense(2, dtype=dtype)(L.Flatten(dtype=dtype)(h))
    model = keras.Model(x, y)
    kernel = np.zeros(model.layers[-1].kernel.shape)
    kernel[0] = [1e-3, -1e-3]
    model.layers[-1].set_weights([kernel, np.array([5.0, 0.0])])
    return model


@pytest.mark.parametrize("kind", ["layer", "merge", "normalization"])
def test_what_is_larger_on_the_way_ends_the_radius(kind):
    """In float32 the radius goes on to where float16's sums, or differences, are infinite."""
    x = np.full((1, 16, 16, 1), 1.0)
    wide, narrow = (tfl.certify(_mean_of(kind, d), x).radius[0] for d in ("float32", "float16"))
    ends = {"layer": 32752 / 16, "merge": 65504.0, "normalization": 65504.0 - 60000.0}
    assert 0 <= narrow <= ends[kind] < wide


def test_a_bare_average_pool_has_a_peak_too():
    x = keras.Input((16, 16, 1))
    pooled = keras.ops.average_pool(x, 16, data_format="channels_last")
    network = tfl.certification.read_network(keras.Model(x, L.Flatten()(pooled)))
    assert network.nodes[1].peak.factor == 16.0 and not network.nodes[1].peak.wide
