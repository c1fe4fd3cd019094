"""The papers' residual networks and AlexNet: their sizes, budgets and certificates."""

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov import models
from tf_lyapunov.bounds.stages import stages
from tf_lyapunov.layers import LocalResponseNormalization
from tf_lyapunov.models.residual import _Net

SMALL = {
    "alexnet_cifar": ({}, (13, 13, 3)),
    "preact_resnet": ({"width": 2, "blocks": (1, 1)}, (12, 12, 3)),
    "preact_resnet18": ({"width": 2, "normalization_gain": 1.0}, (8, 8, 3)),
    "resnet50": ({"width": 2, "blocks": (1, 1)}, (16, 16, 3)),
}
BUDGETS = {"alexnet_cifar": 5, "preact_resnet": 8, "preact_resnet18": 21, "resnet50": 10}


def small(name):
    arguments, shape = SMALL[name]
    if name != "alexnet_cifar":
        return models.build({"name": name, **arguments}, shape, 4, seed=0)
    # AlexNet's own layers on fewer channels: the full one has 4 million weights.
    keras.utils.set_random_seed(0)
    full = models.alexnet_cifar()
    narrow = {"conv_1": 4, "conv_2": 6, "dense_1": 8, "dense_2": 5, "logits": 4}

    def thin(layer):
        config = layer.get_config()
        for key in ("filters", "units"):
            if key in config:
                config[key] = narrow[layer.name]
        return type(layer).from_config(config)

    x = inputs = keras.Input(shape)
    for layer in full.layers[1:]:
        x = thin(layer)(x)
    return keras.Model(inputs, x)


def randomized(model, seed=0):
    """Weights and statistics far from those that a constructor chooses."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if "seed" in variable.path:
            continue
        value = rng.normal(size=variable.shape) * 0.5
        variable.assign(np.exp(value) if "variance" in variable.path else value)
    return model


def size(model):
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


def test_alexnet_has_response_normalization_behind_its_overlapping_pools():
    model = models.alexnet_cifar()
    kinds = [type(layer).__name__ for layer in model.layers]
    at = [i for i, kind in enumerate(kinds) if kind == "LocalResponseNormalization"]
    assert len(at) == 2 and all(kinds[i - 1] == "MaxPooling2D" for i in at)
    found = model.layers[at[0]]
    settings = (found.depth_radius, found.bias, found.alpha, found.beta)
    assert settings == (4, 1.0, 0.001 / 9, 0.75)
    plain = models.alexnet_cifar(response_normalization=False)
    assert not any(isinstance(layer, LocalResponseNormalization) for layer in plain.layers)
    assert size(model) == size(plain)


def test_preactresnet18_has_the_usual_number_of_weights():
    assert size(models.preact_resnet18()) == 11_171_146


@pytest.mark.slow
def test_the_other_networks_have_the_usual_numbers_of_weights():
    assert size(models.resnet50()) == 25_557_032
    assert size(models.preact_resnet()) == preact_count([64, 64, 128, 256, 512])


def preact_count(widths):
    """Weights of the [2, 2, 2, 2] network without normalization, by arithmetic."""
    total = 7 * 7 * 3 * widths[0]
    for before, width in zip(widths, widths[1:], strict=False):
        total += before * width * (1 + 9) + 3 * width * width * 9
    return total + widths[-1] * 10 + 10


@pytest.mark.parametrize(
    ("released", "widths"), [(False, [2, 2, 4, 8, 16]), (True, [2, 2, 4, 16, 128])]
)
def test_the_released_widths_are_a_bug_that_can_be_rebuilt(released, widths):
    model = models.preact_resnet(width=2, released_widths=released)
    assert size(model) == preact_count(widths)


def test_the_released_bug_at_full_width_has_482_million_weights():
    assert round(preact_count([64, 64, 128, 512, 4096]) / 1e6) == 482
    assert round(preact_count([64, 64, 128, 256, 512]) / 1e6) == 11


def test_full_networks_have_the_documented_number_of_stages(monkeypatch):
    built = []
    monkeypatch.setattr(_Net, "model", lambda self, *a: built.append(self) or self)
    for make, count in (
        (models.preact_resnet, 22),
        (models.preact_resnet18, 21),
        (models.resnet50, 54),
    ):
        net = make(width=1)
        seen = net.names._seen
        assert seen["conv"] + seen["projection"] + 1 == count


@pytest.mark.parametrize(
    "name",
    [
        "alexnet_cifar",
        "preact_resnet",
        # 21 and 10 kernels, each compiled anew.
        pytest.param("preact_resnet18", marks=pytest.mark.slow),
        pytest.param("resnet50", marks=pytest.mark.slow),
    ],
)
def test_budgets_hold_stage_by_stage_and_prove_the_networks_gain(name):
    model = randomized(small(name))
    found = stages(model)
    assert len(found) == BUDGETS[name]
    tfl.constrain(model, [0.8] * len(found))
    x = np.random.default_rng(1).normal(size=(4, *model.input_shape[1:])).astype("float32")
    proof = tfl.certify(model, x)
    assert np.isfinite(proof.gain_upper_bound)
    again = {stage.name: stage for stage in stages(model)}
    for stage in found:
        norms = again[stage.name].post_batch_norms
        assert not norms or all(layer.scale for layer in norms)
    # Each residual branch has at most gain 0.8² or 0.8³, each skip or projection at most 1.
    if name == "alexnet_cifar":
        assert proof.gain_upper_bound <= 0.8**5 * (1 + 1e-5)
    else:
        blocks = sum("add" in layer.name for layer in model.layers)
        assert proof.gain_upper_bound <= 2**blocks


@pytest.mark.parametrize("name", SMALL)
def test_no_sampled_gain_exceeds_the_certificate(name):
    model = randomized(small(name), seed=2)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(32, *model.input_shape[1:])).astype("float32")
    bound = tfl.certify(model, x).gain_upper_bound
    for scale in (1e-2, 1.0):
        moved = (x + scale * rng.normal(size=x.shape)).astype("float32")
        change = np.linalg.norm(
            model.predict(moved, verbose=0) - model.predict(x, verbose=0), axis=1
        )
        distance = np.linalg.norm((moved - x).reshape(len(x), -1).astype(float), axis=1)
        # Outputs carry float32 rounding, relative to their size.
        slack = 1e-4 * np.abs(model.predict(x, verbose=0)).max()
        assert np.all(change <= bound * distance + slack)


def test_a_stride_two_convolution_pads_by_its_kernel_and_not_by_the_images_size():
    model = models.preact_resnet((9, 10, 1), 2, width=1, blocks=(1,))
    assert model.get_layer("padding_1").padding == ((3, 3), (3, 3))
    assert model.get_layer("conv_1").output.shape[1:3] == (5, 5)


def test_normalization_at_the_head_of_blocks_is_bounded_on_request():
    model = randomized(models.preact_resnet18((8, 8, 3), 3, width=2, normalization_gain=0.5))
    tfl.project(model)
    norm = model.get_layer("batch_norm_1")
    gamma, variance = (np.asarray(v, float) for v in (norm.gamma, norm.moving_variance))
    assert np.max(np.abs(gamma) / np.sqrt(variance + norm.epsilon)) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("name", ["preact_resnet", "preact_resnet18", "resnet50"])
@pytest.mark.parametrize("change", [{"width": 0}, {"activation": "softmax"}, {"widht": 3}])
def test_impossible_networks_are_refused(name, change):
    with pytest.raises(ValueError, match="Received"):
        models.build({"name": name, **change}, (16, 16, 3), 4)


def test_flat_inputs_are_refused():
    with pytest.raises(ValueError, match="height, width, channels"):
        models.build("resnet50", (16,), 4)
