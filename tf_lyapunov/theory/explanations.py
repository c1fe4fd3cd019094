"""Designs in plain words."""

import math

from tf_lyapunov.digits import at_most

_LAYER_FAILURE = {
    "lyapunov": "not implied by its budget (Theorem 2 is the converse of what can be proved)",
    "dissipativity": "not implied by its budget (the released formula is not Theorem 4)",
}


def explain_design(design) -> str:
    """Text of `Design.explain`.

    Args:
        design: a `tf_lyapunov.design.Design`.

    Returns:
        Several lines; the last one is the verdict.
    """
    a, b = design.claim.slopes
    name = design.rule + (f", variant {design.variant}" if design.variant else "")
    lines = [f"Design by rule {name}, {len(design.budgets)} layers."]
    if design.target_gain is not None:
        lines.append(
            f"Claim: l2 gain at most {design.target_gain:.6g} (held as slopes {a:.4g} to {b:.4g})."
        )
    else:
        lines.append(
            f"Claim: IIFOFP(delta={design.claim.delta:.6g}, nu={design.claim.nu:.6g}), "
            f"cone slopes {a:.4g} to {b:.4g}."
        )
    for number, (sigma, sector) in enumerate(
        zip(design.budgets, design.sectors, strict=True), start=1
    ):
        proof = design.layer_proofs[number - 1]
        reason = f"by {proof}" if proof else _LAYER_FAILURE.get(design.rule, "not implied")
        ball = ""
        if design.balls is not None:
            center, radius = design.balls[number - 1]
            ball = f", within {radius:.6g} of {center:.6g}*I (square layers only)"
        if design.smallest_singular_values is not None:
            s = design.smallest_singular_values[number - 1]
            ball = f", from Theorem 4 with singular values >= {s:g}"
        lines.append(
            f"  layer {number}: sigma <= {sigma:.6g}{ball}; slopes in "
            f"[{sector.alpha:g}, {sector.beta:g}]; its indices: {reason}."
        )
    dominance = "holds" if design.quasi_dominance else "fails"
    lines += [
        f"Papers' cascade (p = 1): smallest eigenvalue of -A {design.cascade_margin:.4g}, "
        f"quasi-dominance {dominance} (margin {design.quasi_dominance.margin:.4g})."
        + (" It cannot see gains; the next test can." if design.rule == "sound" else ""),
        f"Scaled cascade (2.3): smallest eigenvalue {design.scaled_margin:.4g}.",
        f"Gain: {design.gain_as_published:.6g} by Corollary 2, {b:.6g} by the claim's cone"
        + ("" if design.is_proved else " (neither proved)")
        + f"; the budgets prove {at_most(design.gain_upper_bound, 6)}.",
    ]
    if not design.is_proved and math.isfinite(design.gain_upper_bound):
        lines.append("Only the last gain may be quoted as a guarantee.")
    lines.append(
        "Verdict: PROVED. Every network within these budgets satisfies the claim."
        if design.is_proved
        else "Verdict: NOT_PROVED. The budgets do not imply the claim."
    )
    return "\n".join(lines)
