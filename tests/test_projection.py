"""`constrain` and `project` on sequential, functional, nested, subclassed and compiled models."""

import math

import keras
import numpy as np
import pytest

from tf_lyapunov.bounds.stages import stages
from tf_lyapunov.callbacks import LyapunovMonitor
from tf_lyapunov.constraints import SpectralBound
from tf_lyapunov.design import spectral_design
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.projection import constrain, project
from tf_lyapunov.spectral.precision import unit_roundoff
from tf_lyapunov.spectral.projections import ABSOLUTE, scaled_below
from tf_lyapunov.spectral.reading import linear_maps
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap
from tf_lyapunov.theory.sectors import Indices, Sector

layers = keras.layers
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
# Float32 weights move by half a unit in the last place when they are stored.
ROUNDING = 1 + np.finfo(np.float32).eps


def true_norms(model):
    """Float64 norm of every kernel of the model's stages, by stage name."""
    return {
        stage.name: [
            norm_upper_bound(keras.ops.convert_to_numpy(kernel), linear_map).value
            for kernel, linear_map in linear_maps(stage.layer)
        ]
        for stage in stages(model)
    }


def scramble(model, scale=3.0, seed=0):
    """Weights far outside every budget."""
    rng = np.random.default_rng(seed)
    model.set_weights([np.abs(scale * rng.normal(size=w.shape)) for w in model.get_weights()])


def sequential():
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(4, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(3, 2),
            layers.Flatten(),
            layers.Dense(5),
        ]
    )


def functional():
    x = inputs = keras.Input((6,))
    x = layers.Dense(6, activation="relu", name="first")(x)
    x = layers.Add()([x, layers.Dense(6, name="branch")(x)])
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def nested():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(4, activation="tanh", name="inner")])
    return keras.Sequential([keras.Input((6,)), inner, layers.Dense(3, name="outer")])


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(5, activation="relu", name="first")
        self.second = layers.Dense(2, name="second")

    def call(self, x):
        return self.second(self.first(x))


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 4), "float32"))
    return model


@pytest.mark.parametrize("build", [sequential, functional, nested, subclassed])
def test_every_kernel_is_inside_its_budget_after_constrain(build):
    model = build()
    scramble(model)
    budgets = {stage.name: 0.7 + 0.1 * i for i, stage in enumerate(stages(model))}
    constrain(model, budgets)
    norms = true_norms(model)
    for stage in stages(model):
        assert np.prod(norms[stage.name]) * stage.post_gain <= budgets[stage.name] * ROUNDING


def test_the_budget_of_a_convolution_pays_for_the_pooling_after_it():
    model = sequential()
    scramble(model)
    constrain(model, [1.0, 1.0])
    convolution = model.layers[0]
    assert convolution.kernel_constraint.max_gain == pytest.approx(0.5)  # 3/2 pooling: gain 2
    assert 0.4 < true_norms(model)[convolution.name][0] <= 0.5 * ROUNDING


def test_separable_depthwise_and_transposed_convolutions_take_budgets():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.SeparableConv2D(4, 3, padding="same"),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.Conv2DTranspose(2, 3, strides=2, padding="same"),
        ]
    )
    scramble(model)
    constrain(model, [0.5, 0.6, 0.7])
    for norms, budget in zip(true_norms(model).values(), [0.5, 0.6, 0.7], strict=True):
        assert 0.2 * budget < np.prod(norms) <= budget * ROUNDING
    separable, depthwise, _ = model.layers
    assert separable.depthwise_constraint is separable.depthwise_kernel.constraint
    assert separable.pointwise_constraint is separable.pointwise_kernel.constraint
    assert depthwise.depthwise_constraint is depthwise.kernel.constraint


def test_a_compiled_model_trains_under_constraints_set_after_it_was_compiled():
    model = functional()
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    y = np.arange(64) % 3
    model.fit(x, y, epochs=1, verbose=0)  # traces the unconstrained step
    constrain(model, {"first": 0.3, "branch": 0.2, "head": 0.5})
    model.fit(100 * x, y, epochs=3, verbose=0)
    norms = true_norms(model)
    for name, budget in {"first": 0.3, "branch": 0.2, "head": 0.5}.items():
        assert norms[name][0] <= budget * ROUNDING


def test_project_enforces_after_set_weights_and_leaves_inner_kernels_untouched():
    model = functional()
    constrain(model, {"first": 0.3, "branch": 0.2, "head": 50.0})
    before = keras.ops.convert_to_numpy(model.get_layer("head").kernel).copy()
    scramble_first = model.get_layer("first")
    scramble_first.kernel.assign(5 * np.ones((6, 6)))
    project(model)
    assert true_norms(model)["first"][0] <= 0.3 * ROUNDING
    after = keras.ops.convert_to_numpy(model.get_layer("head").kernel)
    np.testing.assert_array_equal(after, before)


def test_batch_normalization_is_held_at_gain_one():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(2)]
    )
    norm = model.layers[1]
    constrain(model, [1.0, 1.0])
    norm.gamma.assign([5.0, -7.0, 0.1, 1.0])
    norm.moving_variance.assign([0.01, 4.0, 1.0, 1.0])
    project(model)
    gamma = keras.ops.convert_to_numpy(norm.gamma).astype(float)
    variance = keras.ops.convert_to_numpy(norm.moving_variance).astype(float)
    gains = np.abs(gamma) / np.sqrt(variance + norm.epsilon)
    assert gains.max() <= 1
    assert np.sign(gamma[1]) == -1 and gains[0] == pytest.approx(1, rel=1e-5)
    assert gamma[2] == np.float32(0.1)


def test_batch_normalization_without_a_scale_is_refused():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(scale=False)]
    )
    with pytest.raises(ValueError, match="scale=True"):
        constrain(model, [1.0])


def test_constraints_survive_saving_and_loading(tmp_path):
    model = sequential()
    constrain(model, [0.8, 0.6])
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    for old, new in zip(model.layers, loaded.layers, strict=True):
        if hasattr(old, "kernel"):
            assert isinstance(new.kernel.constraint, SpectralBound)
            assert new.kernel.constraint.get_config() == old.kernel.constraint.get_config()


def test_a_conic_design_makes_square_layers_strictly_passive():
    leaky = Sector.of("leaky_relu", negative_slope=0.5)
    claim = Indices(delta=0.3, nu=0.05)
    design = spectral_design(claim, [leaky, Sector.linear()])
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(5, use_bias=False),
            layers.LeakyReLU(negative_slope=0.5),
            layers.Dense(5, use_bias=False),
        ]
    )
    scramble(model)
    constrain(model, design)
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 2000, 5)).astype("float32")
    dx = (u - v).astype(float)
    dy = keras.ops.convert_to_numpy(model(u) - model(v)).astype(float)
    supply = (dx * dy).sum(1) - claim.delta * (dy**2).sum(1) - claim.nu * (dx**2).sum(1)
    assert supply.min() >= -1e-5 * (dx**2).sum(1).max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"design": [1.0]}, "one budget per stage"),
        ({"design": [1.0, 1.0, 1.0, 1.0]}, "one budget per stage"),
        ({"design": {"nowhere": 1.0}}, "name layers with a kernel"),
        ({"design": [1.0], "layers": ["nowhere"]}, "name layers with a kernel"),
        ({"design": {"head": -1.0}}, "positive"),
    ],
)
def test_designs_that_do_not_fit_the_model_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        constrain(functional(), **arguments)


def test_an_activation_outside_the_designs_sector_is_refused():
    design = spectral_design(gain=1.0, sectors=[Sector.of("sigmoid"), Sector.linear()])
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(3, activation="relu"), layers.Dense(2)]
    )
    with pytest.raises(ValueError, match="leaves the design's"):
        constrain(model, design)


def test_project_refuses_nan_and_changes_nothing():
    model = functional()
    constrain(model, {"first": 0.3, "branch": 0.2, "head": 0.5})
    model.get_layer("first").kernel.assign(9 * np.ones((6, 6)))
    model.get_layer("head").kernel.assign(np.full((6, 3), np.nan))
    with pytest.raises(ValueError, match="diverged"):
        project(model)
    assert np.all(keras.ops.convert_to_numpy(model.get_layer("first").kernel) == 9)


def test_a_shared_layer_gets_the_least_of_its_budgets_at_every_size():
    shared = keras.layers.Dense(3, use_bias=False)
    x = keras.Input((3,))
    model = keras.Model(x, shared(keras.layers.ReLU()(shared(x))))
    shared.set_weights([5 * np.eye(3)])
    constrain(model, [0.5, 2.0])
    assert np.linalg.norm(shared.get_weights()[0], 2) <= 0.5
    shared = keras.layers.Conv2D(1, 3, padding="same", use_bias=False)
    x = keras.Input((12, 12, 1))
    model = keras.Model(x, shared(keras.layers.AveragePooling2D(6)(shared(x))))
    shared.set_weights([np.ones((3, 3, 1, 1))])
    constrain(model, [6.0, 1.0])
    (kernel,) = shared.get_weights()
    for size in (12, 2):
        assert (
            norm_upper_bound(kernel, LinearMap("conv", (size, size, 1), padding="same")).value <= 1
        )


def test_a_bound_on_a_map_that_it_does_not_bound_is_refused_by_name():
    def bounded(layer, *shape):
        x = keras.Input(shape)
        y = layer(x, x) if isinstance(layer, layers.MultiHeadAttention) else layer(x)
        return keras.Model(x, y)

    bound = SpectralBound(1.0)
    refused = [
        bounded(layers.EinsumDense("abc,cde->abde", (4, 2, 3), kernel_constraint=bound), 4, 6),
        bounded(layers.EinsumDense("ab,cd->abcd", (6, 2, 3), kernel_constraint=bound), 6),
        bounded(layers.MultiHeadAttention(2, 3, kernel_constraint=bound), 4, 6),
    ]
    for model in refused:
        before = model.get_weights()
        with pytest.raises(UnsupportedLayerError, match="EinsumDense"):
            project(model)
        model.compile("sgd", "mse")
        x = np.zeros((2, *model.input_shape[1:]), "float32")
        with pytest.raises(UnsupportedLayerError):
            model.fit(x, model.predict(x, verbose=0), verbose=0, callbacks=[LyapunovMonitor()])
        assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    plain = layers.EinsumDense("abc,cd->abd", (4, 5), kernel_constraint=bound)
    model = bounded(plain, 4, 6)
    scramble(model)
    project(model)
    assert np.linalg.norm(keras.ops.convert_to_numpy(plain.kernel), 2) <= 1 + 1e-6


def test_a_stage_that_a_constant_follows_keeps_its_budget_itself():
    # Normalized over a single entry, whatever comes is constant.
    model = keras.Sequential(
        [
            keras.Input((4, 1)),
            layers.Dense(1),
            layers.LayerNormalization(center=False, scale=False),
        ]
    )
    constrain(model, [0.5])
    assert model.layers[0].kernel_constraint.max_gain == 0.5


def test_one_number_is_the_budget_of_every_stage_or_of_the_named_ones():
    dense = [keras.layers.Dense(3, name=f"stage_{i}") for i in range(3)]
    model = keras.Sequential([keras.Input((4,)), *dense])
    constrain(model, 0.5, layers=["stage_0", "stage_2"])
    assert [getattr(d.kernel_constraint, "max_gain", None) for d in dense] == [0.5, None, 0.5]
    constrain(model, 1)
    assert [d.kernel_constraint.max_gain for d in dense] == [1.0] * 3


def test_kernels_inside_are_left_far_outside_scaled_and_others_share_a_graph(monkeypatch):
    from tf_lyapunov.constraints import bounds

    traced, shared = [], bounds.compiled
    monkeypatch.setattr(bounds, "compiled", lambda f: traced.append(f) or shared(f))
    bounds._one_graph.cache_clear()
    rng = np.random.default_rng(0)
    inside = np.linalg.qr(rng.normal(size=(6, 6)))[0].astype("float32") * 0.999
    result = keras.ops.convert_to_numpy(SpectralBound(1.0).project(inside))
    assert np.array_equal(result, inside) and not traced
    for factor in (4.0, 1.3):
        outside = inside * np.float32(factor)
        shrunk = keras.ops.convert_to_numpy(SpectralBound(1.0).project(outside))
        assert 1 - 1e-6 < np.linalg.norm(shrunk.astype(float), 2) <= 1.0
    assert not traced
    for factor in (1.1, 1.05, 1.2):
        outside = inside * np.float32(factor)
        shrunk = keras.ops.convert_to_numpy(SpectralBound(1.0).project(outside))
        assert 0.9 < np.linalg.norm(shrunk.astype(float), 2) <= 1.0
    assert len(traced) == 1
    changed = SpectralBound(1.0)
    changed.max_gain = 0.25  # the new number counts
    shrunk = keras.ops.convert_to_numpy(changed.project(inside))
    assert np.linalg.norm(shrunk.astype(float), 2) <= 0.25


KERNELS = {
    "dense": ((7, 5), LinearMap("dense")),
    "conv": ((3, 3, 2, 4), LinearMap("conv", (6, 6, 2), padding="same", strides=2)),
    "depthwise": ((3, 4, 2), LinearMap("depthwise", (9, 4))),
    "conv_transpose": ((2, 2, 3, 2), LinearMap("conv_transpose", (4, 4, 2), strides=2)),
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "scale, max_gain", [(1.0, 0.3), (1e-3, 1e-4), (300.0, 1e-3), (1e-30, 1e-32)]
)
def test_scaled_kernels_are_inside_as_stored_whatever_their_type(name, dtype, scale, max_gain):
    shape, linear_map = KERNELS[name]
    if keras.backend.backend() == "jax" and dtype == "float64":
        pytest.skip("JAX without x64 has no float64")
    values = np.random.default_rng(0).normal(size=shape) * scale
    kernel = keras.ops.cast(keras.ops.convert_to_tensor(values), dtype)
    sigma = norm_upper_bound(stored(kernel), linear_map).value
    if sigma == 0:  # float16 holds none of it
        assert dtype == "float16" and scale == 1e-30
        return
    result = scaled_below(kernel, sigma, max_gain)
    assert keras.backend.standardize_dtype(result.dtype) == dtype
    norm = norm_upper_bound(stored(result), linear_map).value
    assert norm <= max_gain
    # As near as the roundings allow: those that were paid for, and those that were made.
    taps = math.prod(shape[:-2])
    u = unit_roundoff(dtype) * 1.01 + 2.0**-30
    share = max_gain / sigma
    rounded = 4 * u * math.sqrt(taps) * np.linalg.norm(stored(kernel)) * share
    lost = rounded + 2 * ABSOLUTE[dtype] * math.sqrt(taps * values.size)
    assert norm >= max_gain * (1 - 2.0**-20) - lost


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_whose_squares_overflow_are_scaled_and_not_zeroed(name):
    shape, linear_map = KERNELS[name]
    if keras.backend.backend() == "jax":
        pytest.skip("JAX without x64 has no float64")
    kernel = np.random.default_rng(0).normal(size=shape) * 1e290
    sigma = norm_upper_bound(kernel, linear_map).value
    result = scaled_below(kernel, sigma, 0.5)
    assert 0.5 * (1 - 1e-8) <= norm_upper_bound(stored(result), linear_map).value <= 0.5


def stored(kernel):
    return keras.ops.convert_to_numpy(kernel).astype(np.float64)
