"""Sectors of activations and the geometry of passivity indices."""

import functools
import math
import subprocess
import sys
from fractions import Fraction

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.theory.activations import supported_activations
from tf_lyapunov.theory.sectors import Indices, Sector

U = 2.0**-53
REFUSED = {"softmax", "log_softmax", "sparsemax", "glu", "exponential", "threshold", "hard_shrink"}


def keras_activation_names():
    skip = {"serialize", "deserialize", "get"}
    return sorted(
        name
        for name in dir(keras.activations)
        if not name.startswith("_")
        and name not in skip
        and callable(getattr(keras.activations, name))
    )


def sampled_slopes(function):
    """Secant slopes on a fine grid in float64, and the rounding error they may carry."""
    step = 1 / 64
    x = np.arange(-2048, 2049) * step  # ±32, exactly representable
    y = np.asarray(keras.ops.convert_to_numpy(function(keras.ops.convert_to_tensor(x, "float64"))))
    assert y.dtype == np.float64
    # TensorFlow's elementwise kernels are within a few units in the last place.
    return np.diff(y) / step, 64 * U * np.max(np.abs(y)) / step


@pytest.mark.parametrize("name", keras_activation_names())
def test_every_keras_activation_is_bounded_or_refused_by_name(name):
    function = getattr(keras.activations, name)
    if name in REFUSED:
        with pytest.raises(UnsupportedLayerError, match=name):
            Sector.of(function)
        return
    sector = Sector.of(function)
    assert sector == Sector.of(name)
    slopes, error = sampled_slopes(function)
    # Constants inside Keras are float32 at worst.
    error += 2.0**-22 * sector.magnitude
    assert sector.alpha - error <= slopes.min()
    assert slopes.max() <= sector.beta + error
    # Tight: a secant over 1/64 differs from the extreme slope by its curvature times 1/64.
    assert slopes.max() >= sector.beta - 1 / 64
    assert slopes.min() <= sector.alpha + 1 / 64


def test_the_list_of_activations_covers_keras():
    assert set(keras_activation_names()) - REFUSED <= set(supported_activations())


@pytest.mark.parametrize("approximate", [False, True])
def test_extreme_slopes_of_gelu_come_from_its_stationary_points(approximate):
    sector = Sector.of("gelu", approximate=approximate)
    slopes, error = sampled_slopes(
        functools.partial(keras.activations.gelu, approximate=approximate)
    )
    assert sector.alpha - error <= slopes.min() <= sector.alpha + 1e-3
    assert sector.beta - 1e-3 <= slopes.max() <= sector.beta + error
    if not approximate:
        exact = 0.5 * math.erfc(-1.0) + math.sqrt(2) * math.exp(-1) / math.sqrt(2 * math.pi)
        assert exact <= sector.beta <= exact + 1e-12
        assert 1 - exact - 1e-12 <= sector.alpha <= 1 - exact


def test_keras_ops_gelu_has_another_default_than_the_activation():
    assert Sector.of(keras.ops.gelu) == Sector.of("gelu", approximate=True)


@pytest.mark.parametrize(
    ("layer", "sector"),
    [
        (keras.layers.ReLU(), (0, 1)),
        (keras.layers.ReLU(negative_slope=1.5, max_value=2.0), (0, 1.5)),
        (keras.layers.LeakyReLU(negative_slope=0.1), (0.1, 1)),
        (keras.layers.ELU(alpha=-0.5), (-0.5, 1)),
        (keras.layers.LeakyReLU(negative_slope=3.0), (1, 3)),
        (keras.layers.ELU(alpha=2.5), (0, 2.5)),
        (keras.layers.Activation("tanh"), (0, 1)),
        (keras.layers.Dense(2, activation="sigmoid"), (0, 0.25)),
        (keras.layers.Conv2D(2, 3), (1, 1)),
    ],
)
def test_layers_bring_their_own_parameters(layer, sector):
    assert Sector.of(layer) == Sector(*sector)


def test_prelu_reads_all_its_slopes():
    layer = keras.layers.PReLU()
    with pytest.raises(ValueError, match="built"):
        Sector.of(layer)
    layer.build((None, 3))
    layer.set_weights([np.array([0.5, -2.0, 1.25], "float32")])
    assert Sector.of(layer) == Sector(-2.0, 1.25)
    assert Sector.of("prelu", alpha=[0.2, 3.0]) == Sector(0.2, 3.0)
    with pytest.raises(ValueError, match="finite"):
        Sector.of("prelu", alpha=[np.nan])


def relu(x):
    """A user's function that only shares its name with Keras's."""
    return 2 * x


class ReLU:
    """A user's layer that only shares its name with Keras's."""


@pytest.mark.parametrize(
    "impostor", [relu, ReLU(), lambda x: x, np.tanh, "no_such", keras.layers.Softmax()]
)
def test_nothing_is_trusted_by_its_name_alone(impostor):
    with pytest.raises(UnsupportedLayerError):
        Sector.of(impostor)


def test_a_subclassed_layer_of_the_user_is_refused():
    class LeakyReLU(keras.layers.LeakyReLU):
        def call(self, inputs):
            return 5 * inputs

    with pytest.raises(UnsupportedLayerError, match="LeakyReLU"):
        Sector.of(LeakyReLU())


@pytest.mark.parametrize(
    ("name", "params", "error"),
    [
        ("relu", {"threshold": 0.5}, UnsupportedLayerError),
        ("relu", {"max_value": -1.0}, ValueError),
        ("soft_shrink", {"threshold": -1.0}, UnsupportedLayerError),
        ("celu", {"alpha": -1.0}, UnsupportedLayerError),
        ("squareplus", {"b": -1.0}, ValueError),
        ("leaky_relu", {"negative_slope": math.nan}, ValueError),
        ("tanh", {"negative_slope": 0.1}, TypeError),
    ],
)
def test_parameters_that_break_the_sector_are_refused(name, params, error):
    with pytest.raises(error):
        Sector.of(name, **params)


def test_partial_activations_keep_their_parameters():
    function = functools.partial(keras.activations.leaky_relu, negative_slope=0.3)
    assert Sector.of(function) == Sector(0.3, 1.0)


@pytest.mark.parametrize("slopes", [(1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)])
def test_impossible_sectors_are_refused(slopes):
    with pytest.raises(ValueError, match="Received"):
        Sector(*slopes)


slopes = st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)).filter(
    lambda ab: ab[0] < ab[1] and ab[0] + ab[1] > 1e-3 * ab[1]
)


@given(slopes)
def test_slopes_and_indices_are_inverse(ab):
    a, b = ab
    found_a, found_b = Indices.from_slopes(a, b).slopes
    # δ and ν are rounded once each; the square root turns that into √u near δν = 1/4.
    tolerance = 1e4 * math.sqrt(U) * b
    assert abs(found_a - a) <= tolerance
    assert abs(found_b - b) <= tolerance


@given(st.floats(1e-6, 1e6), st.floats(-1e6, 1e6))
def test_the_sound_gain_never_exceeds_the_published_one(delta, nu):
    nu = min(nu, 0.25 / delta)
    indices = Indices(delta, nu)
    # Both are rounded up, the sound one in two steps.
    assert indices.gain <= indices.gain_as_published * (1 + 4 * U)


@given(st.floats(1e-6, 1e6), st.floats(-1e6, 1e6))
def test_the_gain_is_rounded_to_the_safe_side(delta, nu):
    indices = Indices(delta, min(nu, 0.25 / delta))
    b, d, n = Fraction(indices.gain), Fraction(indices.delta), Fraction(indices.nu)
    # b is the larger root of δb² - b + ν, so the quadratic is not negative at or beyond it.
    assert d * b * b - b + n >= 0
    assert 2 * d * b >= 1


@given(st.floats(0.0, math.pi / 2 - 1e-3), st.floats(1e-3, 1e3))
def test_half_angle_is_that_of_the_cone(angle, slope):
    a, b = slope * math.tan(math.pi / 4 - angle / 2), slope * math.tan(math.pi / 4 + angle / 2)
    assert Indices.from_slopes(a, b).half_angle == pytest.approx(angle, abs=1e-7)


def test_a_gain_alone_has_no_indices():
    with pytest.raises(ValueError, match="delta"):
        Indices.from_gain(2.0)
    with pytest.raises(ValueError, match="equal_gain_design"):
        Indices.from_slopes(-2.0, 2.0)
    with pytest.raises(ValueError, match="at least"):
        Indices.from_gain(2.0, delta=0.1)
    assert Indices.from_gain(2.0, delta=10.0).slopes[1] == pytest.approx(2.0)


@pytest.mark.parametrize("pair", [(1.0, 0.26), (math.nan, 0.0), (1.0, math.inf)])
def test_impossible_indices_are_refused(pair):
    with pytest.raises(ValueError, match="Received"):
        Indices(*pair)


@pytest.mark.parametrize("value", ["1", True, None, [1.0]])
def test_indices_take_numbers_only(value):
    with pytest.raises(TypeError):
        Indices(value, 0.0)


def test_indices_without_positive_delta_bound_no_gain():
    assert Indices(0.0, -1.0).gain == math.inf
    assert Indices(-1.0, -1.0).gain_as_published == math.inf
    with pytest.raises(ValueError, match="delta"):
        _ = Indices(0.0, -1.0).slopes


def test_theory_and_design_import_neither_keras_nor_scipy():
    code = (
        "import sys, types, importlib.util as u\n"
        "spec = u.find_spec('tf_lyapunov')\n"
        "package = types.ModuleType('tf_lyapunov')\n"
        "package.__path__ = list(spec.submodule_search_locations)\n"
        "sys.modules['tf_lyapunov'] = package\n"
        "import tf_lyapunov.design\n"
        "heavy = {'keras', 'tensorflow', 'scipy', 'cvxpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_cones_of_huge_indices_have_slopes():
    indices = Indices(1e300, -1e300)  # 1 - 4δν is beyond float64, its root is not
    assert indices.discriminant == math.inf
    assert indices.slopes == pytest.approx((-1.0, 1.0), rel=1e-12)
    assert indices.gain >= 1.0
    assert Indices(-1e300, -1e300).discriminant == -math.inf
