"""Every experiment as shipped: its file is read, its model built, its claim designed."""

import pathlib
import types

import pytest

from tf_lyapunov.experiments.reading import load_config
from tf_lyapunov.experiments.training import build_model, make_design, make_loss, make_optimizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
SHAPES = {
    "mnist": ((28, 28, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "svhn_cropped": ((32, 32, 3), 10),
    "digits": ((8, 8, 1), 10),
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_experiment_can_start_and_its_sound_claims_are_proved(path):
    config = load_config(path, [])
    (height, width, channels), classes = SHAPES[config.dataset.name]
    crop = config.dataset.crop
    shape = (crop, crop, channels) if crop else (height, width, channels)
    data = types.SimpleNamespace(input_shape=shape, num_classes=classes)
    model = build_model(config, data)
    assert model.output_shape == (None, classes)
    assert make_loss(config) is not None and make_optimizer(config, 100) is not None
    design = make_design(config, model)
    assert (design is None) == (config.claim is None)
    if design is not None:
        assert all(budget > 0 for budget in design.budgets)
        assert design.is_proved == (config.rule == "sound")
