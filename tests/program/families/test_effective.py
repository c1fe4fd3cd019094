"""Certificates of this library's layers with weights: read from the weights, and never exceeded."""

import functools

import keras
import numpy as np
import pytest
from derivatives import amplification
from keras import ops
from scipy.io import loadmat

from tf_lyapunov import layers as ours
from tf_lyapunov.bounds.composition import rounding_errors
from tf_lyapunov.bounds.stages import stages
from tf_lyapunov.bounds.tails import dense_tail
from tf_lyapunov.callbacks import LyapunovMonitor
from tf_lyapunov.certification import certify, lipschitz_upper_bound, read_network
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.condensing import condense
from tf_lyapunov.matlab import export_mat, import_mat
from tf_lyapunov.program.families import fourier, potential, sandwich, skew
from tf_lyapunov.program.logits import Float64Logits

IMAGE = (6, 5, 3)
CASES = {
    "convex potential": ((6,), functools.partial(ours.ConvexPotentialDense, 8, activation="elu")),
    "convex potential 1d": ((7, 3), functools.partial(ours.ConvexPotentialConv1D, 4)),
    "convex potential 2d": (
        IMAGE,
        functools.partial(ours.ConvexPotentialConv2D, 4, kernel_size=(3, 2)),
    ),
    "softmax": ((6,), functools.partial(ours.SoftmaxPotential, 8, 4.0)),
    "sdp": ((6,), functools.partial(ours.SDPLipschitzDense, 8)),
    "sdp 1d": ((7, 3), functools.partial(ours.SDPLipschitzConv1D, 4)),
    "sdp 2d": (IMAGE, functools.partial(ours.SDPLipschitzConv2D, 4, activation="tanh")),
    "sandwich": ((6,), functools.partial(ours.SandwichDense, 5)),
    "sandwich 2d": (IMAGE, functools.partial(ours.SandwichConv2D, 4, strides=2)),
    "cayley 2d": (IMAGE, functools.partial(ours.CayleyConv2D, 4, 3, strides=2)),
    "cayley 2d, wider": (IMAGE, functools.partial(ours.CayleyConv2D, 5, 3, activation="relu")),
    "reflector 2d": (IMAGE, functools.partial(ours.BlockReflectorConv2D, 4, 3, rank=2)),
    "reflector": ((6,), functools.partial(ours.BlockReflectorDense, 4)),
    "skew 2d": (IMAGE, functools.partial(ours.SkewOrthogonalConv2D, 4, 3)),
    "cayley": ((6,), functools.partial(ours.CayleyDense, 4)),
    "björck": ((6,), functools.partial(ours.BjorckDense, 4)),
    "spectral": ((6,), functools.partial(ours.SpectralDense, 4)),
    "frobenius": ((6,), functools.partial(ours.FrobeniusDense, 4)),
    "almost orthogonal": ((6,), functools.partial(ours.AlmostOrthogonalDense, 4)),
    "almost orthogonal 1d": ((7, 3), functools.partial(ours.AlmostOrthogonalConv1D, 4, 3)),
    "almost orthogonal 2d": (IMAGE, functools.partial(ours.AlmostOrthogonalConv2D, 4, 3, 2)),
    "spectral 2d": (IMAGE, functools.partial(ours.SpectralConv2D, 4, 3, strides=2)),
    "spectral 1d": ((7, 3), functools.partial(ours.SpectralConv1D, 4, 3, padding="causal")),
}
DTYPES = ("float32", "mixed_bfloat16", "mixed_float16")
# Differences of float32 outputs of size 10 over a distance of 0.5.
FLOAT32 = 1 + 2.0**-24 * 20 * 64


def built(name, seed=0, dtype="float32", **arguments):
    """A model of one layer with random raw weights."""
    shape, make = CASES[name]
    model = keras.Sequential([keras.Input(shape), make(dtype=dtype, **arguments)])
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(0.5 * rng.standard_normal(variable.shape))
    return model


def gain(model):
    return lipschitz_upper_bound(model).gain_upper_bound


def search(model, steps=12):
    """Largest amplification found."""
    return amplification(lambda x: model(x), model.input_shape[1:], starts=6, steps=steps)


def layer_of(model):
    return model.layers[-1]


def test_every_layer_with_weights_has_a_rule():
    weighted = {
        cls
        for cls in vars(ours).values()
        if isinstance(cls, type) and issubclass(cls, ours.LipschitzLayer)
    } - {ours.LipschitzLayer, ours.NormalizedDense}
    assert {type(layer_of(built(name))) for name in CASES} == weighted
    assert {c for family in (fourier, potential, sandwich, skew) for c in family.RULES} < weighted


@pytest.mark.parametrize("name", CASES)
def test_no_pair_of_inputs_beats_the_gain_which_keeps_to_its_promise(name):
    model = built(name, max_gain=0.7)
    proved = gain(model)
    found = search(model)
    assert found <= proved * FLOAT32
    assert proved <= 0.7 * layer_of(model).rounding_inflation * (1 + 1e-9)
    assert found >= 0.2 * proved  # the search finds something


@pytest.mark.parametrize("name", [n for n in CASES if "2d" in n and "sand" not in n][3:])
def test_the_gain_of_a_linear_layer_is_the_norm_of_the_map_that_it_computes(name):
    model = built(name, use_bias=False, **({"activation": None} if "wider" in name else {}))
    size = int(np.prod(model.input_shape[1:]))
    basis = np.eye(size, dtype="float32").reshape(size, *model.input_shape[1:])
    true = np.linalg.norm(ops.convert_to_numpy(model(basis)).reshape(size, -1), 2)
    rounding = 64 * 2.0**-24 * size
    assert gain(model) >= true * (1 - rounding)
    # A zero-padded map may be smaller than its bound; a skew one is orthogonal.
    assert gain(model) <= true * (1.02 if "almost" in name or "spectral" in name else 1 + 1e-4)


@pytest.mark.parametrize("name", [n for n in CASES if "skew" not in n])
def test_a_cache_of_larger_weights_is_noticed(name):
    model = built(name, use_bias=False)
    before, layer = gain(model), layer_of(model)
    layer.effective_values()  # fills the cache
    for variable in layer._cache[: 1 if "scale" in layer._effective_names else None]:
        variable.assign(6 * ops.convert_to_tensor(variable))
    after = gain(model)
    assert after > 5 * before
    assert before < search(model) <= after * FLOAT32


def test_a_skew_filter_that_is_not_skew_any_more_is_noticed():
    model = built("skew 2d", use_bias=False)
    layer = layer_of(model)
    kernel = layer.effective_values()["kernel"]
    kernel[1, 1] += 0.5 * np.eye(kernel.shape[-1])
    layer._cache[0].assign(kernel)
    assert 1.2 < search(model) <= gain(model) * FLOAT32


def test_a_step_that_is_too_long_is_measured():
    layer = ours.ConvexPotentialDense(8, norm=None, step=3.0)
    model = keras.Sequential([keras.Input((6,)), layer])
    proved = gain(model)
    assert 1.0 < search(model, steps=60) <= proved * FLOAT32
    with pytest.raises(UnsupportedLayerError, match="norm='bound'"):
        stages(keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(2)]))


def test_a_convolution_called_at_a_larger_size_than_it_was_built_for_is_bounded_there():
    arguments = {"norm": None, "step": 0.125, "use_bias": False, "activation": "linear"}
    layer = ours.ConvexPotentialConv2D(1, 3, **arguments)
    layer.build((None, 2, 2, 1))
    layer.kernel.assign(np.ones((3, 3, 1, 1)))
    small, large = keras.Input((2, 2, 1)), keras.Input((12, 12, 1))
    assert gain(keras.Model(small, layer(small))) <= 1 + 1e-9
    model = keras.Model(large, layer(large))
    basis = np.eye(144, dtype="float32").reshape(144, 12, 12, 1)
    true = np.linalg.norm(ops.convert_to_numpy(model(basis)).reshape(144, 144), 2)
    assert 5 < true <= gain(model) <= true * (1 + 1e-4)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in CASES for dtype in DTYPES[:2]),
        *((name, DTYPES[2]) for name in ("sdp", "sandwich 2d", "cayley 2d", "skew 2d")),
    ],
)
def test_the_error_models_cover_what_is_computed(name, dtype):
    model = built(name, seed=1, dtype=dtype)
    x = np.random.default_rng(2).standard_normal((8, *model.input_shape[1:])).astype("float32")
    network, norms = read_network(model), np.linalg.norm(x.reshape(8, -1), axis=1)
    exact = Float64Logits(network).predict(x, 8).reshape(8, -1)
    computed = ops.convert_to_numpy(ops.cast(model(x), "float64")).reshape(8, -1)
    distances = np.linalg.norm(computed - exact, axis=1)
    own = rounding_errors(network, norms, network.output)
    float64 = rounding_errors(network, norms, network.output, "float64")
    assert np.all(distances <= own + float64)
    assert np.all(distances > 0) or dtype == "float32"
    assert np.all(float64 <= 1e-5 * norms)
    if dtype == "float32":
        assert np.all(own <= 1e-3 * norms)


def test_the_float64_evaluation_uses_the_weights_of_the_original():
    """A copy that computed its own would differ by their rounding, about 1e-8."""
    kernel = np.diag([1.0, 0.3]).astype("float32")
    model = keras.Sequential([keras.Input((2,)), ours.SpectralDense(2, use_bias=False)])
    layer_of(model).kernel.assign(kernel)
    exact = layer_of(model).effective_values()["kernel"]
    copy = Float64Logits(read_network(model))
    assert np.array_equal(copy.predict(np.eye(2), 2), exact)
    assert not np.array_equal(exact, 1.0 * kernel)


def test_fused_sorting_keeps_the_gain_and_its_weights_exist_after_build():
    layer = ours.SpectralConv2D(4, 3, activation=ours.Householder())
    model = keras.Sequential([keras.Input((6, 6, 3)), layer])
    assert "angle" in {v.name for v in model.trainable_variables}
    kinds = [node.kind for node in read_network(model).nodes]
    assert kinds == ["input", "linear", "activation"]
    assert gain(model) <= 1 + 1e-9


def classifier(**arguments):
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            ours.ChannelPadding(4),
            ours.ConvexPotentialConv2D(6),
            ours.CayleyConv2D(8, 3, strides=2, activation=ours.MaxMin()),
            ours.SkewOrthogonalConv2D(8, 3, activation="relu"),
            ours.SandwichConv2D(8),
            keras.layers.Flatten(),
            ours.SDPLipschitzDense(16),
            ours.SandwichDense(24),
            ours.BjorckDense(16, activation=ours.GroupSort()),
            ours.NormalizedDense(3),
        ]
    )


def data(count=64):
    rng = np.random.default_rng(3)
    y = rng.integers(0, 3, count)
    x = rng.standard_normal((count, 6, 6, 1)) + 0.5 * y[:, None, None, None]
    return x.astype("float32"), y


def test_a_trained_model_keeps_to_the_product_of_its_promises():
    model, (x, y) = classifier(), data()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.1), loss, jit_compile=False)
    model.fit(x, y, verbose=0)
    layers = [v for v in model.layers if isinstance(v, ours.LipschitzLayer)]
    promised = np.prod([v.max_gain * v.rounding_inflation for v in layers])
    proof = certify(model, x, y)
    assert 0.5 < proof.gain_upper_bound <= promised * (1 + 1e-9)
    assert proof.radius.max() > 0
    assert search(model, steps=6) <= proof.gain_upper_bound * FLOAT32


def test_pairs_of_classes_use_the_columns_of_the_last_layer():
    model, (x, _) = classifier(), data(16)
    proof = certify(model, x)
    columns = layer_of(model).effective_values()["kernel"]
    before = gain(keras.Model(model.inputs, model.layers[-2].output))
    logits = model.predict(x, verbose=0).astype("float64")
    tops = np.argmax(logits, axis=1)
    radii = []
    for row, top in zip(logits, tops, strict=True):
        others = [j for j in range(3) if j != top]
        distance = [np.linalg.norm(columns[:, top] - columns[:, j]) * before for j in others]
        limit = np.sqrt(2) * proof.gain_upper_bound
        quotients = [(row[top] - row[j]) / min(d, limit)
                     for j, d in zip(others, distance, strict=True)]  # fmt: skip
        radii.append(min(quotients))
    allowance = 1e-4  # the model's rounding, taken off every margin
    assert np.all(proof.radius <= np.array(radii) + 1e-6)
    assert np.all(proof.radius >= np.array(radii) - allowance)
    assert np.median(radii) > 100 * allowance


def test_input_normalisation_inside_the_model_counts():
    layers = [ours.SpectralDense(8, activation=ours.MaxMin()), ours.NormalizedDense(3)]
    inner = keras.Sequential([keras.Input((6,)), *layers])
    scales = np.array([0.25, 0.5, 1.0, 0.25, 2.0, 0.5])
    normalization = keras.layers.Normalization(mean=np.zeros(6), variance=scales**2)
    model = keras.Sequential([keras.Input((6,)), normalization, *layers])
    assert gain(model) == pytest.approx(4 * gain(inner), rel=1e-5)
    x = np.random.default_rng(0).standard_normal((16, 6))
    radii = certify(model, x).radius
    assert np.median(radii) > 1e-3
    np.testing.assert_allclose(radii, certify(inner, x / scales).radius / 4, atol=1e-5)


def test_dense_chains_of_these_layers_are_read_by_the_tighter_methods():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            ours.SpectralDense(5, activation="relu"),
            ours.AlmostOrthogonalDense(4, activation="tanh"),
            ours.NormalizedDense(3),
        ]
    )
    chain = dense_tail(read_network(model)).chain
    assert chain.widths == (6, 5, 4, 3)
    kernel = model.layers[0].effective_values()["kernel"]
    assert np.array_equal(chain.weights[0], kernel.T)
    x = np.random.default_rng(0).standard_normal((4, 6))
    composed, multiplied = certify(model, x), certify(model, x, method="lipsdp")
    assert multiplied.gain_upper_bound < 0.95 * composed.gain_upper_bound


def test_a_small_convolution_of_these_layers_is_a_matrix_of_the_chain():
    layers = [ours.SpectralConv2D(2, 3, activation="relu"), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((4, 4, 1)), *layers, ours.SpectralDense(3)])
    chain = dense_tail(read_network(model)).chain
    basis = np.eye(16, dtype="float32").reshape(16, 4, 4, 1)
    plain = ours.SpectralConv2D(2, 3, use_bias=False)
    plain.build((None, 4, 4, 1))
    plain.kernel.assign(model.layers[0].kernel)
    outputs = ops.convert_to_numpy(plain(basis)).reshape(16, -1)
    np.testing.assert_allclose(chain.weights[0], outputs.T, atol=1e-6)


def test_stages_and_the_monitor_measure_the_effective_kernel():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            ours.SpectralDense(5, activation="relu", max_gain=0.5),
            ours.SDPLipschitzDense(8, max_gain=2.0),
            ours.SpectralDense(3),
        ]
    )
    first, last = stages(model)
    assert (first.post_gain, last.post_gain) == (pytest.approx(2.0), 1.0)
    monitor = LyapunovMonitor()
    monitor.set_model(model)
    monitor.read()
    model.layers[0].kernel.assign(np.eye(6, 5))  # stales the cache
    reading = monitor.read()
    true = np.linalg.norm(model.layers[0].effective_values()["kernel"], 2)
    assert reading.sigma_upper_bound[first.name] == pytest.approx(2 * true, rel=1e-3)
    assert reading.gain_upper_bound >= 0.99 * gain(model)


def test_weights_that_are_not_finite_are_refused():
    for name in ("convex potential", "sandwich", "cayley 2d", "skew 2d", "spectral"):
        model = built(name)
        layer_of(model).kernel.assign(np.nan * np.ones(layer_of(model).kernel.shape))
        with pytest.raises(ValueError, match=r"finite|NaN"):
            gain(model)


def test_the_certificate_of_a_condensed_model_is_the_same():
    model, (x, y) = classifier(), data(16)
    before = certify(model, x, y)
    outputs = model.predict(x, verbose=0)
    condense(model)
    for layer in model.layers:
        if isinstance(layer, ours.LipschitzLayer):
            layer.kernel.assign(ops.zeros_like(layer.kernel))
    assert np.array_equal(model.predict(x, verbose=0), outputs)
    after = certify(model, x, y)
    assert np.array_equal(after.radius, before.radius)
    assert after.gain_upper_bound == before.gain_upper_bound
    assert not model.trainable_variables


def test_a_condensed_model_saves_as_a_trainable_one_and_takes_no_weights(tmp_path):
    model, (x, _) = classifier(), data(4)
    outputs = condense(model).predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), outputs, atol=1e-5)
    model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="condensed layer takes no weights"):
        model.load_weights(tmp_path / "model.weights.h5")


def test_only_built_and_finite_layers_are_condensed():
    with pytest.raises(ValueError, match="must be built"):
        condense(keras.Sequential([ours.SpectralDense(2)]))
    model = built("spectral")
    layer_of(model).kernel.assign(np.nan * np.ones((6, 4)))
    with pytest.raises(ValueError, match="must be finite"):
        condense(model)


def test_a_mat_file_holds_the_effective_kernels_and_gives_them_back(tmp_path):
    image = keras.Input((6, 6, 2))
    layers = [
        ours.SpectralConv2D(3, 3, strides=2, activation="relu"),
        ours.ConvexPotentialConv2D(4),
        keras.layers.Flatten(),
        ours.CayleyDense(3),
    ]
    model = keras.Model(image, keras.Sequential(layers)(image))
    export_mat(tmp_path / "model.mat", model=model)
    content = loadmat(tmp_path / "model.mat", simplify_cells=True)["network"]
    kinds = [node["kind"] for node in content["nodes"]]
    assert kinds == ["input", "linear", "activation", "lipschitz", "reshape", "linear"]
    for record, layer in zip(content["maps"], (layers[0], layers[3]), strict=True):
        assert np.array_equal(record["kernel"], layer.effective_values()["kernel"])
    assert content["nodes"][3]["gain"] == read_network(model).nodes[3].gain_upper_bound
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 2))
    before = model.predict(x, verbose=0)
    for layer in (layers[0], layers[3]):
        layer.kernel.assign(ops.zeros_like(layer.kernel))
    import_mat(tmp_path / "model.mat").assign_to(model)
    assert np.array_equal(model.predict(x, verbose=0), before)
