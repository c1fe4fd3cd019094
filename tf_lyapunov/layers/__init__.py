"""Layers whose Lipschitz constant is bounded by construction, at every value of their weights."""

from tf_lyapunov.layers.activations import (
    FullSort,
    GroupSort,
    Householder,
    LipschitzPReLU,
    MaxMin,
    TwoSidedReLU,
)
from tf_lyapunov.layers.almost_orthogonal import (
    AlmostOrthogonalConv1D,
    AlmostOrthogonalConv2D,
    AlmostOrthogonalDense,
)
from tf_lyapunov.layers.attention import SoftmaxPotential
from tf_lyapunov.layers.base import LipschitzLayer, refresh
from tf_lyapunov.layers.bjorck import BjorckDense
from tf_lyapunov.layers.centering import BatchCentering
from tf_lyapunov.layers.l2_attention import L2Attention
from tf_lyapunov.layers.manifold import OrthogonalDense
from tf_lyapunov.layers.normalized import (
    FrobeniusDense,
    NormalizedDense,
    SpectralConv1D,
    SpectralConv2D,
    SpectralDense,
)
from tf_lyapunov.layers.orthogonal import CayleyConv2D, CayleyDense
from tf_lyapunov.layers.orthogonal_convolution import (
    OrthogonalConv2D,
    OrthogonalConv2DTranspose,
)
from tf_lyapunov.layers.padding import Padding2D
from tf_lyapunov.layers.pooling import (
    GlobalL2NormPooling2D,
    L2NormPooling2D,
    LpPooling2D,
    ScaledAveragePooling2D,
    ScaledGlobalAveragePooling2D,
)
from tf_lyapunov.layers.position import PositionBias
from tf_lyapunov.layers.potential import (
    ConvexPotentialConv1D,
    ConvexPotentialConv2D,
    ConvexPotentialDense,
)
from tf_lyapunov.layers.recurrent import RecurrentEquilibrium
from tf_lyapunov.layers.recurrent_cell import RecurrentEquilibriumCell
from tf_lyapunov.layers.reflector import BlockReflectorConv2D, BlockReflectorDense
from tf_lyapunov.layers.residual import ConvexCombination
from tf_lyapunov.layers.resizing import (
    ChannelPadding,
    InvertibleDownSampling,
    InvertibleUpSampling,
    Truncate,
)
from tf_lyapunov.layers.response import LocalResponseNormalization
from tf_lyapunov.layers.sandwich import SandwichConv2D, SandwichDense
from tf_lyapunov.layers.sdp import SDPLipschitzConv1D, SDPLipschitzConv2D, SDPLipschitzDense
from tf_lyapunov.layers.shifting import ShiftMixing
from tf_lyapunov.layers.skew import SkewOrthogonalConv2D

__all__ = [
    "AlmostOrthogonalConv1D",
    "AlmostOrthogonalConv2D",
    "AlmostOrthogonalDense",
    "BatchCentering",
    "BjorckDense",
    "BlockReflectorConv2D",
    "BlockReflectorDense",
    "CayleyConv2D",
    "CayleyDense",
    "ChannelPadding",
    "ConvexCombination",
    "ConvexPotentialConv1D",
    "ConvexPotentialConv2D",
    "ConvexPotentialDense",
    "FrobeniusDense",
    "FullSort",
    "GlobalL2NormPooling2D",
    "GroupSort",
    "Householder",
    "InvertibleDownSampling",
    "InvertibleUpSampling",
    "L2Attention",
    "L2NormPooling2D",
    "LipschitzLayer",
    "LipschitzPReLU",
    "LocalResponseNormalization",
    "LpPooling2D",
    "MaxMin",
    "NormalizedDense",
    "OrthogonalConv2D",
    "OrthogonalConv2DTranspose",
    "OrthogonalDense",
    "Padding2D",
    "PositionBias",
    "RecurrentEquilibrium",
    "RecurrentEquilibriumCell",
    "SDPLipschitzConv1D",
    "SDPLipschitzConv2D",
    "SDPLipschitzDense",
    "SandwichConv2D",
    "SandwichDense",
    "ScaledAveragePooling2D",
    "ScaledGlobalAveragePooling2D",
    "ShiftMixing",
    "SkewOrthogonalConv2D",
    "SoftmaxPotential",
    "SpectralConv1D",
    "SpectralConv2D",
    "SpectralDense",
    "Truncate",
    "TwoSidedReLU",
    "refresh",
]
