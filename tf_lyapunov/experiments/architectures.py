"""What an experiment file may say about the model: one section for each of `models.BUILDERS`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Strict, model_validator

from .fields import Count, Flag, Positive, Rate, Real, Section, number

Activation = Literal[
    "relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid", "softplus", "linear"
]


class MlpConfig(Section):
    """Arguments of `models.mlp`."""

    name: Literal["mlp"]
    widths: list[Count] = Field([50, 20])
    activation: Activation = "leaky_relu"
    negative_slope: Real = 0.1
    dropout: Rate = 0.0
    batch_norm: Flag = False


class ResidualMlpConfig(Section):
    """Arguments of `models.residual_mlp`."""

    name: Literal["residual_mlp"]
    width: Count = 64
    blocks: Count = 2
    activation: Activation = "leaky_relu"
    negative_slope: Real = 0.1


class CnnConfig(Section):
    """Arguments of `models.cnn`."""

    name: Literal["cnn"]
    filters: Annotated[list[Count], Field(min_length=1)] = Field([16, 32])
    kernel_size: Count = 4
    strides: Count = 2
    widths: list[Count] = Field([100])
    activation: Activation = "relu"
    negative_slope: Real = 0.1
    padding: Literal["same", "valid"] = "same"
    dropout: Rate = 0.0
    batch_norm: Flag = False


class AlexNetConfig(Section):
    """Arguments of `models.alexnet_cifar`."""

    name: Literal["alexnet_cifar"]
    activation: Activation = "leaky_relu"
    negative_slope: Real = 0.1
    response_normalization: Flag = True


class PreActResNetConfig(Section):
    """Arguments of `models.preact_resnet`."""

    name: Literal["preact_resnet"]
    width: Count = 64
    blocks: Annotated[list[Count], Field(min_length=1)] = Field([2, 2, 2, 2])
    activation: Activation = "relu"
    negative_slope: Real = 0.1
    batch_norm: Flag = False
    normalization_gain: Positive | None = None
    released_widths: Flag = False


class PreActResNet18Config(Section):
    """Arguments of `models.preact_resnet18`."""

    name: Literal["preact_resnet18"]
    width: Count = 64
    activation: Activation = "relu"
    negative_slope: Real = 0.1
    batch_norm: Flag = True
    normalization_gain: Positive | None = None


class ResNet50Config(Section):
    """Arguments of `models.resnet50`."""

    name: Literal["resnet50"]
    width: Count = 64
    blocks: Annotated[list[Count], Field(min_length=1)] = Field([3, 4, 6, 3])
    activation: Activation = "relu"
    negative_slope: Real = 0.1
    batch_norm: Flag = True


Family = Literal[
    "cayley",
    "skew",
    "almost_orthogonal",
    "spectral",
    "bjorck",
    "sandwich",
    "convex_potential",
    "sdp",
    "block_reflector",
    "orthogonal",
]
Sorting = Literal["max_min", "group_sort", "householder", "relu"]
Head = Literal["normalized", "bounded"]


class TwoConvTwoDenseConfig(Section):
    """Arguments of `models.two_conv_two_dense`."""

    name: Literal["two_conv_two_dense"]
    family: Family = "cayley"
    activation: Sorting = "group_sort"
    filters: Annotated[list[Count], Field(min_length=1)] = Field([16, 32])
    widths: list[Count] = Field([100])
    head: Head = "normalized"


class KwLargeConfig(Section):
    """Arguments of `models.kw_large`."""

    name: Literal["kw_large"]
    family: Family = "cayley"
    activation: Sorting = "group_sort"
    channels: Count = 32
    units: Count = 512
    head: Head = "normalized"


class LipConvNetConfig(Section):
    """Arguments of `models.lip_conv_net`."""

    name: Literal["lip_conv_net"]
    depth: Annotated[int, Strict(), Field(ge=5, multiple_of=5)] = 5
    family: Family = "skew"
    activation: Sorting = "max_min"
    channels: Count = 32
    head: Head = "normalized"


class ConvexPotentialConfig(Section):
    """Arguments of `models.convex_potential`."""

    name: Literal["convex_potential"]
    size: Literal["S", "M", "L", "XL"] | None = "S"
    depth: Count | None = None
    channels: Count | None = None
    dense_depth: Count | None = None
    units: Count | None = None
    pool: Count = 4
    width: Count | None = None
    step: Positive = 1.0
    norm: Literal["bound", "power"] | None = "bound"
    head: Literal["normalized", "bounded", "truncated"] = "normalized"

    @model_validator(mode="after")
    def _sized(self):
        if self.size is None and None in (
            self.depth,
            self.channels,
            self.dense_depth,
            self.units,
        ):
            raise ValueError("needs `size`, or all of `depth`, `channels`, `dense_depth`, `units`")
        return self


class LiResNetConfig(Section):
    """Arguments of `models.liresnet`."""

    name: Literal["liresnet"]
    blocks: Count = 4
    channels: Count = 64
    units: Count = 256
    family: Literal["cayley", "skew", "almost_orthogonal", "spectral", "bjorck"] = "spectral"
    activation: Sorting = "max_min"
    head: Head = "normalized"


Size = Literal["S", "M", "L"]
# Of channels of images, in each of four directions.
Share = Annotated[float, BeforeValidator(number), Field(gt=0, le=0.25)]


class LipNextConfig(Section):
    """Arguments of `models.lipnext`; `size` by name, or [blocks, channels]."""

    name: Literal["lipnext"]
    size: Size | Annotated[list[Count], Field(min_length=2, max_length=2)] = "S"
    patch: Count = 4
    share: Share = 0.125
    activation: Sorting = "max_min"
    head: Head = "normalized"


class PotentialMixerConfig(Section):
    """Arguments of `models.potential_mixer`; `size` by name, or [blocks, channels, memories]."""

    name: Literal["potential_mixer"]
    size: Size | Annotated[list[Count], Field(min_length=3, max_length=3)] = "S"
    patch: Count = 4
    beta: Positive = 4.0
    share: Share = 0.125
    head: Head = "normalized"


Architecture = Annotated[
    MlpConfig
    | ResidualMlpConfig
    | CnnConfig
    | AlexNetConfig
    | PreActResNetConfig
    | PreActResNet18Config
    | ResNet50Config
    | TwoConvTwoDenseConfig
    | KwLargeConfig
    | LipConvNetConfig
    | ConvexPotentialConfig
    | LiResNetConfig
    | LipNextConfig
    | PotentialMixerConfig,
    Field(discriminator="name"),
]
