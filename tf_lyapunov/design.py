"""From a claim about a network to a budget for every layer's linear map."""

from __future__ import annotations

from collections.abc import Sequence

from tf_lyapunov.errors import DesignInfeasible
from tf_lyapunov.theory import budgets as budget_rules
from tf_lyapunov.theory import dissipativity, lyapunov
from tf_lyapunov.theory.arguments import finite_float
from tf_lyapunov.theory.designs import RULES, VARIANTS, Design, DesignCheck
from tf_lyapunov.theory.sectors import Indices, Sector

__all__ = ["Design", "DesignCheck", "equal_gain_design", "spectral_design"]


def spectral_design(
    claim: Indices | None = None,
    sectors: Sequence[Sector] = (),
    rule: str = "sound",
    *,
    gain: float | None = None,
    layer_indices: Sequence[Indices] | None = None,
    weights: Sequence[float] | None = None,
    smallest_singular_values: Sequence[float] | None = None,
    variant: str | None = None,
    square_root: bool = False,
    widths: Sequence[int] | None = None,
) -> Design:
    """Budgets for the layers' operator norms, from a claim about the network.

    `sound` proves the claim for every network within the budgets: by norms for ν < 0, by cones
    (rule `conic`, square layers) for ν ≥ 0. `lyapunov` and `dissipativity` are the papers' rules
    as published; `Design.verdict` says what of them is proved.

    Args:
        claim: (δ, ν) of the network, δ > 0. Omit it if `gain` is given.
        sectors: slopes of the activation of each of the n layers (`Sector`, or Keras names).
        rule: `"sound"`, `"conic"`, `"lyapunov"` or `"dissipativity"`.
        gain: instead of a claim, an l2 gain L > 0; see `equal_gain_design`.
        layer_indices: explicit (δ_l, ν_l), one per layer.
        weights: sound rules only: relative sizes of the stage gains (conic: of the spare angle).
        smallest_singular_values: dissipativity only: lower bounds s_l used in Theorem 4.
        variant: lyapunov: `"closed_form"` (default) or `"remark_4"`; dissipativity:
            `"theorem_4"` (default) or `"get_indexes"` (released code, unsound).
        square_root: lyapunov only: budgets √λ_l, as derived, instead of λ_l, as printed.
        widths: input width and the n output widths, if known: lets impossible claims be refused.

    Returns:
        `Design`.

    Raises:
        DesignInfeasible: if no budgets satisfy the claim; `.nearest` holds feasible claims.
        ValueError: if an argument does not fit the rule.

    Example:
        >>> leaky = Sector.of("leaky_relu", negative_slope=0.1)
        >>> design = spectral_design(Indices(0.4, -2.0), [leaky, leaky, Sector.linear()])
        >>> design.verdict, [round(budget, 3) for budget in design.budgets]
        ('PROVED', [1.095, 1.095, 1.095])

    Reference: sound form: equations (2.1)-(2.3); as published: Rahnama et al., Theorems 2 and 3;
    Aquino et al., Theorems 3 and 4.
    """
    if (gain is None) == (claim is None):
        raise ValueError(f"Pass `claim` or `gain`, not both. Received: {claim=}, {gain=}.")
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {RULES}. Received: rule={rule!r}.")
    published = rule in ("lyapunov", "dissipativity")
    unfit = {
        "weights": published and weights is not None,
        "smallest_singular_values": rule != "dissipativity" and smallest_singular_values,
        "square_root": rule != "lyapunov" and square_root,
        "variant": variant is not None and variant not in VARIANTS[rule],
        "layer_indices": rule == "conic" and layer_indices is not None,
    }
    if any(unfit.values()):
        names = [name for name, wrong in unfit.items() if wrong]
        raise ValueError(f"These arguments do not fit rule={rule!r}. Received: {names}.")
    sectors = budget_rules.check_sectors(sectors)
    if gain is not None:
        if rule != "sound" or layer_indices is not None:
            raise ValueError("A plain `gain` has only the rule 'sound' and no `layer_indices`.")
        return equal_gain_design(gain, sectors, weights=weights)
    lyapunov.check_claim(claim)
    if layer_indices is not None:
        layer_indices = tuple(layer_indices)
        if len(layer_indices) != len(sectors):
            raise ValueError(
                "`layer_indices` and `sectors` must have one entry per layer. Received: "
                f"{len(layer_indices)} indices for {len(sectors)} sectors."
            )
        for layer in layer_indices:
            lyapunov.check_claim(layer)
    if rule == "lyapunov":
        return _lyapunov_design(claim, sectors, layer_indices, variant, square_root)
    if rule == "dissipativity":
        return _dissipativity_design(
            claim, sectors, layer_indices, variant or "theorem_4", smallest_singular_values
        )
    if layer_indices is not None:
        return _norm_design(claim, sectors, layer_indices)
    if claim.nu >= 0 or rule == "conic":
        _check_widths(claim, sectors, widths)
        found = budget_rules.conic_budgets(claim, sectors, weights)
        return _from_budgets(claim, sectors, "conic", found)
    found = budget_rules.gain_budgets(claim, sectors, weights)
    return _from_budgets(claim, sectors, "sound", found)


def equal_gain_design(
    gain: float, sectors: Sequence[Sector], weights: Sequence[float] | None = None
) -> Design:
    """Budgets for a plain gain claim ‖Δy‖ ≤ L‖Δu‖: Π max(|α_l|,|β_l|)·σ_l ≤ L.

    Equality up to a relative reserve of about 1e-8, which keeps the equivalent cone claim with
    slopes (-L, 2L), `Design.claim`, verifiable too.

    Args:
        gain: L > 0.
        sectors: one per layer.
        weights: relative sizes of the stage gains; equal by default.

    Returns:
        `Design` with `target_gain` and `gain` equal to L.

    Raises:
        ValueError: if `gain` is not positive.

    Example:
        >>> design = equal_gain_design(1.0, ["relu", "relu", "linear"], weights=[2.0, 1.0, 0.5])
        >>> design.verdict, [round(budget, 6) for budget in design.budgets]
        ('PROVED', [2.0, 1.0, 0.5])

    Reference: product rule (sound form).
    """
    gain = finite_float("gain", gain)
    if gain <= 0:
        raise ValueError(f"`gain` must be positive. Received: gain={gain}.")
    sectors = budget_rules.check_sectors(sectors)
    claim = Indices(1 / gain, -2 * gain)
    found = budget_rules.gain_budgets(claim, sectors, weights)
    return _from_budgets(claim, sectors, "sound", found, target_gain=gain)


def _from_budgets(claim, sectors, rule, found, **options) -> Design:
    return Design(
        claim, sectors, rule, found.budgets, found.indices, balls=found.balls,
        scaling=found.scaling, **options,
    )  # fmt: skip


def _check_widths(claim, sectors, widths):
    if widths is None or len(set(widths)) == 1:
        return
    nearest = budget_rules.nearest_gain_claims(claim, sectors)
    raise DesignInfeasible(
        "A claim with nu >= 0 needs layers of equal width: moving an input that has no output "
        f"beside it gives omega < 0 when nu > 0. Received: widths={tuple(widths)}. "
        f"Nearest feasible claims: {list(nearest)}.",
        nearest,
    )


def _lyapunov_design(claim, sectors, layer_indices, variant, square_root) -> Design:
    if layer_indices is not None:
        indices, variant = layer_indices, "explicit"
    elif variant == "explicit":
        raise ValueError("variant='explicit' needs `layer_indices`.")
    elif variant == "remark_4":
        indices = lyapunov.remark_4_indices(claim, len(sectors))
    else:
        variant = "closed_form"
        indices = lyapunov.closed_form_indices(claim, len(sectors))
    budgets = tuple(lyapunov.budget(layer, square_root=square_root) for layer in indices)
    return Design(claim, sectors, "lyapunov", budgets, indices, variant)


def _dissipativity_design(claim, sectors, layer_indices, variant, singular_values) -> Design:
    if singular_values is not None and len(singular_values) != len(sectors):
        raise ValueError(
            f"`smallest_singular_values` must hold {len(sectors)} numbers. "
            f"Received: {singular_values}."
        )
    singular_values = singular_values and [s or 0.0 for s in singular_values]
    indices = layer_indices or dissipativity.equal_diagonal_indices(claim, len(sectors))
    if variant == "get_indexes":
        budgets = tuple(map(dissipativity.get_indexes_budget, indices, sectors))
    else:
        budgets = dissipativity.theorem_4_budgets(indices, sectors, singular_values)
    floor = singular_values or [0.0] * len(sectors)
    if any(b <= 0 or b < s for b, s in zip(budgets, floor, strict=True)):
        nearest = _nearest_theorem_4_claims(claim, sectors)
        raise DesignInfeasible(
            f"The rule allows no weights: its budgets are {budgets}. Received: {claim}, layer "
            f"indices {indices}. Feasible with variant='theorem_4' and automatic indices: "
            f"{list(nearest)}.",
            nearest,
        )
    return Design(
        claim, sectors, "dissipativity", budgets, indices, variant,
        smallest_singular_values=singular_values and tuple(singular_values),
    )  # fmt: skip


def _nearest_theorem_4_claims(claim, sectors) -> tuple[Indices, ...]:
    try:
        layers = dissipativity.equal_diagonal_indices(claim, len(sectors))
        budgets = dissipativity.theorem_4_budgets(layers, sectors)
    except DesignInfeasible as refusal:
        candidates = refusal.nearest
        return sum((_nearest_theorem_4_claims(c, sectors) for c in candidates), ())
    return (claim,) if min(budgets) > 0 else ()


def _norm_design(claim, sectors, layer_indices) -> Design:
    if any(layer.nu >= 0 for layer in layer_indices):
        nearest = budget_rules.nearest_gain_claims(claim, sectors)
        raise DesignInfeasible(
            "Norms alone prove no layer with nu >= 0. Received: "
            f"layer_indices={layer_indices}. Without explicit indices these claims can be "
            f"designed: {list(nearest)}.",
            nearest,
        )
    budgets = tuple(map(dissipativity.gain_budget, layer_indices, sectors))
    return Design(claim, sectors, "sound", budgets, layer_indices)
