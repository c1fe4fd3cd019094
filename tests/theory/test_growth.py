"""No gradients move a kernel further than the growth bound says, and some move it that far."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_maps import convolution_layers, set_kernel, true_norm

import tf_lyapunov as tfl
from tf_lyapunov.growth import growth_upper_bounds
from tf_lyapunov.spectral.geometry import single_map
from tf_lyapunov.theory.growth import (
    adam_ratio_upper_bound,
    growth_upper_bound,
    patch_overlap,
    rmsprop_ratio_upper_bound,
    sgd_moves,
    steps_within,
)
from tf_lyapunov.theory.operators import convolution_matrix

SHAPE = (6, 4)


def adam_ratios(gradients, beta_1, beta_2):
    """|m̂_t|/√v̂_t of one entry after each gradient, in float64 and by the definition."""
    m = v = 0.0
    found = []
    for t, g in enumerate(gradients, 1):
        m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g * g
        if v > 0:
            found.append(abs(m) / (1 - beta_1**t) / np.sqrt(v / (1 - beta_2**t)))
    return found


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    st.floats(0.0, 0.95),
    st.floats(0.91, 0.9999),
)
def test_no_gradients_exceed_the_ratio_of_adam(gradients, beta_1, beta_2):
    for ratio in adam_ratios(gradients, beta_1, beta_2):
        assert ratio <= adam_ratio_upper_bound(beta_1, beta_2)


@pytest.mark.parametrize(("beta_1", "beta_2"), [(0.9, 0.999), (0.5, 0.9), (0.9, 0.9), (0.0, 0.99)])
def test_the_worst_gradients_attain_the_ratio_of_adam(beta_1, beta_2):
    bound, worst = adam_ratio_upper_bound(beta_1, beta_2), 0.0
    for steps in (*range(1, 40), 20000 if beta_2 > 0.99 else 2000):
        # Growth from the Cauchy-Schwarz case, kept within the range of floats.
        powers = np.arange(steps) - steps + 1.0
        ratio = beta_1 / beta_2 if beta_1 else 1e-9
        gradients = (
            np.exp(np.maximum(-powers * np.log(ratio), -300.0)) if ratio < 1 else (np.ones(steps))
        )
        worst = max(worst, adam_ratios(gradients, beta_1, beta_2)[-1])
    assert worst <= bound <= worst * 1.002


def test_the_bounds_of_kingma_and_ba_are_exceeded():
    """Negative control: η(1-β₁)/√(1-β₂) and η, often quoted, bound no run of Adam."""
    gradients = (0.999 / 0.9) ** np.arange(4000.0)[-200:]
    gradients = np.concatenate([np.zeros(4000), gradients / gradients[-1]])
    worst = max(adam_ratios(gradients, 0.9, 0.999)[-1:])
    assert worst > 2 * (1 - 0.9) / np.sqrt(1 - 0.999) > 6.0


@pytest.mark.parametrize("arguments", [(0.9, 0.8), (0.95, 0.9), (1.0, 0.999), (0.9, 0.999, 0.0)])
def test_decays_without_a_bound_are_refused(arguments):
    with pytest.raises(ValueError, match="beta_1"):
        adam_ratio_upper_bound(*arguments)


def stepped(optimizer, gradients, start):
    """The kernel after each of Keras' own steps."""
    variable = keras.Variable(start, dtype="float32")
    optimizer.build([variable])
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient, "float32")], [variable])
        yield keras.ops.convert_to_numpy(variable).astype(float)


def top_pair(kernel):
    u, _, v = np.linalg.svd(kernel)
    return np.outer(u[:, 0], v[0])


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_attains_its_growth_bound_and_does_not_exceed_it(momentum, nesterov):
    start = np.random.default_rng(0).normal(size=SHAPE).astype("float32")
    sigma, clip, rate, steps = np.linalg.norm(start.astype(float), 2), 0.5, 0.1, 8
    optimizer = keras.optimizers.SGD(rate, momentum, nesterov, clipnorm=clip)
    worst = [-100 * top_pair(start)] * steps
    moves = sgd_moves([rate] * steps, clip * (1 + 1e-5), momentum, nesterov=nesterov)
    for done, kernel in enumerate(stepped(optimizer, worst, start), 1):
        bound = growth_upper_bound(sigma, np.linalg.norm(start), moves[:done])
        assert np.linalg.norm(kernel, 2) <= bound <= np.linalg.norm(kernel, 2) * (1 + 1e-4)


@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamw", "rmsprop"])
def test_no_steps_of_adaptive_methods_exceed_the_growth_bound(name):
    rng = np.random.default_rng(1)
    start = rng.normal(size=SHAPE).astype("float32")
    sigma, rate, steps = np.linalg.norm(start.astype(float), 2), 0.05, 25
    optimizer = {
        "adam": lambda: keras.optimizers.Adam(rate),
        "amsgrad": lambda: keras.optimizers.Adam(rate, amsgrad=True),
        "adamw": lambda: keras.optimizers.AdamW(rate, weight_decay=0.1),
        "rmsprop": lambda: keras.optimizers.RMSprop(rate),
    }[name]()
    ratio = rmsprop_ratio_upper_bound() if name == "rmsprop" else adam_ratio_upper_bound()
    # Of one sign and growing, which is worst for Adam; the last ones so small that squares vanish.
    sizes = [*np.cumprod(np.full(steps - 3, 1.11)), 1e-21, 1e-24, 1e-30]
    gradients = [-np.sign(top_pair(start)) * size for size in sizes]
    moves = [rate * ratio * np.sqrt(start.size)] * steps
    for done, kernel in enumerate(stepped(optimizer, gradients, start), 1):
        bound = growth_upper_bound(sigma, np.linalg.norm(start), moves[:done])
        assert np.linalg.norm(kernel, 2) <= bound
    assert np.linalg.norm(kernel, 2) > sigma + 0.1 * (bound - sigma)  # of the right size


@settings(max_examples=15)
@given(convolution_layers())
def test_the_patch_overlap_bounds_the_norm_of_every_convolution(case):
    layer, input_shape = case
    kernel = keras.ops.convert_to_numpy(layer.kernel).astype(float)
    overlap = patch_overlap(kernel.shape, single_map(layer))
    assert overlap <= patch_overlap(kernel.shape)
    norm = true_norm(layer, input_shape)
    assert norm <= overlap * np.linalg.norm(kernel) * (1 + 1e-12)


def test_the_patch_overlap_is_attained_in_the_limit_of_large_images():
    layer = keras.layers.Conv2D(1, 3, padding="same", use_bias=False)
    layer.build((None, 16, 16, 1))
    set_kernel(layer, np.ones((3, 3, 1, 1), "float32"))
    norm = true_norm(layer, (16, 16, 1))
    assert norm >= 0.97 * patch_overlap((3, 3, 1, 1), single_map(layer)) * 3.0


def test_the_number_of_steps_within_a_limit_is_the_largest():
    count = steps_within(1.0, 2.0, 0.03, limit=1.5, overlap=3.0)
    assert growth_upper_bound(1.0, 2.0, [0.03] * count, 3.0) <= 1.5
    assert growth_upper_bound(1.0, 2.0, [0.03] * (count + 1), 3.0) > 1.5
    assert steps_within(1.0, 1.0, 0.5, limit=1.2) == 0


def model_with(optimizer, every=6, budget=0.8):
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(2, 3, padding="same"),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    tfl.constrain(model, [budget, budget], guarantee="monitor", every=every)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    return model


class Watch(keras.callbacks.Callback):
    """Largest true norm of each kernel at any step."""

    def on_train_begin(self, logs=None):
        self.most = {}

    def on_train_batch_end(self, batch, logs=None):
        for layer in self.model.layers:
            if hasattr(layer, "kernel"):
                kernel = keras.ops.convert_to_numpy(layer.kernel).astype(float)
                linear_map = layer.kernel.constraint.linear_map(kernel.shape)
                norm = np.linalg.norm(convolution_matrix(kernel, linear_map).toarray(), 2)
                self.most[layer.kernel.path] = max(self.most.get(layer.kernel.path, 0), norm)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.5, momentum=0.9, clipnorm=1.0),
        lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)),
    ],
)
def test_no_kernel_leaves_its_growth_bound_in_training_without_projection(optimizer):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(24, 6, 6, 1)), rng.integers(0, 3, 24)
    model = model_with(optimizer())
    bounds = growth_upper_bounds(model)
    watch = Watch()
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[watch])  # six steps, no monitor
    assert watch.most.keys() == bounds.keys()
    for path, norm in watch.most.items():
        assert norm <= bounds[path]
    assert max(watch.most.values()) > 0.8  # the amortised mode did exceed the budget
    # Again from the middle, with a momentum.
    again = growth_upper_bounds(model)
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[watch])
    assert all(norm <= again[path] for path, norm in watch.most.items())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.1),
        lambda: keras.optimizers.Adagrad(0.1),
        lambda: keras.optimizers.Adam(0.1, use_ema=True),
        lambda: keras.optimizers.RMSprop(0.1, centered=True),
        lambda: keras.optimizers.AdamW(1.0, weight_decay=2.0),
    ],
)
def test_optimizers_whose_steps_nothing_bounds_are_refused(optimizer):
    with pytest.raises(ValueError, match="Received"):
        growth_upper_bounds(model_with(optimizer()))


def test_a_kernel_with_a_guarantee_at_every_step_is_not_listed():
    model = model_with("adam")
    tfl.constrain(model, [0.8, 0.8])
    assert growth_upper_bounds(model) == {}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.1, clipnorm=1.0, weight_decay=-1.0),
        lambda: type("SGD", (keras.optimizers.SGD,), {})(0.1, clipnorm=1.0),
        lambda: type("Adam", (keras.optimizers.Adam,), {})(0.1),
        lambda: type("RMSprop", (keras.optimizers.RMSprop,), {})(0.1),
        lambda: keras.optimizers.RMSprop(0.1, epsilon=0.0),
    ],
)
def test_growing_decay_and_subclasses_with_steps_of_their_own_are_refused(optimizer):
    with pytest.raises(ValueError, match="Received"):
        growth_upper_bounds(model_with(optimizer()))


def test_accumulated_gradients_move_on_along_the_schedule_at_every_call():
    rates = keras.optimizers.schedules.PiecewiseConstantDecay([9], [1e-3, 1.0])
    optimizer = keras.optimizers.SGD(rates, clipnorm=1.0, gradient_accumulation_steps=2)
    model = model_with(optimizer)
    optimizer.build(model.trainable_variables)
    kernel = model.trainable_variables[0]

    def step():
        gradients = [-100.0 * keras.ops.ones(v.shape) for v in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)
        matrix = keras.ops.convert_to_numpy(kernel).astype(float)
        linear_map = kernel.constraint.linear_map(matrix.shape)
        return np.linalg.norm(convolution_matrix(matrix, linear_map).toarray(), 2)

    for _ in range(10):
        step()
    bound = growth_upper_bounds(model, steps=4)[kernel.path]
    assert max(step() for _ in range(4)) <= bound


def test_kernels_in_sixteen_bits_have_no_growth_bound():
    layer = keras.layers.Dense(3, dtype="bfloat16")
    model = tfl.constrain(
        keras.Sequential([keras.Input((4,)), layer]), [0.5], guarantee="monitor", every=10
    )
    model.compile(keras.optimizers.SGD(0.01, clipnorm=1.0), "mse")
    with pytest.raises(ValueError, match="bfloat16"):
        growth_upper_bounds(model)
