"""Activation sectors, and the passivity indices of a layer or a network.

`Sector` says how steep an activation can be; `Indices` says in which cone the changes of a
layer's output lie. Both are geometry: nothing here knows about weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from tf_lyapunov.theory.activations import slopes_of
from tf_lyapunov.theory.arguments import finite_float
from tf_lyapunov.theory.rounding import UNIT_ROUNDOFF, round_up, sqrt_up


@dataclass(frozen=True)
class Sector:
    """Incremental slope sector of an elementwise activation.

    α ≤ (φ(s) - φ(t))/(s - t) ≤ β for all s ≠ t.

    Args:
        alpha: smallest slope (dimensionless, may be negative).
        beta: largest slope, at least `alpha`.

    Raises:
        ValueError: if a slope is not finite or `alpha > beta`.

    Example:
        >>> Sector(0.0, 1.0).m
        0.5
        >>> Sector.of("leaky_relu", negative_slope=0.1)
        Sector(alpha=0.1, beta=1.0)

    Reference: sector bounds of Aquino et al., Theorem 1.
    """

    alpha: float
    beta: float

    def __post_init__(self):
        alpha, beta = finite_float("alpha", self.alpha), finite_float("beta", self.beta)
        if alpha > beta:
            raise ValueError(
                f"`alpha` must not exceed `beta`. Received: alpha={alpha}, beta={beta}. "
                "Give the smallest slope first."
            )
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "beta", beta)

    @property
    def magnitude(self) -> float:
        """Largest absolute slope, max(|α|, |β|): the activation's Lipschitz constant."""
        return max(abs(self.alpha), abs(self.beta))

    @property
    def m(self) -> float:
        """Mean slope (α+β)/2."""
        return (self.alpha + self.beta) / 2

    @property
    def p(self) -> float:
        """Product of the slopes αβ."""
        return self.alpha * self.beta

    @staticmethod
    def linear() -> Sector:
        """The identity's sector [1, 1]."""
        return Sector(1.0, 1.0)

    @staticmethod
    def of(activation, **params) -> Sector:
        """Smallest known sector of a Keras activation.

        Args:
            activation: a Keras name (`"gelu"`), a function of `keras.activations`, a built
                activation layer, or a layer with an `activation` (its sector is returned).
                `None` is the identity. A `Sector` is returned unchanged.
            **params: the activation's own parameters, e.g. `negative_slope=0.1`.

        Returns:
            A `Sector`; slopes that are not exact in float64 are rounded outwards.

        Raises:
            UnsupportedLayerError: for an activation that is unknown, discontinuous, not
                Lipschitz or not elementwise.
            TypeError: for a parameter the activation does not have.

        Example:
            >>> Sector.of("sigmoid")
            Sector(alpha=0.0, beta=0.25)
            >>> Sector.of("gelu").alpha < -0.12
            True
        """
        if isinstance(activation, Sector):
            return activation
        return Sector(*slopes_of(activation, params))


@dataclass(frozen=True)
class Indices:
    """Passivity indices (δ, ν): the incremental supply rate of a layer or a network.

    IIFOFP(δ, ν) means ω(Δu, Δy) = Δuᵀ Δy - δ‖Δy‖² - ν‖Δu‖² ≥ 0 for all pairs of inputs. For
    δ > 0 it is the cone ‖Δy - cΔu‖ ≤ r‖Δu‖ with c = (a+b)/2, r = (b-a)/2 and the slopes (0.1)

        a, b = (1 ∓ √(1-4δν)) / (2δ),      δ = 1/(a+b),  ν = ab/(a+b).

    Args:
        delta: output index δ (1 / unit of gain).
        nu: input index ν (unit of gain).

    Raises:
        ValueError: if an index is not finite, or δ > 0 and δν > 1/4 (an empty cone).

    Example:
        >>> a, b = Indices(delta=0.4, nu=-2.0).slopes
        >>> round(a, 2), round(b, 2)
        (-1.31, 3.81)

    Reference: Rahnama et al., Definition 1, as published; slopes in sound form.
    """

    delta: float
    nu: float

    def __post_init__(self):
        delta, nu = finite_float("delta", self.delta), finite_float("nu", self.nu)
        # A product that is 1/4 on paper may exceed it by the rounding of its two factors.
        limit = Fraction(0.25 * (1 + 8 * UNIT_ROUNDOFF))
        if delta > 0 and Fraction(delta) * Fraction(nu) > limit:
            raise ValueError(
                "`delta * nu` must be at most 1/4 when delta > 0, or no map but a constant one is "
                f"in the cone. Received: delta={delta}, nu={nu}. "
                f"Lower `nu` to at most {0.25 / delta}."
            )
        object.__setattr__(self, "delta", delta)
        object.__setattr__(self, "nu", nu)

    def _positive_delta(self, what: str) -> float:
        if self.delta <= 0:
            raise ValueError(
                f"`delta` must be positive for {what}. Received: delta={self.delta}. "
                "With delta <= 0 the supply rate does not bound the output."
            )
        return self.delta

    @property
    def discriminant(self) -> float:
        """1 - 4δν, correctly rounded; between -8u and infinity for δ > 0."""
        exact = 1 - 4 * Fraction(self.delta) * Fraction(self.nu)
        try:
            return float(exact)
        except OverflowError:
            return math.inf if exact > 0 else -math.inf

    @property
    def slopes(self) -> tuple[float, float]:
        """Cone slopes (a, b) of equation (0.1); needs δ > 0.

        Raises:
            ValueError: if δ ≤ 0.
        """
        delta = self._positive_delta("cone slopes")
        root = math.sqrt(max(self.discriminant, 0.0))
        if math.isinf(root):
            root = 2 * math.sqrt(delta) * math.sqrt(-self.nu)
        # 2ν/(1+√·) equals (1-√·)/(2δ) without its cancellation.
        return 2 * self.nu / (1 + root), (1 + root) / (2 * delta)

    @property
    def gain(self) -> float:
        """Largest l2 gain b in the cone, rounded up; infinite for δ ≤ 0.

        ‖Δy‖ ≤ b‖Δu‖ with b = (1 + √(1-4δν))/(2δ): sound, and never above `gain_as_published`.
        """
        if self.delta <= 0:
            return math.inf
        root = sqrt_up(max(1 - 4 * Fraction(self.delta) * Fraction(self.nu), Fraction(0)))
        if not math.isfinite(root):
            return math.inf
        return round_up((1 + Fraction(root)) / (2 * Fraction(self.delta)))

    @property
    def gain_as_published(self) -> float:
        """Gain √(1/δ² + 2|ν|/δ) of Rahnama et al.; an upper bound of `gain`, infinite for δ ≤ 0."""
        if self.delta <= 0:
            return math.inf
        delta, nu = Fraction(self.delta), Fraction(self.nu)
        return sqrt_up(1 / delta**2 + 2 * abs(nu) / delta)

    @property
    def half_angle(self) -> float:
        """Half-angle arcsin((b-a)/(b+a)) of the cone in radians; needs δ > 0 and ν ≥ 0.

        Raises:
            ValueError: if δ ≤ 0 or ν < 0 (the cone then holds all directions).
        """
        self._positive_delta("a half-angle")
        if self.nu < 0:
            raise ValueError(f"`nu` must not be negative for a half-angle. Received: nu={self.nu}.")
        # sin² + cos² = 1 with cos² = 4δν: atan2 is accurate at both ends.
        cosine = math.sqrt(min(4 * self.delta * self.nu, 1.0))
        return math.atan2(math.sqrt(max(self.discriminant, 0.0)), cosine)

    @classmethod
    def from_slopes(cls, a: float, b: float) -> Indices:
        """Indices whose cone slopes are a ≤ b: δ = 1/(a+b), ν = ab/(a+b).

        Args:
            a: smallest slope.
            b: largest slope; a + b must be positive.

        Raises:
            ValueError: if a > b or a + b ≤ 0.

        Example:
            >>> Indices.from_slopes(-1.0, 2.0)
            Indices(delta=1.0, nu=-2.0)
        """
        a, b = finite_float("a", a), finite_float("b", b)
        if a > b or a + b <= 0:
            raise ValueError(
                "Slopes must satisfy a <= b and a + b > 0: the symmetric cone (-b, b) is the limit "
                f"delta -> infinity and has no indices. Received: a={a}, b={b}. "
                "For a plain gain use `equal_gain_design`, or `Indices.from_gain(gain, delta)`."
            )
        a_exact, b_exact = Fraction(a), Fraction(b)
        return cls(float(1 / (a_exact + b_exact)), float(a_exact * b_exact / (a_exact + b_exact)))

    @classmethod
    def from_gain(cls, gain: float, delta: float | None = None) -> Indices:
        """Indices with output index `delta` whose largest slope b is `gain`: ν = b - δb².

        Args:
            gain: the largest slope, positive.
            delta: the output index; at least 1/(2·gain), or `gain` would be the lower slope.

        Raises:
            ValueError: if `delta` is missing (a gain alone is the limit δ → ∞) or too small.

        Example:
            >>> Indices.from_gain(2.0, delta=1.0).slopes
            (-1.0, 2.0)
        """
        gain = finite_float("gain", gain)
        if gain <= 0:
            raise ValueError(f"`gain` must be positive. Received: gain={gain}.")
        if delta is None:
            raise ValueError(
                "`delta` is missing: a gain alone, slopes (-gain, gain), is the limit "
                f"delta -> infinity. Received: gain={gain}, delta=None. Pass "
                "`delta`, or use `equal_gain_design(gain, sectors)`."
            )
        delta = finite_float("delta", delta)
        if 2 * Fraction(delta) * Fraction(gain) < 1:
            raise ValueError(
                f"`delta` must be at least 1/(2*gain) = {0.5 / gain}. Received: delta={delta}."
            )
        exact = Fraction(gain) - Fraction(delta) * Fraction(gain) ** 2
        return cls(delta, float(exact))
