"""The Parseval constraint moves singular values as its equation says, and promises no more."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_lyapunov.constraints import ParsevalFrame


def applied(constraint, kernel):
    return keras.ops.convert_to_numpy(constraint(np.asarray(kernel, "float32")))


def singular_values(kernel):
    return np.linalg.svd(np.reshape(kernel, (-1, kernel.shape[-1])).astype(float), compute_uv=False)


@given(
    shape=st.sampled_from([(3, 5), (5, 3), (4, 4), (3, 3, 2, 4), (2, 1, 6), (1, 7)]),
    step=st.floats(1e-4, 1.0),
    seed=st.integers(0, 10**6),
)
def test_every_singular_value_moves_by_the_equation(shape, step, seed):
    kernel = np.random.default_rng(seed).normal(size=shape).astype("float32")
    before = singular_values(kernel)
    expected = np.sort(np.abs((1 + step) * before - step * before**3))
    found = np.sort(singular_values(applied(ParsevalFrame(step), kernel)))
    # Two products of float32 matrices with up to 18 terms each.
    scale = before.max() + before.max() ** 3
    assert np.allclose(found, expected, rtol=0, atol=64 * np.finfo("float32").eps * scale)


@pytest.mark.parametrize(("scaled", "target"), [(False, 1.0), (True, 1 / np.sqrt(2 * 9 + 1))])
def test_repeated_steps_reach_a_frame_which_the_released_code_scales(scaled, target):
    kernel = 0.05 * np.random.default_rng(0).normal(size=(3, 3, 2, 4))
    constraint = ParsevalFrame(0.5, scale_convolutions=scaled)
    for _ in range(60):
        kernel = applied(constraint, kernel)
    assert np.allclose(singular_values(kernel), target, rtol=1e-5)


def test_dense_kernels_are_not_scaled():
    kernel = np.diag([0.5, 2.0])
    assert np.array_equal(
        applied(ParsevalFrame(0.1, scale_convolutions=True), kernel),
        applied(ParsevalFrame(0.1), kernel),
    )


def test_large_singular_values_diverge_as_documented():
    below, above = (np.diag([s, 1.0]) for s in (0.99 * 201**0.5, 1.01 * 201**0.5))
    assert singular_values(applied(ParsevalFrame(0.01), below))[0] < below[0, 0]
    assert singular_values(applied(ParsevalFrame(0.01), above))[0] > above[0, 0]


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_it_acts_in_fit_on_master_weights_and_is_saved(policy, tmp_path):
    layer = keras.layers.Dense(
        4, kernel_constraint=ParsevalFrame(0.5), kernel_initializer="zeros", dtype=policy
    )
    model = keras.Sequential([keras.Input((4,)), layer])
    layer.kernel.assign(np.diag([0.5, 0.5, 0.8, 1.0]))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(np.ones((4, 4)), np.ones((4, 4)), epochs=25, verbose=0)
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    assert kernel.dtype == np.float32
    assert np.allclose(kernel, np.eye(4), atol=1e-5)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.layers[0].kernel_constraint.get_config() == ParsevalFrame(0.5).get_config()


@pytest.mark.parametrize("options", [{"step": 0}, {"step": 1.5}, {"step": float("nan")}])
def test_impossible_steps_are_refused(options):
    with pytest.raises(ValueError, match="step"):
        ParsevalFrame(**options)


def test_vectors_and_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="biases"):
        ParsevalFrame()(np.ones(3, "float32"))
    with pytest.raises(TypeError, match="scale_convolutions"):
        ParsevalFrame(scale_convolutions="yes")
    with pytest.raises(ValueError, match="unknown"):
        ParsevalFrame.from_config({"unknown": 1})
