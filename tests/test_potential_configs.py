"""`configs/potential`: every published experiment is there, and its model has the right size."""

import inspect
import json
import math
import pathlib
import types
import typing

import keras
import pytest

from tf_lyapunov import models
from tf_lyapunov.errors import ConfigError
from tf_lyapunov.experiments import architectures
from tf_lyapunov.experiments.reading import load_config, parse_config
from tf_lyapunov.experiments.training import build_model, make_design, make_loss, make_optimizer
from tf_lyapunov.models import lipschitz, mixers

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "configs" / "potential"
SHAPES = {"mnist": ((28, 28, 1), 10), "cifar10": ((32, 32, 3), 10), "cifar100": ((32, 32, 3), 100)}
FAMILIES = ("cayley", "skew", "almost_orthogonal")
EXPECTED = {
    *(f"cpl_{size}{data}" for size in ("s", "m", "l", "xl") for data in ("", "_cifar100")),
    *(f"lipconvnet{depth}_{family}" for depth in range(5, 45, 5) for family in FAMILIES),
    *(f"lipconvnet{depth}_skew_plus" for depth in (10, 20)),
    *("kwlarge", "kwlarge_3", "liresnet", "lipnext", "potential_mixer"),
    *(f"mnist_2c2f_{family}" for family in lipschitz.FAMILIES | lipschitz.KEPT_FAMILIES),
}
QUICK = (
    "cpl_s",
    "kwlarge",
    "lipconvnet5_almost_orthogonal",
    "mnist_2c2f_cayley",
    "mnist_2c2f_convex_potential",
    "lipnext",
    "potential_mixer",
)


def convex_potential(channels, depth, units, dense_depth, classes=0):
    """Trainable parameters of CPL-S/M/L/XL, by hand."""
    features = channels * 64
    convolutions = depth * (9 * channels**2 + channels)
    return convolutions + dense_depth * (features * units + units) + classes * (features + 1)


# Of affine layers, as of plain ones of the same shape.
PARAMETERS = {
    "cpl_s": convex_potential(45, 20, 2048, 7),
    "cpl_m": convex_potential(60, 30, 2048, 10),
    "cpl_l": convex_potential(60, 90, 4096, 15),
    "cpl_xl": convex_potential(70, 120, 4096, 15),
    "cpl_s_cifar100": convex_potential(45, 20, 2048, 7, 100),
    "mnist_2c2f_almost_orthogonal": 166406,
    "lipconvnet5_almost_orthogonal": sum(
        9 * a * b + b for a, b in [(3, 32), (32, 64), (64, 128), (128, 256), (256, 512)]
    )
    + 512 * 10
    + 10,
}


def shapes_only(config):
    """The configured model without values: its variables are never initialised."""
    shape, classes = SHAPES[config.dataset.name]
    data = types.SimpleNamespace(input_shape=shape, num_classes=classes)
    with keras.StatelessScope():
        return build_model(config, data)


def test_every_published_experiment_has_a_file():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_its_training_is_as_published(name):
    config = load_config(FOLDER / f"{name}.yaml")
    training = config.training
    loss, optimizer = make_loss(config), make_optimizer(config, 100)
    assert isinstance(loss, keras.losses.Loss)
    assert make_design(config, None) is None
    augmented = config.dataset.name != "mnist"
    assert (training.augmentation.crop, training.augmentation.flip) == (4 * augmented, augmented)
    rates = [optimizer._learning_rate(s) for s in (0, 40 * training.epochs, 100 * training.epochs)]
    peak = training.optimizer.learning_rate
    triangular = training.optimizer.schedule.name == "triangular"
    wanted = [0, peak, 0] if triangular else [peak, peak, peak / 100]
    assert [float(rate) for rate in rates] == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    if name.startswith("cpl"):
        assert triangular and (training.epochs, training.batch_size, peak) == (200, 256, 1e-3)
        assert (type(loss).__name__, loss.margin) == ("MultiMargin", 0.7)
    assert [radius >= r / 255 for radius, r in zip(config.radii, (36, 72, 108), strict=True)]


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(EXPECTED)
    ],
)
def test_its_model_has_the_published_parameters(name):
    config = load_config(FOLDER / f"{name}.yaml")
    model = shapes_only(config)
    assert model.output_shape == (None, SHAPES[config.dataset.name][1])
    count = sum(math.prod(v.shape) for v in model.trainable_variables)
    assert count == PARAMETERS.get(name, count)
    if name.startswith("lipconvnet"):
        convolution = lipschitz.FAMILIES[config.model.family][0]
        found = [layer for layer in model.layers if isinstance(layer, convolution)]
        assert len(found) == config.model.depth


@pytest.mark.parametrize(
    "model, said",
    [
        ({"name": "lipnext", "size": [2, 16]}, None),
        ({"name": "potential_mixer", "size": [2, 16, 8], "beta": 2}, None),
        ({"name": "lipnext", "size": [2, 16, 8]}, "size"),
        ({"name": "potential_mixer", "size": "XL"}, "size"),
        ({"name": "lipnext", "share": 0.5}, "share"),
        ({"name": "lipnext", "share": True}, "share"),
    ],
)
def test_mixers_are_of_named_sizes_or_of_their_own(model, said):
    text = json.dumps({"dataset": {"name": "digits"}, "model": model})
    if said is None:
        assert models.build(parse_config(text).model.model_dump(), (8, 8, 1), 3).count_params()
    else:
        with pytest.raises(ConfigError, match=said):
            parse_config(text)


def test_every_builder_has_a_section_with_its_defaults():
    sections = {
        member.model_fields["name"].annotation.__args__[0]: member
        for member in typing.get_args(typing.get_args(architectures.Architecture)[0])
    }
    assert set(sections) == set(models.BUILDERS)
    for name in ("lipnext", "potential_mixer"):
        given = sections[name](name=name).model_dump()
        for key, parameter in inspect.signature(models.BUILDERS[name]).parameters.items():
            if key not in ("input_shape", "num_classes"):
                assert given.pop(key) == parameter.default
        assert set(given) == {"name"}


def test_the_sections_name_what_the_builders_know():
    assert set(typing.get_args(architectures.Family)) == set(lipschitz.FAMILIES) | set(
        lipschitz.KEPT_FAMILIES
    )
    assert set(typing.get_args(architectures.Size)) == set(mixers.LIPNEXT_SIZES)
    assert set(typing.get_args(architectures.Size)) == set(mixers.MIXER_SIZES)
    assert set(typing.get_args(architectures.Sorting)) == set(lipschitz.SORTING)
    assert set(typing.get_args(architectures.Head)) == set(lipschitz.HEADS)
