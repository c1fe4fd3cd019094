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
