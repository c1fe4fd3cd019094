"""Row sums bound true norms, the three-part loss is its formula, and l2nn expands nothing."""

import keras
import numpy as np
import pytest
from derivatives import gradient
from hypothesis import given
from hypothesis import strategies as st
from keras import layers
from layer_maps import true_norm

from tf_lyapunov import certify
from tf_lyapunov.regularizers import RowSumPenalty
from tf_lyapunov.spectral.row_sums import row_sum_bound
from tf_lyapunov.training import NonexpansiveModel, distance_contraction, l2nn

EPS = float(np.finfo("float32").eps)


@given(rows=st.integers(1, 7), columns=st.integers(1, 7), seed=st.integers(0, 10**6))
def test_dense_row_sums_are_their_formula_and_bound_the_squared_norm(rows, columns, seed):
    w = np.random.default_rng(seed).normal(size=(rows, columns))
    found = float(row_sum_bound(w.astype("float32")))
    expected = min(np.abs(m).sum(axis=1).max() for m in (w.T @ w, w @ w.T))
    assert np.isclose(found, expected, rtol=32 * EPS)
    assert np.linalg.norm(w, 2) ** 2 <= found * (1 + 32 * EPS)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Conv1D", {}),
        ("Conv2D", {}),
        ("Conv2D", {"strides": 2}),
        ("Conv2D", {"dilation_rate": 2}),
        ("Conv2D", {"groups": 2}),
        ("Conv2DTranspose", {"strides": 2}),
        ("Conv3D", {}),
    ],
)
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_convolution_row_sums_bound_the_true_map(kind, options, padding, kernel_size):
    rank = int(kind[4])
    layer = getattr(layers, kind)(
        4, kernel_size, padding=padding, use_bias=False, kernel_initializer="normal", **options
    )
    shape = (*([6] if rank < 3 else [4]) * rank, 2)
    layer.build((None, *shape))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        kernel = rng.normal(size=layer.kernel.shape)
        layer.kernel.assign(np.abs(kernel) if seed == 2 else kernel)
        bound = float(row_sum_bound(layer.kernel, options.get("groups", 1)))
        assert true_norm(layer, shape) ** 2 <= bound * (1 + 64 * EPS)


def test_the_bound_is_attained_by_a_constant_kernel_and_the_reshaped_norm_falls_short():
    kernel = np.ones((3, 3, 1, 1), "float32")
    assert np.isclose(float(row_sum_bound(kernel)), 81.0)  # the symbol at 0 is 9
    layer = layers.Conv2D(1, 3, padding="same", use_bias=False)
    layer.build((None, 24, 24, 1))
    layer.kernel.assign(kernel)
    # The reshaped kernel, a vector of nine ones, has norm 3: negative control.
    assert 3.0 < 8.5 < true_norm(layer, (24, 24, 1)) <= 9.0


def test_the_penalty_vanishes_where_the_gain_is_proved_and_pulls_elsewhere():
    w = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    inside = w / np.sqrt(float(row_sum_bound(w)) * 1.01)
    assert float(RowSumPenalty(1.0)(inside)) == 0.0
    penalty, moving = RowSumPenalty(1.0, max_gain=2.0), 5 * w
    for _ in range(100):
        moving = (moving - 0.01 * gradient(penalty, moving)).astype("float32")
    assert float(row_sum_bound(moving)) <= 0.1 * float(row_sum_bound(5 * w))


def test_bounds_of_impossible_kernels_and_settings_are_refused():
    with pytest.raises(ValueError, match="dense kernel"):
        row_sum_bound(np.ones(3, "float32"))
    with pytest.raises(ValueError, match="divide"):
        row_sum_bound(np.ones((3, 2, 3), "float32"), groups=2)
    with pytest.raises(ValueError, match="factor"):
        RowSumPenalty(-1.0)
    with pytest.raises(ValueError, match="max_gain"):
        RowSumPenalty(max_gain=0.0)


def test_distance_contraction_is_its_formula_with_finite_gradients_at_equal_inputs():
    rng = np.random.default_rng(0)
    x, h = rng.normal(size=(6, 4)), rng.normal(size=(6, 2, 3))
    x[3], h[1] = x[2], h[0]
    before = np.linalg.norm(x - np.roll(x, -1, axis=0), axis=1)
    rows = h.reshape(6, -1)
    after = np.linalg.norm(rows - np.roll(rows, -1, axis=0), axis=1)
    apart = before > 0
    expected = np.sum(np.maximum(0, 1 - after[apart] / before[apart])) / 6
    x, h = x.astype("float32"), h.astype("float32")
    assert np.isclose(float(distance_contraction(x, h)), expected, rtol=1e-5)
    assert np.all(np.isfinite(gradient(lambda z: distance_contraction(x, z), h)))
    assert float(distance_contraction(x, 2 * x)) == 0.0


def classifier(**options):
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, "relu", name="h", **options), layers.Dense(3)]
    )


def log_softmax(f):
    return f - np.log(np.exp(f).sum(axis=1, keepdims=True))


def test_the_three_part_loss_is_its_formula():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 4)).astype("float32"), rng.integers(0, 3, 10)
    model = classifier()
    trained = NonexpansiveModel(
        model, ["h"], scale=2.0, gap_scale=3.0, common=0.5, gap=0.7, distance=0.4
    )
    trained.class_scales.assign([1.0, 2.0, 0.5])
    trained.compile(keras.optimizers.SGD(0.0), metrics=["sparse_categorical_accuracy"])
    history = trained.fit(x, y, batch_size=10, shuffle=False, verbose=0).history
    f, rows = model.predict(x, verbose=0).astype(float), np.arange(10)
    own = log_softmax(f * [1.0, 2.0, 0.5])[rows, y]
    common = log_softmax(2.0 * f)[rows, y]
    gap = np.log(1 - np.exp(log_softmax(3.0 * f)[rows, y])) / 3.0
    expected = np.mean(-own - 0.5 * common + 0.7 * gap)
    plain = trained.evaluate(x, y, batch_size=10, verbose=0, return_dict=True)
    assert np.isclose(plain["loss"], expected, rtol=1e-5)
    hidden = keras.ops.convert_to_numpy(model.layers[0](x))
    kept = [float(distance_contraction(x, h)) for h in (f.astype("float32"), hidden)]
    assert np.isclose(history["loss"][0], expected + 0.4 * np.mean(kept), rtol=1e-5)


def test_confident_logits_lose_no_gap_to_cancellation():
    trained = NonexpansiveModel(classifier(), gap=1.0, gap_scale=5.0, common=0.0)
    logits = np.array([[40.0, 0.0, 0.0]], "float32")
    loss = float(trained.evaluated(trained, None, np.array([0]), logits, None))
    assert np.isclose(loss, (np.log(2) - 200.0) / 5, rtol=1e-5)  # log(1 - p) = log 2 - 200


def test_class_scales_are_trained_outside_the_ordinary_model(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 4)).astype("float32"), rng.integers(0, 3, 16)
    trained = NonexpansiveModel(classifier(dtype="mixed_bfloat16"), ["h"], distance=0.1)
    trained.compile(keras.optimizers.SGD(0.1))
    trained.fit(x, y, verbose=0)
    assert len(trained.plain.trainable_variables) == 4 == len(trained.trainable_variables) - 1
    assert not np.allclose(trained.class_scales.numpy(), 5.0)
    assert all(np.all(np.isfinite(w)) for w in trained.get_weights())
    trained.save(tmp_path / "w.keras")
    again = keras.models.load_model(tmp_path / "w.keras")
    assert np.array_equal(again.class_scales.numpy(), trained.class_scales.numpy())
    assert again.layer_names == ["h"] and again.distance == 0.1


def test_l2nn_is_certified_nonexpansive_before_and_after_training():
    rng = np.random.default_rng(0)
    x, y = rng.random((24, 8, 8, 1)).astype("float32"), rng.integers(0, 3, 24)
    model = l2nn((8, 8, 1), 3, filters=(3,), widths=(8,), penalty=1e-3)
    # The bound of each of five kernels is at most 1, the product in float64 a few ulps more.
    assert certify(model, x).gain_upper_bound <= 1 + 1e-6
    trained = NonexpansiveModel(model, distance=0.1)
    trained.compile(keras.optimizers.SGD(5.0))
    trained.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert certify(model, x).gain_upper_bound <= 1 + 1e-6


def test_networks_and_losses_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="pixels"):
        l2nn((3, 8, 1), 3, filters=(2, 2))
    with pytest.raises(ValueError, match="classes"):
        l2nn((8, 8, 1), 1)
    with pytest.raises(ValueError, match="two logits"):
        NonexpansiveModel(keras.Sequential([keras.Input((2,)), layers.Dense(1)]))
    with pytest.raises(ValueError, match="nowhere"):
        NonexpansiveModel(classifier(), ["nowhere"])
    with pytest.raises(ValueError, match="innermost"):
        NonexpansiveModel(NonexpansiveModel(classifier()))
    with pytest.raises(ValueError, match="gap_scale"):
        NonexpansiveModel(classifier(), gap_scale=0.0)
