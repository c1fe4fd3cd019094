"""What an experiment file may say: the sections, their defaults and their limits."""

from __future__ import annotations

from typing import Annotated, Literal

import yaml
from pydantic import BeforeValidator, Field, Strict, model_validator

from .architectures import Architecture
from .fields import Count, Flag, NotNegative, Positive, Rate, Real, Section, number


class DatasetConfig(Section):
    """Which data, and how much of it."""

    # One of `data.arrays.NAMES`, a path to data of one's own, or a builder in the data directory.
    name: Annotated[str, Strict(), Field(min_length=1)]
    # Of data of one's own; see `data.arrays.load`.
    label: str | None = None
    pixels: Literal["half", "unit", "raw"] | None = None
    validation: Count | None = None
    crop: Count | None = None
    limit: Count | None = None
    # What is subtracted from the pixels: one half, or each channel's mean over the training split.
    centre: Literal["half", "channel_mean"] = "half"
    # Of data read from files while training (imagenet2012); see `streams.load`.
    on_damage: Literal["refuse", "skip"] = "refuse"
    cache: str | None = None
    deterministic: Flag = True


class IndicesConfig(Section):
    """Passivity indices of one layer."""

    delta: Real
    nu: Real


class ClaimConfig(Section):
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


class LayersConfig(Section):
    """Choices about single layers, from the input on."""

    indices: list[IndicesConfig] | None = None
    weights: list[Positive] | None = None
    budgets: list[Positive] | None = None
    # One budget for every stage.
    uniform: Positive | None = None
    # "kernel": budgets set by hand bound the kernels alone, as published; what follows a kernel
    # (overlapping pools, response normalization) then adds its own gain.
    scope: Literal["stage", "kernel"] = "stage"
    smallest_singular_values: list[NotNegative] | None = None

    @model_validator(mode="after")
    def _budgets_alone(self):
        others = (self.indices, self.weights, self.smallest_singular_values)
        if self.by_hand and any(value is not None for value in others):
            raise ValueError("`budgets` are final: give no indices, weights or singular values")
        if self.budgets is not None and self.uniform is not None:
            raise ValueError("must hold `budgets` or `uniform`, not both")
        return self

    @property
    def by_hand(self) -> bool:
        """Whether the bounds are set by hand."""
        return self.budgets is not None or self.uniform is not None


class ScheduleConfig(Section):
    """Learning rate over the whole run, as a function of the step number only."""

    # triangular: [0, 0.4, 0.8, 1]·T → [0, 1, 1/20, final_fraction]·learning_rate;
    # multistep: times `factor` after each share of the steps in `milestones`.
    name: Literal["constant", "cosine", "triangular", "multistep"] = "constant"
    final_fraction: NotNegative = 0.0
    milestones: list[Annotated[float, BeforeValidator(number), Field(gt=0, lt=1)]] = Field(
        [0.5, 0.75]
    )
    factor: Annotated[float, BeforeValidator(number), Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _increasing(self):
        if any(b <= a for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"`milestones` must increase, not {self.milestones}")
        return self


class OptimizerConfig(Section):
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


class CrossEntropyConfig(Section):
    """`losses.TemperatureCrossEntropy`; temperature 1 and margin 0 are plain cross-entropy."""

    name: Literal["cross_entropy"]
    temperature: Positive = 1.0
    margin: NotNegative = 0.0


class MultiMarginConfig(Section):
    """`losses.MultiMargin`."""

    name: Literal["multi_margin"]
    margin: Positive = 0.7


class HingeMarginConfig(Section):
    """`losses.HingeMargin`."""

    name: Literal["hinge_margin"]
    min_margin: Positive = 1.0


class KRConfig(Section):
    """`losses.KR`."""

    name: Literal["kr"]


class HKRConfig(Section):
    """`losses.HKR`."""

    name: Literal["hkr"]
    alpha: NotNegative = 10.0
    min_margin: Positive = 1.0


class MulticlassHingeConfig(Section):
    """`losses.MulticlassHinge`; a positive tau is the soft form."""

    name: Literal["multiclass_hinge"]
    min_margin: Positive = 1.0
    soft_hinge_tau: NotNegative = 0.0


class MulticlassHKRConfig(Section):
    """`losses.MulticlassHKR`; a positive tau is the soft form."""

    name: Literal["multiclass_hkr"]
    alpha: NotNegative = 10.0
    min_margin: Positive = 1.0
    soft_hinge_tau: NotNegative = 0.0


class MulticlassSoftHKRConfig(Section):
    """`losses.MulticlassSoftHKR`."""

    name: Literal["multiclass_soft_hkr"]
    alpha: NotNegative = 10.0
    min_margin: Positive = 1.0
    temperature: Positive = 1.0


class LseHKRConfig(Section):
    """`losses.LseHKR`."""

    name: Literal["lse_hkr"]
    alpha: NotNegative = 10.0
    min_margin: Positive = 1.0
    temperature: Positive = 1.0
    penalty: Positive = 1.0


class CategoricalHingeConfig(Section):
    """`losses.CategoricalHinge`; a positive temperature is the soft form."""

    name: Literal["categorical_hinge"]
    min_margin: Positive = 1.0
    temperature: NotNegative = 0.0


class EfficientMarginConfig(Section):
    """`losses.EfficientMargin` of the model's last layer; `ramp` with `callbacks.MarginRamp`."""

    name: Literal["efficient_margin"]
    radius: Positive = 0.5
    gain: Positive = 1.0
    temperature: Positive = 1.0
    ramp: Flag = False


class OffsetCrossEntropyConfig(Section):
    """`losses.OffsetCrossEntropy` of the model's last layer; `ramp` with `callbacks.MarginRamp`."""

    name: Literal["offset_cross_entropy"]
    radius: Positive = 36 / 255
    gain: Positive = 1.0
    temperature: Positive = 0.25
    ramp: Flag = False


class LossAnnealingConfig(Section):
    """`losses.LossAnnealing`."""

    name: Literal["loss_annealing"]
    temperature: Positive = 0.75
    offset: NotNegative = 2.0
    beta: NotNegative = 5.0

    @model_validator(mode="after")
    def _differentiable(self):
        if 0 < self.beta < 1:
            raise ValueError("`beta` must be 0 or at least 1")
        return self


class CertificateRegularizationConfig(Section):
    """`losses.CertificateRegularization` of another loss."""

    name: Literal["certificate_regularization"]
    gamma: NotNegative = 0.5
    gain: Positive = 1.0
    loss: Annotated[CrossEntropyConfig | MultiMarginConfig, Field(discriminator="name")] = (
        CrossEntropyConfig(name="cross_entropy")
    )


Loss = Annotated[
    CrossEntropyConfig
    | MultiMarginConfig
    | HingeMarginConfig
    | KRConfig
    | HKRConfig
    | MulticlassHingeConfig
    | MulticlassHKRConfig
    | MulticlassSoftHKRConfig
    | LseHKRConfig
    | CategoricalHingeConfig
    | EfficientMarginConfig
    | OffsetCrossEntropyConfig
    | LossAnnealingConfig
    | CertificateRegularizationConfig,
    Field(discriminator="name"),
]


class AugmentationConfig(Section):
    """Random changes of the training images: shifts of up to `crop` pixels, reflections."""

    crop: Annotated[int, Strict(), Field(ge=0)] = 0
    flip: Flag = False


class AdversarialConfig(Section):
    """`training.AdversarialModel`: training on inputs that an attack has changed."""

    name: Literal["fgm", "pgd"] = "fgm"
    norm: Literal["l2", "linf"] = "l2"
    radius: Positive
    steps: Count = 10
    relative_step: Positive | None = None
    random_start: Flag = False
    mix: Annotated[float, BeforeValidator(number), Field(gt=0, le=1)] = 1.0


class TrainingConfig(Section):
    """How to train."""

    epochs: Count = 20
    batch_size: Count = 128
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: Loss = CrossEntropyConfig(name="cross_entropy")
    augmentation: AugmentationConfig = AugmentationConfig()
    adversarial: AdversarialConfig | None = None
    weight_decay: NotNegative = 0.0
    guarantee: Literal["step", "monitor"] = "step"
    every: Count = 50
    stop_at_accuracy: Annotated[float, BeforeValidator(number), Field(gt=0, le=1)] | None = None
    stop_window: Count = 5
    steps_per_execution: Count = 1


class AttackConfig(Section):
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


class ExperimentConfig(Section):
    """A whole experiment: data, model, claim, training, and what to measure."""

    name: str = Field(default="experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    title: str = ""
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**31)] = 0
    dataset: DatasetConfig
    model: Architecture
    claim: ClaimConfig | None = None
    rule: Literal["sound", "conic", "lyapunov", "dissipativity"] = "sound"
    variant: str | None = None
    square_root: Flag = False
    layers: LayersConfig = LayersConfig()
    training: TrainingConfig = TrainingConfig()
    radii: Annotated[list[Positive], Field(min_length=1)] = Field([0.1, 0.2, 0.3])
    attacks: list[AttackConfig] = Field([AttackConfig(name="pgd")])
    samples: Count | None = None

    @model_validator(mode="after")
    def _claim_or_budgets(self):
        if self.claim is not None and self.layers.by_hand:
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

        The number of epochs belongs to it only if the learning rate or a ramp depends on it.
        """
        data = self.to_dict()
        for key in ("name", "title", "radii", "attacks", "samples"):
            del data[key]
        # So that a run that damage has ended can go on without what is damaged.
        del data["dataset"]["on_damage"]
        ramp = data["training"]["loss"].pop("ramp", False)
        if ramp:
            data["training"]["loss"]["ramp"] = True
        elif self.training.optimizer.schedule.name == "constant":
            del data["training"]["epochs"]
        return data
