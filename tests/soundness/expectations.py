"""What the tests of named kinds expect, and the small models they share."""

import functools
import textwrap

import fresh_processes
import keras
import numpy as np
import pytest
from soundness import oracles

import tf_lyapunov as tfl
from tf_lyapunov.errors import UnsupportedLayerError

L = keras.layers
# Known faults: an expectation fails. Any other error is one of the test.


def dense(matrix, bias=None, **options):
    """A `Dense` layer that computes x ↦ x·matrix + bias."""
    matrix = np.asarray(matrix, dtype=np.float64)
    constant = keras.initializers.Constant
    bias = None if bias is None else constant(np.asarray(bias, dtype=np.float64))
    return L.Dense(
        matrix.shape[1],
        kernel_initializer=constant(matrix),
        use_bias=bias is not None,
        bias_initializer=bias or "zeros",
        **options,
    )


def inputs_near_boundaries(shape, count=12, scale=1.0, seed=0, dtype="float32"):
    return (np.random.default_rng(seed).normal(size=(count, *shape)) * scale).astype(dtype)


def assert_refusal_names(error, names):
    """The message of a refusal names the layer, the operation or the argument."""
    if names:
        assert any(name in str(error) for name in names), str(error)


def assert_sound_or_refused(model, x, *names, methods=("composition",), threshold=0.0, **options):
    """Certified radii and the gain hold for the model as its user calls it."""
    function = functools.partial(oracles.evaluate, model)
    for method in methods:
        try:
            certificate = tfl.certify(model, x, method=method, **options)
        except (UnsupportedLayerError, ValueError) as error:
            assert_refusal_names(error, names)
            continue
        dtype = model.inputs[0].dtype if getattr(model, "inputs", None) else x.dtype
        dtype = "float32" if dtype == "bfloat16" else dtype
        assert oracles.false_radii(function, x, certificate, threshold=threshold, dtype=dtype) == []


def assert_gain_sound_or_refused(model, *names, scales=(0.01, 1.0, 30.0), outputs="model"):
    """No secant of the model's outputs exceeds the proven gain."""

    def function(x):
        return oracles.evaluate(model, x)

    function.precision = "float32"
    try:
        bound = tfl.lipschitz_upper_bound(model, outputs=outputs).gain_upper_bound
    except (UnsupportedLayerError, ValueError) as error:
        assert_refusal_names(error, names)
        return
    found = oracles.measured_gain(
        function, model.inputs[0].shape[1:], scales=scales, dtype="float32"
    )
    assert found <= bound * (1 + oracles.GAIN_SLACK)


def run_on(backend, code):
    """Runs code on another backend in a process of its own; its last line must be OK."""
    pytest.importorskip(backend)
    found = fresh_processes.run(textwrap.dedent(code), backend=backend)
    assert found.stdout.strip().endswith("OK"), (found.stdout + found.stderr)[-2000:]


def assert_margins_are_the_models(model, x):
    """Margins of a certificate are those of the model called now, to float noise."""
    try:
        certificate = tfl.certify(model, x, precision="model")
    except (UnsupportedLayerError, ValueError):
        return
    outputs = np.sort(oracles.evaluate(model, x), axis=1)
    own = outputs[:, -1] - outputs[:, -2]
    assert np.allclose(certificate.margins, own, rtol=1e-3, atol=1e-5)
