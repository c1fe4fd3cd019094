"""A claim, a budget per layer, and the proof that joins them.

A `Design` recomputes its verdict from its numbers whenever it is made, also when it is read from a
file: a stored verdict is never believed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from tf_lyapunov.digits import at_least, at_most
from tf_lyapunov.showing import Page, Shown, Table, number
from tf_lyapunov.theory import budgets as budget_rules
from tf_lyapunov.theory import dissipativity, lyapunov
from tf_lyapunov.theory.arguments import finite_float
from tf_lyapunov.theory.cascade import (
    allowed_gain_product,
    gain_cascade,
    gain_indices,
    scaled_cascade,
)
from tf_lyapunov.theory.explanations import explain_design
from tf_lyapunov.theory.rounding import round_up
from tf_lyapunov.theory.sectors import Indices, Sector
from tf_lyapunov.theory.spectra import QuasiDominance

RULES = ("sound", "conic", "lyapunov", "dissipativity")
VARIANTS = {
    "sound": (None,),
    "conic": (None,),
    "lyapunov": ("closed_form", "remark_4", "explicit"),
    "dissipativity": ("theorem_4", "get_indexes"),
}


@dataclass(frozen=True)
class DesignCheck:
    """Whether measured gains still satisfy a design's claim. True in a condition if they do.

    Attributes:
        holds: the claim is proved for the measured numbers.
        margin: how far the product of the stage gains r_l is below what proves the claim,
            (-a - Πr_l)/b with the claim's slopes a, b (for a plain gain L: (L - Πr_l)/L); for
            the conic rule the smallest slack of a ball relative to its layer's budget. Positive
            inside.
        gain_upper_bound: proved l2 gain of the network: Πr_l, or the claim's if smaller and held.
        indices: (δ_l, ν_l) implied by each stage's gain through rule (2.1), at the design's δ_l
            (at 1 over the budgeted gain for sound designs).
        reason: one sentence.
    """

    holds: bool
    margin: float
    gain_upper_bound: float
    indices: tuple[Indices, ...]
    reason: str

    def __bool__(self) -> bool:
        return self.holds


@dataclass(frozen=True, repr=False)
class Design(Shown):
    """A claim, a budget for every layer's linear map, and what is proved about them.

    Made by `spectral_design` or `equal_gain_design`. Budgets bound σ(W_l), the operator norm of
    a stage's linear map (with folded normalisation and following pooling, if any).

    Attributes:
        claim: (δ, ν) of the network. A plain gain L is held as slopes (-L, 2L).
        sectors: slopes of the activations, one per layer.
        rule: `"sound"`, `"conic"`, `"lyapunov"` or `"dissipativity"`.
        budgets: bounds on σ(W_l).
        indices: (δ_l, ν_l) per layer. Where only gains count, δ_l is a large number that stands
            for the limit δ_l → ∞, the disc of slopes ±r_l.
        variant: the published rule's variant.
        balls: for the conic rule `(center, radius)` with ‖W_l - center·I‖ ≤ radius, else `None`.
        smallest_singular_values: lower bounds s_l used in Theorem 4, else `None`. The proof does
            not need them: rule (2.1) is exact for norms, and W = -σI has all of them equal.
        target_gain: L of a plain gain claim, else `None`.
        scaling: weights p_l of the scaled cascade.
        cascade_matrix: A of Theorem 3, shape (n+1, n+1).
        cascade_margin: smallest eigenvalue of -A (the papers' test, p = 1); says nothing against
            a sound design, which needs weights p.
        quasi_dominance: Theorem 3 as printed.
        scaled_margin: smallest eigenvalue of M(p), scaled to a unit diagonal.
        gain_as_published: gain of Corollary 2.
        gain: sound gain the claim stands for: b, or L.
        gain_upper_bound: gain that the budgets prove, whatever the verdict on the claim.
        layer_proofs: per layer the rule by which its budget implies its indices, or `None`.
        verdict: `"PROVED"` if the budgets imply the claim, else `"NOT_PROVED"`.

    Example:

    >>> import tf_lyapunov as tfl
    >>> design = tfl.spectral_design(gain=1.0, sectors=["relu", "linear"])
    >>> design.verdict, [round(budget, 4) for budget in design.budgets]
    ('PROVED', [1.0, 1.0])
    """

    claim: Indices
    sectors: tuple[Sector, ...]
    rule: str
    budgets: tuple[float, ...]
    indices: tuple[Indices, ...]
    variant: str | None = None
    balls: tuple[tuple[float, float], ...] | None = None
    smallest_singular_values: tuple[float, ...] | None = None
    target_gain: float | None = None
    scaling: tuple[float, ...] | None = None
    cascade_matrix: np.ndarray = field(init=False, compare=False, repr=False)
    cascade_margin: float = field(init=False, compare=False)
    quasi_dominance: QuasiDominance = field(init=False, compare=False, repr=False)
    scaled_margin: float = field(init=False, compare=False)
    gain_as_published: float = field(init=False, compare=False)
    gain: float = field(init=False, compare=False)
    gain_upper_bound: float = field(init=False, compare=False)
    layer_proofs: tuple[str | None, ...] = field(init=False, compare=False, repr=False)
    verdict: str = field(init=False, compare=False)

    def __post_init__(self):
        self._validate()
        test = lyapunov.theorem_3(self.claim, self.indices)
        scaled = scaled_cascade(self.claim, self.indices, self.scaling)
        proofs = tuple(self._layer_proof(index) for index in range(len(self.budgets)))
        by_cascade = scaled.holds and None not in proofs
        exact = math.prod(self._stage_gains(self.budgets), start=Fraction(1))
        by_gains = self._gains_prove(self.budgets, None) is not None
        proved = by_cascade or by_gains
        if self.target_gain is not None:
            proved = exact <= Fraction(self.target_gain)
        gain = self.claim.gain if self.target_gain is None else self.target_gain
        matrix = test.matrix
        matrix.setflags(write=False)
        derived = {
            "scaling": scaled.weights,
            "cascade_matrix": matrix,
            "cascade_margin": test.margin,
            "quasi_dominance": test.quasi_dominance,
            "scaled_margin": scaled.margin,
            "gain_as_published": self.claim.gain_as_published,
            "gain": gain,
            "gain_upper_bound": min(round_up(exact), gain if proved else math.inf),
            "layer_proofs": proofs,
            "verdict": "PROVED" if proved else "NOT_PROVED",
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _validate(self):
        lyapunov.check_claim(self.claim)
        object.__setattr__(self, "sectors", budget_rules.check_sectors(self.sectors))
        count = len(self.sectors)
        if self.rule not in RULES or self.variant not in VARIANTS[self.rule]:
            raise ValueError(
                f"`rule` must be one of {RULES} with a variant of {VARIANTS}. "
                f"Received: rule={self.rule!r}, variant={self.variant!r}."
            )
        for name in ("budgets", "smallest_singular_values", "scaling"):
            values = getattr(self, name)
            if values is not None:
                values = tuple(finite_float(name, value) for value in values)
                low = 0.0 if name != "scaling" else math.nextafter(0.0, 1.0)
                if len(values) != count or min(values) < low:
                    raise ValueError(
                        f"`{name}` must be {count} non-negative numbers. Received: {values}."
                    )
                object.__setattr__(self, name, values)
        object.__setattr__(self, "indices", tuple(self.indices))
        if len(self.indices) != count:
            raise ValueError(
                f"A design needs one pair of indices per sector. Received: {len(self.indices)} "
                f"indices for {count} sectors."
            )
        if self.balls is not None:
            balls = tuple(
                (finite_float("center", center), finite_float("radius", radius))
                for center, radius in self.balls
            )
            if len(balls) != count or min(radius for _, radius in balls) < 0:
                raise ValueError(f"`balls` must be {count} balls. Received: {self.balls}.")
            object.__setattr__(self, "balls", balls)
        if self.target_gain is not None and finite_float("target_gain", self.target_gain) <= 0:
            raise ValueError(f"`target_gain` must be positive. Received: {self.target_gain}.")

    def _layer_proof(self, index: int) -> str | None:
        """Rule that turns the layer's budget into its indices, decided without rounding."""
        sector, layer, sigma = self.sectors[index], self.indices[index], self.budgets[index]
        if self.balls is not None:
            holds = dissipativity.conic_rule_holds(*self.balls[index], sector, layer)
            return "conic rule (2.2)" if holds else None
        # Also for Theorem 4, with s too: W = -σI is within its assumptions, and (2.1) is exact.
        if dissipativity.gain_rule_holds(sigma, sector, layer):
            return "norm rule (2.1)"
        return None

    def _stage_gains(self, sigmas, post_gains=None) -> list[Fraction]:
        post_gains = post_gains or [1.0] * len(self.sectors)
        return [
            budget_rules.stage_gain(*stage)
            for stage in zip(sigmas, self.sectors, post_gains, strict=True)
        ]

    def _gains_prove(self, sigmas, post_gains):
        """The scaled cascade built from the stage gains alone, if it proves the claim."""
        gains = self._stage_gains(sigmas, post_gains)
        allowed = allowed_gain_product(self.claim)
        product = math.prod(gains, start=Fraction(1))
        if allowed <= 0 or product >= Fraction(allowed):
            return None
        # Larger gains with a product near the allowed one: their proof covers the smaller ones,
        # and no gain is zero or so small that its index would overflow.
        typical = allowed ** (1 / len(gains))
        raised = [max(round_up(gain), 2.0**-40 * typical) for gain in gains]
        if math.prod(map(Fraction, raised)) >= Fraction(allowed):
            raised = [round_up(gain) for gain in gains]
        if min(raised) <= 0:
            return None
        try:
            _, verdict = gain_cascade(self.claim, raised)
        except (ValueError, OverflowError):
            return None
        return verdict if verdict.holds else None

    @property
    def is_proved(self) -> bool:
        """Whether the budgets imply the claim."""
        return self.verdict == "PROVED"

    def check(
        self,
        sigmas: Sequence[float],
        post_gains: Sequence[float] | None = None,
        *,
        distances: Sequence[float] | None = None,
    ) -> DesignCheck:
        """Whether measured **upper bounds** of the layers' norms still prove the claim.

        Args:
            sigmas: upper bounds of σ(W_l), one per layer (never estimates from below).
            post_gains: upper bounds of the gains of what follows each activation, e.g. pooling.
            distances: for the conic rule, upper bounds of ‖W_l - center_l·I‖; without them no
                claim with ν ≥ 0 can be proved.

        Returns:
            `DesignCheck`.

        Raises:
            ValueError: if a number is NaN, infinite or negative, or their count is wrong.

        Example:
            >>> from tf_lyapunov.design import spectral_design
            >>> design = spectral_design(Indices(0.4, -2.0), [Sector(0.1, 1.0)] * 2)
            >>> design.check([2.0, 0.6]).holds, design.check([2.0, 0.7]).holds
            (True, False)
        """
        sigmas = self._measured("sigmas", sigmas)
        if post_gains is not None:
            post_gains = self._measured("post_gains", post_gains)
        gains = self._stage_gains(sigmas, post_gains)
        product = math.prod(gains, start=Fraction(1))
        allowed = self.target_gain or allowed_gain_product(self.claim)
        margin = float((Fraction(allowed) - product) / Fraction(self.gain))
        plain = post_gains is None or all(gain == 1 for gain in post_gains)
        holds, reason = False, "the product of the stage gains exceeds what proves the claim"
        if self.target_gain is not None:
            holds = product <= Fraction(self.target_gain)
        elif self.balls is not None:
            holds, slack, reason = self._check_balls(distances, plain)
            margin = margin if slack is None else slack
        else:
            within = self._within_budgets(gains)
            holds = within or self._gains_prove(sigmas, post_gains) is not None
            if within:
                margin = max(margin, self._slack(gains))
        if holds:
            reason = "the measured gains prove the claim"
        elif self.target_gain is None and self.balls is None and allowed <= 0:
            reason = "norms alone prove no claim with nu >= 0"
        bound = round_up(product)
        return DesignCheck(
            holds=holds,
            margin=margin,
            gain_upper_bound=min(bound, self.gain) if holds else bound,
            indices=self._implied_indices(gains) if not (self.balls and holds) else self.indices,
            reason=reason,
        )

    def _measured(self, name, values) -> list[float]:
        values = [finite_float(name, value) for value in values]
        if len(values) != len(self.budgets) or min(values) < 0:
            raise ValueError(
                f"`{name}` must be {len(self.budgets)} non-negative numbers, one per layer. "
                f"Received: {values}."
            )
        return values

    def _slack(self, gains) -> float:
        allowed = self._stage_gains(self.budgets)
        return min(float(1 - r / a) if a else 0.0 for r, a in zip(gains, allowed, strict=True))

    def _within_budgets(self, gains) -> bool:
        allowed = self._stage_gains(self.budgets)
        return self.is_proved and all(r <= a for r, a in zip(gains, allowed, strict=True))

    def _check_balls(self, distances, plain) -> tuple[bool, float | None, str]:
        if distances is None:
            return False, None, "a claim with nu >= 0 needs `distances` from the centers"
        distances = self._measured("distances", distances)
        slack = min(
            float((Fraction(radius) - Fraction(d)) / Fraction(budget))
            for (_, radius), d, budget in zip(self.balls, distances, self.budgets, strict=True)
        )
        if not plain:
            return False, slack, "the conic rule allows nothing after an activation"
        return self.is_proved and slack >= 0, slack, "a weight is outside its ball"

    def _implied_indices(self, gains) -> tuple[Indices, ...]:
        # A sound design's own δ_l stand for infinity; 1/r_l gives the cone of slopes (-r_l, 2r_l).
        budgeted = self._stage_gains(self.budgets)
        deltas = [
            float(1 / r) if self.rule == "sound" and r else layer.delta
            for r, layer in zip(budgeted, self.indices, strict=True)
        ]
        return tuple(
            gain_indices(round_up(r), delta) for r, delta in zip(gains, deltas, strict=True)
        )

    def _page(self):
        claim = ("claimed gain", f"≤ {number(self.target_gain)}")
        if self.target_gain is None:
            delta, nu = number(self.claim.delta), number(self.claim.nu)
            claim = ("claim", f"delta {delta}, nu {nu}")
        rows = [
            (i, f"≤ {at_least(b, 4)}", f"[{s.alpha:.4g}, {s.beta:.4g}]", proof or "—")
            for i, (b, s, proof) in enumerate(
                zip(self.budgets, self.sectors, self.layer_proofs, strict=True), start=1
            )
        ]
        proved = ("proved gain", f"≤ {at_most(self.gain_upper_bound, 4)}")
        facts = (("verdict", self.verdict), ("rule", self.rule), claim, proved)
        columns = ("layer", "budget: operator norm", "slopes", "proved by")
        return Page("Design", (*facts, ("layers", len(rows))), (Table(columns, rows),))

    def explain(self) -> str:
        """Plain text: the claim, the budgets, and which tests prove what.

        Example:
            >>> from tf_lyapunov.design import spectral_design
            >>> text = spectral_design(Indices(0.4, -2.0), [Sector(0.1, 1.0)] * 2).explain()
            >>> text.splitlines()[-1]
            'Verdict: PROVED. Every network within these budgets satisfies the claim.'
        """
        return explain_design(self)

    def to_json(self) -> str:
        """The design as JSON text; `from_json` recomputes everything that is derived."""
        record = {
            "format": "tf_lyapunov.design/1",
            "claim": [self.claim.delta, self.claim.nu],
            "sectors": [[sector.alpha, sector.beta] for sector in self.sectors],
            "rule": self.rule,
            "variant": self.variant,
            "budgets": self.budgets,
            "indices": [[layer.delta, layer.nu] for layer in self.indices],
            "balls": self.balls,
            "smallest_singular_values": self.smallest_singular_values,
            "target_gain": self.target_gain,
            "scaling": self.scaling,
            "derived": {
                "verdict": self.verdict,
                "cascade_margin": self.cascade_margin,
                "scaled_margin": self.scaled_margin,
                "quasi_dominant": self.quasi_dominance.holds,
                "gain": self.gain,
                "gain_as_published": self.gain_as_published,
                "gain_upper_bound": self.gain_upper_bound,
                "layer_proofs": self.layer_proofs,
            },
        }
        return json.dumps(record, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Design:
        """Read a design; its verdict is computed again from its numbers.

        Raises:
            ValueError: if the text is not a design, or its numbers are not valid.

        Example:
            >>> from tf_lyapunov.design import spectral_design
            >>> design = spectral_design(Indices(0.4, -2.0), [Sector(0.1, 1.0)])
            >>> Design.from_json(design.to_json()) == design
            True
        """
        record = json.loads(text) if isinstance(text, (str, bytes)) else text
        if not isinstance(record, dict) or record.get("format") != "tf_lyapunov.design/1":
            raise ValueError("This is not a design: its `format` must be 'tf_lyapunov.design/1'.")
        try:
            options = {
                name: record[name]
                for name in ("variant", "smallest_singular_values", "target_gain", "scaling")
            }
            return cls(
                claim=Indices(*record["claim"]),
                sectors=tuple(Sector(*sector) for sector in record["sectors"]),
                rule=record["rule"],
                budgets=tuple(record["budgets"]),
                indices=tuple(Indices(*layer) for layer in record["indices"]),
                balls=record["balls"] and tuple((c, v) for c, v in record["balls"]),
                **options,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"This design is incomplete or malformed: {error!r}.") from None
