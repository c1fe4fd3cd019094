"""A claim about a cascade with memory, split into one for each of its layers."""

import math
from fractions import Fraction

from tf_lyapunov.theory.arguments import finite_float
from tf_lyapunov.theory.supply_rates import L2Gain


def split_gain(gain, layers, *, fixed=()):
    """Equal gains of layers in a cascade, whose product with the fixed ones is at most `gain`.

    Gains of a cascade multiply, over sequences too: from ‖y‖ ≤ γ₁‖u‖ and ‖z‖ ≤ γ₂‖y‖ follows
    ‖z‖ ≤ γ₁γ₂‖u‖. Among all splittings with this product the equal one has the smallest sum.

    Args:
        gain: of the whole cascade, positive.
        layers: number of layers to be given a gain.
        fixed: gains of the others, such as the slopes of activations; 1 need not be listed.

    Returns:
        Tuple of `L2Gain`, rounded down: for `RecurrentEquilibrium`, and its `.gamma` for
        `constraints.SpectralBound` of a dense layer.

    Raises:
        ValueError: if a number is not positive.

    Example:

    >>> split_gain(4.0, 2)
    (L2Gain(gamma=2.0), L2Gain(gamma=2.0))

    Reference: the small-gain composition of cascades, in sound form.
    """
    gain = finite_float("gain", gain)
    fixed = [finite_float("fixed", value) for value in fixed]
    if isinstance(layers, bool) or int(layers) != layers or layers < 1:
        raise ValueError(f"`layers` must be a positive integer. Received: layers={layers!r}.")
    if not gain > 0 or any(not value > 0 for value in fixed):
        raise ValueError(f"Gains must be positive. Received: gain={gain}, fixed={fixed}.")
    each = (gain / math.prod(fixed)) ** (1 / int(layers))
    if not 0 < each < math.inf:
        raise ValueError(f"Gains must be within float64. Received: gain={gain}, fixed={fixed}.")
    others = math.prod(map(Fraction, fixed))
    while Fraction(each) ** int(layers) * others > Fraction(gain):
        each = math.nextafter(each, 0.0)
    return (L2Gain(each),) * int(layers)


def supplies_of(design, recurrent):
    """What every layer of a cascade keeps, so that a design's claim holds over sequences too.

    A sound design proves its claim from gains of stages alone, Π_l r_l ≤ L: from ‖Δy_l‖ ≤ r_l‖Δu_l‖
    in l2 over a whole sequence the same follows for the cascade, whether a stage has memory or not.
    So the budget of a recurrent layer, which holds its activations, is its `L2Gain`.

    Args:
        design: `Design` of a gain or of a claim, by the rule `"sound"`, in which recurrent layers
            have the sector `"linear"`.
        recurrent: numbers of the recurrent layers, from 0.

    Returns:
        Tuple with one entry a layer: `L2Gain` of a recurrent one, for `RecurrentEquilibrium`; the
        budget of another, for `constraints.SpectralBound`.

    Raises:
        ValueError: for another rule, which speaks of matrices; for numbers of no layer, or of one
            with another sector.

    Example:

    >>> from tf_lyapunov.design import spectral_design
    >>> design = spectral_design(gain=4.0, sectors=["linear", "relu"])
    >>> supplies_of(design, [0])[0].gamma <= 2.0
    True

    Reference: the small-gain composition of cascades, in sound form.
    """
    if design.rule != "sound" or design.balls is not None:
        raise ValueError(
            "Only a sound design is about gains, which recurrent layers have; another is about "
            f"matrices. Received: rule={design.rule!r}. Use rule='sound' with a claim of ν < 0, or "
            "a gain."
        )
    chosen = sorted(set(recurrent))
    if any(isinstance(k, bool) or not 0 <= k < len(design.budgets) for k in chosen):
        raise ValueError(
            f"`recurrent` must hold numbers from 0 to {len(design.budgets) - 1}. "
            f"Received: {list(recurrent)}."
        )
    wrong = [k for k in chosen if (design.sectors[k].alpha, design.sectors[k].beta) != (1.0, 1.0)]
    if wrong:
        raise ValueError(
            "The gain of a recurrent layer holds its activations: give it the sector 'linear'. "
            f"Received: other sectors for layers {wrong}."
        )
    return tuple(L2Gain(b) if k in chosen else b for k, b in enumerate(design.budgets))
