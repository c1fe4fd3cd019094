"""`OrthogonalDense`: a plain layer whose kernel the optimizer keeps, and whose gain is measured."""

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov.layers import MaxMin, OrthogonalDense
from tf_lyapunov.optimizers import Stiefel

X = np.random.default_rng(0).standard_normal((32, 6)).astype("float32")
Y = (X[:, 0] * X[:, 1] > 0).astype("int32")


def trained(optimizer, dtype="float32"):
    """A tall, a square and a wide kernel after 25 steps."""
    layers = [OrthogonalDense(n, a, dtype=dtype) for n, a in ((4, "relu"), (4, None), (7, "tanh"))]
    model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(2, dtype=dtype)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Eagerly: tracing lasts longer than these steps.
    model.compile(optimizer, loss, run_eagerly=True)
    model.fit(X[:10], Y[:10], batch_size=2, epochs=5, verbose=0)
    return model


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return trained(Stiefel(keras.optimizers.Adam(0.02)))


def used(layer):
    """The kernel as inference uses it, found by calling the layer on the identity."""
    size = layer.kernel.shape[0]
    probe = OrthogonalDense(layer.units, use_bias=False, dtype=layer.dtype_policy)
    probe.build((None, size))
    probe.kernel.assign(layer.kernel)
    basis = keras.ops.cast(np.eye(size), layer.compute_dtype)
    value = keras.ops.cast(probe(basis), "float32")
    return np.asarray(keras.ops.convert_to_numpy(value), np.float64)


def check_both_sides(layer):
    norms = np.linalg.svd(used(layer), compute_uv=False)
    side = min(layer.kernel.shape)
    departure = np.max(np.abs(norms**2 - 1))
    assert norms[0] <= layer.gain_upper_bound()
    assert departure <= layer.departure_upper_bound()
    # ‖·‖ ≤ ‖·‖_F ≤ √n‖·‖, and rounding in float64.
    assert layer.departure_upper_bound() <= departure * np.sqrt(side) + 1e-12
    assert layer.gain_upper_bound() <= np.sqrt(1 + departure * np.sqrt(side)) + 1e-12


def test_gains_are_those_of_the_kernels_as_used_from_both_sides(model):
    for layer in model.layers[:3]:
        check_both_sides(layer)
        assert layer.departure_upper_bound() < 1e-5


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_gains_of_half_formats_are_those_of_the_cast_kernels(dtype):
    layer = OrthogonalDense(4, dtype=dtype)
    layer.build((None, 6))
    check_both_sides(layer)
    assert layer.departure_upper_bound() > 1e-5


def test_another_optimizer_leaves_the_manifold_and_the_gain_says_so():
    other = trained(keras.optimizers.Adam(0.05))
    for layer in other.layers[:3]:
        check_both_sides(layer)
        assert layer.departure_upper_bound() > 1e-2
    head = np.linalg.norm(np.asarray(other.layers[3].kernel, "float64"), 2)
    exact = head * np.prod([np.linalg.norm(used(v), 2) for v in other.layers[:3]])
    bound = tfl.lipschitz_upper_bound(other, method="composition").gain_upper_bound
    assert exact <= bound <= exact * (1 + 1e-9)


def test_certificates_the_monitor_and_exports_read_it_as_a_plain_layer(model, tmp_path):
    head = np.linalg.norm(np.asarray(model.layers[3].kernel, "float64"), 2)
    gain = float(tfl.lipschitz_upper_bound(model, method="composition").gain_upper_bound)
    assert head * (1 - 1e-9) <= gain <= head * (1 + 1e-5) ** 3
    proof = tfl.certify(model, X, Y)
    assert proof.certified_accuracy(0.0) > 0.3
    plain = tfl.export_plain(model)
    assert [type(v) for v in plain.layers if v.weights] == [keras.layers.Dense] * 4
    for one, other in zip(plain.get_weights(), model.get_weights(), strict=True):
        assert np.array_equal(one, other)
    # Eager calls and compiled ones round differently: 25 sums and tanh, each of half a unit.
    expected = model.predict(X, verbose=0)
    room = 25 * 2.0**-23 * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(plain.predict(X, verbose=0), expected, rtol=0, atol=room)
    monitor = tfl.callbacks.LyapunovMonitor(verbose=0)
    logs = model.fit(X, Y, batch_size=32, verbose=0, callbacks=[monitor]).history
    names = [layer.name for layer in model.layers[:3]]
    assert all(abs(logs[f"sigma/{name}"][0] - 1) < 1e-5 for name in names)
    bound = tfl.lipschitz_upper_bound(model, method="composition").gain_upper_bound
    assert logs["gain_upper_bound"][0] == pytest.approx(float(bound), rel=1e-6)


def test_files_of_the_layer_in_onnx_compute_the_same(model, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    tfl.export_onnx(model, path)
    session = runtime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: X})
    np.testing.assert_allclose(found, model.predict(X, verbose=0), atol=1e-5)


def test_what_is_asked_of_a_kernel_that_cannot_do_it_is_refused():
    for preserves, inputs, units in (("norms", 6, 4), ("gradients", 4, 6)):
        with pytest.raises(ValueError, match=f"preserves={preserves!r} in layer"):
            OrthogonalDense(units, preserves=preserves).build((None, inputs))
        layer = OrthogonalDense(inputs, preserves=preserves)
        layer.build((None, units))
        assert type(layer).from_config(layer.get_config()).preserves == preserves
    with pytest.raises(ValueError, match="must be one of"):
        OrthogonalDense(3, preserves="volume")
    layer = OrthogonalDense(5, preserves="norms", use_bias=False, activation=None)
    y = np.asarray(keras.ops.convert_to_numpy(layer(X[:, :5])), np.float64)
    assert np.allclose(np.linalg.norm(y, axis=1), np.linalg.norm(X[:, :5], axis=1), rtol=1e-5)


def test_what_would_move_the_kernel_off_the_manifold_is_refused():
    with pytest.raises(ValueError, match="not both"):
        OrthogonalDense(3, kernel_constraint="non_neg")
    with pytest.raises(ValueError, match="must not be steeper than 1"):
        OrthogonalDense(3, activation="selu")
    layer = OrthogonalDense(2, activation=MaxMin())
    model = keras.Sequential([keras.Input((4,)), OrthogonalDense(4, "relu"), layer])
    with pytest.raises(ValueError, match="adapter"):
        layer.enable_lora(2)
    with pytest.raises(ValueError, match="quantize"):
        layer.quantize("int8")
    with pytest.raises(ValueError, match="takes no constraint"):
        tfl.constrain(model, 0.9)
    assert layer.kernel.constraint is None
