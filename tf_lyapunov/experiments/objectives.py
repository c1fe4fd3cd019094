"""What training minimises, and how: the configured loss, optimizer and weight decay."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from .. import losses
from ..callbacks import MarginRamp
from ..optimizers import Stiefel, is_marked
from .config import ExperimentConfig

LOSSES = {
    "cross_entropy": losses.TemperatureCrossEntropy,
    "multi_margin": losses.MultiMargin,
    "hinge_margin": losses.HingeMargin,
    "kr": losses.KR,
    "hkr": losses.HKR,
    "multiclass_hinge": losses.MulticlassHinge,
    "multiclass_hkr": losses.MulticlassHKR,
    "multiclass_soft_hkr": losses.MulticlassSoftHKR,
    "lse_hkr": losses.LseHKR,
    "categorical_hinge": losses.CategoricalHinge,
    "efficient_margin": losses.EfficientMargin,
    "offset_cross_entropy": losses.OffsetCrossEntropy,
    "loss_annealing": losses.LossAnnealing,
    "certificate_regularization": losses.CertificateRegularization,
}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class PiecewiseLinear(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate that is linear between given steps.

    Args:
        steps: increasing step numbers.
        values: learning rates at those steps; constant before the first and after the last.
    """

    def __init__(self, steps, values):
        self.steps, self.values = [float(s) for s in steps], [float(v) for v in values]

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rate = ops.convert_to_tensor(self.values[0], "float32")
        for i in range(len(self.steps) - 1):
            width = max(self.steps[i + 1] - self.steps[i], 1.0)
            share = ops.clip((step - self.steps[i]) / width, 0.0, 1.0)
            rate = rate + share * (self.values[i + 1] - self.values[i])
        return ops.maximum(rate, min(self.values))  # the sum may round to less

    def get_config(self):
        return {"steps": self.steps, "values": self.values}


def make_loss(config: ExperimentConfig, model=None) -> keras.losses.Loss:
    """The configured loss; one with margins of pairs of classes reads them from the model."""
    loss = _loss(config.training.loss.model_dump())
    if model is not None and isinstance(loss, losses.EfficientMargin | losses.OffsetCrossEntropy):
        loss.bind(model)
    return loss


def _loss(arguments) -> keras.losses.Loss:
    arguments = dict(arguments)
    cls = LOSSES[arguments.pop("name")]
    arguments.pop("ramp", None)
    if "loss" in arguments:
        arguments["loss"] = _loss(arguments["loss"])
    return cls(**arguments)


def make_ramps(config: ExperimentConfig, loss) -> list[keras.callbacks.Callback]:
    """What raises the radius of a made loss during training, where that is configured."""
    return [MarginRamp(loss)] if getattr(config.training.loss, "ramp", False) else []


def make_optimizer(config: ExperimentConfig, steps_per_epoch: int) -> keras.optimizers.Optimizer:
    """The configured optimizer; its schedule is a function of the step number only."""
    spec = config.training.optimizer
    total = steps_per_epoch * config.training.epochs
    rate: Any = spec.learning_rate
    if spec.schedule.name == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(
            spec.learning_rate, total, alpha=spec.schedule.final_fraction
        )
    elif spec.schedule.name == "triangular":
        peak = spec.learning_rate
        rate = PiecewiseLinear(
            [0, 0.4 * total, 0.8 * total, total],
            [0, peak, peak / 20, peak * spec.schedule.final_fraction],
        )
    elif spec.schedule.name == "multistep":
        factors = [spec.schedule.factor**i for i in range(len(spec.schedule.milestones) + 1)]
        rate = keras.optimizers.schedules.PiecewiseConstantDecay(
            # The last step at the old rate.
            [max(round(share * total) - 1, 0) for share in spec.schedule.milestones],
            [spec.learning_rate * factor for factor in factors],
        )
    arguments = {} if spec.momentum is None else {"momentum": spec.momentum}
    kinds = {
        "adam": keras.optimizers.Adam,
        "adamw": keras.optimizers.AdamW,
        "sgd": keras.optimizers.SGD,
        "rmsprop": keras.optimizers.RMSprop,
    }
    return kinds[spec.name](learning_rate=rate, **arguments)


def kept_orthogonal(
    optimizer: keras.optimizers.Optimizer, model: keras.Model
) -> keras.optimizers.Optimizer:
    """The optimizer inside `optimizers.Stiefel` for a built model with marked kernels."""
    marked = any(is_marked(variable) for variable in model.trainable_variables)
    return Stiefel(optimizer) if marked else optimizer


def add_weight_decay(model: keras.Model, factor: float) -> None:
    """Add factor·‖W‖² of every kernel of a built model to its loss; biases are left alone."""
    for layer in model.layers:
        for name in ("kernel", "depthwise_kernel", "pointwise_kernel"):
            variable = getattr(layer, name, None)
            if isinstance(variable, keras.Variable):
                regularizer = keras.regularizers.L2(factor)
                variable.regularizer = regularizer
                attribute = name.replace("kernel", "regularizer")
                attribute = "kernel_regularizer" if name == "kernel" else attribute
                setattr(layer, attribute, regularizer)
