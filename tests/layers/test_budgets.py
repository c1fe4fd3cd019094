"""One number for every layer is a budget for this library's layers too: kept, or refused by name.

The trouble: `constrain(model, 0.5)` put a constraint on what `SpectralDense` and its kind compute
from their weights, which bounded nothing, and raised for convolutions and orthogonal kernels.
"""

import functools

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov import layers as ours
from tf_lyapunov.dynamics import L2Gain

VECTOR, SEQUENCE, IMAGE = (4,), (6, 2), (4, 4, 2)
# Layers with a kernel of their own are stages: their gain becomes the budget.
STAGES = {
    **{
        name: (functools.partial(getattr(ours, name), 3), VECTOR)
        for name in (
            "AlmostOrthogonalDense", "BjorckDense", "CayleyDense", "FrobeniusDense",
            "NormalizedDense", "SpectralDense", "BlockReflectorDense",
        )
    },
    **{
        name: (functools.partial(getattr(ours, name), 3, 3), shape)
        for name, shape in (
            ("AlmostOrthogonalConv1D", SEQUENCE), ("AlmostOrthogonalConv2D", IMAGE),
            ("SpectralConv1D", SEQUENCE), ("SpectralConv2D", IMAGE),
        )
    },
}  # fmt: skip
# Layers that are bounded as a whole belong to the stage before them, and are stages where they are
# alone.
WHOLE = {
    "CayleyConv2D": (lambda: ours.CayleyConv2D(3, 3), IMAGE),
    "ConvexPotentialConv1D": (lambda: ours.ConvexPotentialConv1D(3, 3), SEQUENCE),
    "ConvexPotentialConv2D": (lambda: ours.ConvexPotentialConv2D(3, 3), IMAGE),
    "ConvexPotentialDense": (lambda: ours.ConvexPotentialDense(5), VECTOR),
    "SDPLipschitzConv1D": (lambda: ours.SDPLipschitzConv1D(3, 3), SEQUENCE),
    "SDPLipschitzConv2D": (lambda: ours.SDPLipschitzConv2D(3, 3), IMAGE),
    "SDPLipschitzDense": (lambda: ours.SDPLipschitzDense(5), VECTOR),
    "SandwichConv2D": (lambda: ours.SandwichConv2D(3, 3), IMAGE),
    "SandwichDense": (lambda: ours.SandwichDense(3), VECTOR),
    "SkewOrthogonalConv2D": (lambda: ours.SkewOrthogonalConv2D(3, 3), IMAGE),
    "BlockReflectorConv2D": (lambda: ours.BlockReflectorConv2D(3, 3), IMAGE),
    "SoftmaxPotential": (lambda: ours.SoftmaxPotential(5), VECTOR),
}
# Layers of a fixed gain, whatever their weights.
FIXED = {
    "BatchCentering": (ours.BatchCentering, IMAGE),
    "Householder": (lambda: ours.Householder(), VECTOR),
    "L2Attention": (ours.L2Attention, SEQUENCE),
    "LipschitzPReLU": (lambda: ours.LipschitzPReLU(), VECTOR),
    "Padding2D": (lambda: ours.Padding2D(1, "reflect"), IMAGE),
    "PositionBias": (ours.PositionBias, IMAGE),
    "ShiftMixing": (lambda: ours.ShiftMixing(0.25), IMAGE),
    "ScaledAveragePooling2D": (lambda: ours.ScaledAveragePooling2D(2), IMAGE),
}
# In tests of their own, below; the cell and the base are no layers of a model; a merge; and layers
# without weights, whose gain is read like that of those above.
ELSEWHERE = {
    "OrthogonalConv2D", "OrthogonalConv2DTranspose", "OrthogonalDense", "RecurrentEquilibrium",
}  # fmt: skip
OTHERS = {
    "ChannelPadding", "ConvexCombination", "FullSort", "GlobalL2NormPooling2D", "GroupSort",
    "InvertibleDownSampling", "InvertibleUpSampling", "L2NormPooling2D", "LipschitzLayer",
    "LocalResponseNormalization", "LpPooling2D", "MaxMin", "RecurrentEquilibriumCell",
    "ScaledGlobalAveragePooling2D", "Truncate", "TwoSidedReLU", "refresh",
}  # fmt: skip


def chain(shape, *layers):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(shape), *layers])


def gain(model):
    return tfl.lipschitz_upper_bound(model).gain_upper_bound


def test_every_layer_is_tried():
    named = {*STAGES, *WHOLE, *FIXED}
    assert named | ELSEWHERE | OTHERS == set(ours.__all__) and not named & OTHERS


@pytest.mark.parametrize("name", STAGES)
def test_the_gain_of_a_layer_with_a_kernel_of_its_own_becomes_its_budget(name):
    make, shape = STAGES[name]
    model = chain(shape, make())
    # More than it is bounded by already: left alone, to the bit.
    before = model.get_weights()
    tfl.constrain(model, 4.0)
    assert all(map(np.array_equal, before, model.get_weights()))
    assert gain(model) > 0.5
    tfl.constrain(model, 0.5)
    assert model.layers[0].max_gain == 0.5
    assert gain(model) <= 0.5 * (1 + 2.0**-45)
    assert all(v.constraint is None for v in model.variables)
    again = type(model.layers[0]).from_config(model.layers[0].get_config())
    assert again.max_gain == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("name", WHOLE)
def test_layers_that_are_bounded_as_a_whole_keep_one_number(name):
    make, shape = WHOLE[name]
    alone = tfl.constrain(chain(shape, make()), 0.5)
    assert gain(alone) <= 0.5 * (1 + 2.0**-20)


@pytest.mark.parametrize("name", FIXED)
def test_layers_of_a_fixed_gain_are_paid_for_by_the_layer_before_them(name):
    make, shape = FIXED[name]
    units = 4 if len(shape) == 1 else 8
    dense = keras.layers.Dense(units)
    model = tfl.constrain(chain(shape, dense, make()), 0.5)
    assert gain(model) <= 0.5 * (1 + 2.0**-45)
    # Factors of a layer are rounded down to single precision.
    assert dense.kernel_constraint.max_gain <= 0.5 * (1 + 2.0**-22)


def test_a_layer_bounded_by_construction_pays_for_what_follows_it_too():
    model = chain(VECTOR, ours.SpectralDense(4, "relu"), keras.layers.Rescaling(4.0))
    tfl.constrain(model, 1.0)
    assert model.layers[0].max_gain == 0.25 and gain(model) <= 1.0


@pytest.mark.parametrize(
    "make, shape",
    [(lambda: ours.OrthogonalDense(4, "relu"), VECTOR),
     (lambda: ours.OrthogonalConv2D(3, 3), IMAGE),
     (lambda: ours.OrthogonalConv2D(3, 3, 2, "valid"), IMAGE),
     (lambda: ours.OrthogonalConv2DTranspose(2, 2, 2, "same"), IMAGE)],
)  # fmt: skip
def test_orthogonal_kernels_are_left_alone_or_refuse_less_than_one(make, shape):
    model = chain(shape, make(), keras.layers.Dense(3))
    before = model.layers[0].get_weights()
    tfl.constrain(model, 1.0)
    assert all(map(np.array_equal, before, model.layers[0].get_weights()))
    assert all(v.constraint is None for v in model.layers[0].variables)
    assert model.layers[1].kernel_constraint.max_gain == 1.0
    assert 0 < gain(model) <= 1.00001  # measured: the kernel is orthogonal up to rounding
    with pytest.raises(ValueError, match=r"budget below 1.*leave it out of `layers`"):
        tfl.constrain(model, 0.5)
    assert model.layers[1].kernel_constraint.max_gain == 1.0


def test_circular_orthogonal_convolutions_are_paid_for_by_the_layer_before_them():
    layer = ours.OrthogonalConv2D(3, 3, padding="circular")
    model = tfl.constrain(chain(IMAGE, keras.layers.Dense(2), layer), 0.5)
    assert all(v.constraint is None for v in layer.variables)
    assert gain(model) <= 0.5 * (1 + 2.0**-40)


def test_recurrent_equilibrium_layers_keep_their_own_supply_rate():
    layer = ours.RecurrentEquilibrium(3, states=2, supply=L2Gain(2.0))
    model = chain((5, 4), keras.layers.Dense(4), layer)
    try:
        tfl.constrain(model, 1.0)
    except tfl.errors.UnsupportedLayerError as error:
        assert layer.name in str(error)
    else:
        assert gain(model) <= 1.0 * (1 + 2.0**-45)


def test_weights_of_sixteen_bits_are_within_the_budget_as_rounded():
    layer = ours.SpectralDense(4, dtype="mixed_float16")
    model = tfl.constrain(chain(VECTOR, layer), 1.0)
    assert layer.max_gain < 1.0 and layer.max_gain * layer.rounding_inflation <= 1.0
    assert gain(model) <= 1.0


def test_a_failing_call_leaves_every_max_gain_as_it_was():
    model = chain(VECTOR, ours.SpectralDense(4), keras.layers.Dense(3))
    model.layers[1].kernel.assign(np.full((4, 3), np.nan))
    with pytest.raises(ValueError, match="finite"):
        tfl.constrain(model, 0.5)
    assert model.layers[0].max_gain == 1.0
