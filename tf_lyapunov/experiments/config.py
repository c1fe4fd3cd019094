"""What an experiment file may say: the sections, their defaults and their limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    model_validator,
)


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-3 as text and pydantic reads true as 1: allow the first, refuse the second.
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Integer = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False, gt=0)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False, ge=0)]
Rate = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
Flag = Annotated[bool, Strict()]
Activation = Literal[
    "relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid", "softplus", "linear"
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DatasetConfig(_Section):
    """Which data, and how much of it."""

    name: Literal[
        "digits", "blobs", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped"
    ]
    validation: Count | None = None
    crop: Count | None = None
    limit: Count | None = None


class MlpConfig(_Section):
    """Arguments of `models.mlp`."""

    name: Literal["mlp"]
    widths: list[Count] = [50, 20]
    activation: Activation = "leaky_relu"
    negative_slope: Real = 0.1
    dropout: Rate = 0.0
    batch_norm: Flag = False


class ResidualMlpConfig(_Section):
    """Arguments of `models.residual_mlp`."""

    name: Literal["residual_mlp"]
    width: Count = 64
    blocks: Count = 2
    activation: Activation = "leaky_relu"
    negative_slope: Real = 0.1


class CnnConfig(_Section):
    """Arguments of `models.cnn`."""

    name: Literal["cnn"]
    filters: Annotated[list[Count], Field(min_length=1)] = [16, 32]
    kernel_size: Count = 4
    strides: Count = 2
    widths: list[Count] = [100]
    activation: Activation = "relu"
    negative_slope: Real = 0.1
    padding: Literal["same", "valid"] = "same"
    dropout: Rate = 0.0
    batch_norm: Flag = False


class AlexNetConfig(_Section):
    """Arguments of `models.alexnet_cifar`."""

    name: Literal["alexnet_cifar"]
    activation: Activation = "leaky_relu"
    negative_slope: Real = 0.1


class IndicesConfig(_Section):
    """Passivity indices of one layer."""

    delta: Real
    nu: Real


class ClaimConfig(_Section):
    """What the network shall be proved to be: IIFOFP(delta, nu), or a plain l2 gain."""

    delta: Real | None = None
    nu: Real | None = None
    gain: Positive | None = None

    @model_validator(mode="after")
    def _one_kind(self):
        if (self.gain is None) == (self.delta is None and self.nu is None):
            raise ValueError("must hold either `delta` and `nu`, or `gain`")
        if self.gain is None and (self.delta is None or self.nu is None):
            raise ValueError("must hold both `delta` and `nu`")
        return self


class LayersConfig(_Section):
    """Choices about single layers, from the input on."""

    indices: list[IndicesConfig] | None = None
    weights: list[Positive] | None = None
    budgets: list[Positive] | None = None
    smallest_singular_values: list[NotNegative] | None = None

    @model_validator(mode="after")
    def _budgets_alone(self):
        others = (self.indices, self.weights, self.smallest_singular_values)
        if self.budgets is not None and any(value is not None for value in others):
            raise ValueError("`budgets` are final: give no indices, weights or singular values")
        return self


class ScheduleConfig(_Section):
    """Learning rate over the whole run, as a function of the step number only."""

    name: Literal["constant", "cosine", "triangular"] = "constant"
    final_fraction: NotNegative = 0.0


class OptimizerConfig(_Section):
    """Optimizer and its learning rate."""

    name: Literal["adam", "sgd", "adamw", "rmsprop"] = "adam"
    learning_rate: Positive = 1e-3
    momentum: Rate | None = None
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _momentum(self):
        if self.momentum is not None and self.name not in ("sgd", "rmsprop"):
            raise ValueError(f"`momentum` belongs to sgd and rmsprop, not to {self.name}")
        return self


class CrossEntropyConfig(_Section):
    """`losses.TemperatureCrossEntropy`; temperature 1 and margin 0 are plain cross-entropy."""

    name: Literal["cross_entropy"]
    temperature: Positive = 1.0
    margin: NotNegative = 0.0


class MultiMarginConfig(_Section):
    """`losses.MultiMargin`."""

    name: Literal["multi_margin"]
    margin: Positive = 0.7


class TrainingConfig(_Section):
    """How to train."""

    epochs: Count = 20
    batch_size: Count = 128
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: Annotated[CrossEntropyConfig | MultiMarginConfig, Field(discriminator="name")] = (
        CrossEntropyConfig(name="cross_entropy")
    )
    weight_decay: NotNegative = 0.0
    guarantee: Literal["step", "monitor"] = "step"
    every: Count = 50
    stop_at_accuracy: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] | None = None
    stop_window: Count = 5
    steps_per_execution: Count = 1


class AttackConfig(_Section):
    """One attack, run at every radius."""

    name: Literal["pgd", "fgm"]
    norm: Literal["l2", "linf"] = "l2"
    steps: Count = 40
    relative_step: Positive | None = None
    restarts: Count = 1
    random_start: Flag = False
    loss: Literal["cross_entropy", "margin"] = "cross_entropy"
    bounds: tuple[Real, Real] | None = None

    @model_validator(mode="after")
    def _ordered(self):
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError("`bounds` must be [low, high] with low < high")
        return self


class ExperimentConfig(_Section):
    """A whole experiment: data, model, claim, training, and what to measure."""

    name: str = Field(default="experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    title: str = ""
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**31)] = 0
    dataset: DatasetConfig
    model: Annotated[
        MlpConfig | ResidualMlpConfig | CnnConfig | AlexNetConfig, Field(discriminator="name")
    ]
    claim: ClaimConfig | None = None
    rule: Literal["sound", "conic", "lyapunov", "dissipativity"] = "sound"
    variant: str | None = None
    square_root: Flag = False
    layers: LayersConfig = LayersConfig()
    training: TrainingConfig = TrainingConfig()
    radii: Annotated[list[Positive], Field(min_length=1)] = [0.1, 0.2, 0.3]
    attacks: list[AttackConfig] = [AttackConfig(name="pgd")]
    samples: Count | None = None

    @model_validator(mode="after")
    def _claim_or_budgets(self):
        if self.claim is not None and self.layers.budgets is not None:
            raise ValueError(
                "`layers.budgets` sets the bounds by hand: leave out `claim`, or the budgets"
            )
        if any(b <= a for a, b in zip(self.radii, self.radii[1:], strict=False)):
            raise ValueError(f"`radii` must increase from each to the next, not {self.radii}")
        return self

    def to_dict(self) -> dict:
        """The complete configuration with every default filled in, as plain data."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The complete configuration as YAML that `load_config` reads back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def training_identity(self) -> dict:
        """What decides the trained weights after each epoch; two runs with it equal are equal.

        The number of epochs belongs to it only if the learning rate depends on it.
        """
        data = self.to_dict()
        for key in ("name", "title", "radii", "attacks", "samples"):
            del data[key]
        if self.training.optimizer.schedule.name == "constant":
            del data["training"]["epochs"]
        return data
