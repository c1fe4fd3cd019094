"""Every experiment as shipped: its file is read, its model built, its claim designed."""

import pathlib
import types

import pytest

from tf_lyapunov.experiments.reading import load_config
from tf_lyapunov.experiments.training import build_model, make_design, make_loss, make_optimizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Those of `configs/potential` are large and make no claim: see `test_potential_configs.py`.
SHIPPED = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "potential")
# They differ from another one by adversarial training alone: see the last test.
TWINS = {p: p.with_name(p.name.replace("_fgm", "")) for p in SHIPPED if p.stem.endswith("_fgm")}
TWINS = {path: twin for path, twin in TWINS.items() if twin in SHIPPED}
SHAPES = {
    "mnist": ((28, 28, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "svhn_cropped": ((32, 32, 3), 10),
    "digits": ((8, 8, 1), 10),
    "imagenet2012": ((64, 64, 3), 1000),
}


@pytest.mark.parametrize("path", [p for p in SHIPPED if p not in TWINS], ids=lambda p: p.stem)
def test_a_shipped_experiment_can_start_and_its_sound_claims_are_proved(path):
    config = load_config(path, [])
    (height, width, channels), classes = SHAPES[config.dataset.name]
    crop = config.dataset.crop
    shape = (crop, crop, channels) if crop else (height, width, channels)
    data = types.SimpleNamespace(input_shape=shape, num_classes=classes)
    if "resnet" in config.model.name:  # the full ones are built in test_residual_models.py
        narrow = config.model.model_copy(update={"width": 4})
        config = config.model_copy(update={"model": narrow})
    model = build_model(config, data)
    assert model.output_shape == (None, classes)
    assert make_loss(config) is not None and make_optimizer(config, 100) is not None
    design = make_design(config, model)
    assert (design is None) == (config.claim is None)
    if design is not None:
        assert all(budget > 0 for budget in design.budgets)
        assert design.is_proved == (config.rule == "sound")


@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_a_row_with_adversarial_training_differs_by_that_alone(path):
    with_it, without = (load_config(p, []).to_dict() for p in (path, TWINS[path]))
    assert with_it["training"].pop("adversarial") and not without["training"].pop("adversarial")
    for key in ("name", "title"):
        del with_it[key], without[key]
    assert with_it == without
