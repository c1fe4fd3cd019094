"""Whether what proof files claim is what a property file asks: box by box, set by set, exactly."""

from fractions import Fraction

import numpy as np

from tf_lyapunov.vnnlib.formulas import conjunctions


def uncovered(query, claims):
    """Sentences on why proved claims do not make a `Query` unsatisfiable; empty if they do.

    Every conjunction of the file must have a claim whose box holds its inputs, and among the
    claim's sets one that holds its outputs: each row of that set is a row of the file, times a
    positive number, with the same bound or a larger one. Compared in rational arithmetic, on the
    inequalities themselves and not on what was made of them for the search.

    Args:
        query: `formulas.Query`.
        claims: sequence of `verification.properties.PropertyClaim`, each verified.
    """
    balls = [claim for claim in claims if np.any(np.isfinite(claim.radii))]
    if balls:
        return ["A proof file is about a ball, and the property about boxes."]
    for claim in claims:
        if (claim.center.size, claim.rows.shape[1]) != (query.inputs, query.outputs):
            return [
                f"A proof file is about {claim.center.size} inputs and {claim.rows.shape[1]} "
                f"outputs, and the property about {query.inputs} and {query.outputs}."
            ]
    held = [_Claim(claim) for claim in claims]
    for k, clause in enumerate(conjunctions(query.formula), 1):
        if not _is_empty(clause) and not any(claim.holds(clause) for claim in held):
            return [f"Nothing is claimed of set {k} of the property."]
    return []


class _Claim:
    """One claim in rational numbers."""

    def __init__(self, claim):
        self.low, self.high = ([Fraction(float(v)) for v in end.ravel()]
                               for end in (claim.low, claim.high))  # fmt: skip
        rows = [
            ({j: Fraction(float(c)) for j, c in enumerate(row) if c != 0}, Fraction(float(b)), s)
            for row, b, s in zip(claim.rows, claim.bounds, claim.strict == 1, strict=True)
        ]
        ends = [*claim.starts[1:], len(rows)]
        self.sets = [rows[a:b] for a, b in zip(claim.starts, ends, strict=True)]

    def holds(self, clause):
        """Whether the inputs and outputs of a conjunction lie in the box and one of the sets."""
        low, high = _bounds(clause)
        within = all(
            i in low and i in high and a <= low[i] and high[i] <= b
            for i, (a, b) in enumerate(zip(self.low, self.high, strict=True))
        )
        outputs = [held for held in clause if held.outputs and not held.inputs]
        return within and any(all(_is_implied(row, outputs) for row in rows) for rows in self.sets)


def _is_implied(row, inequalities):
    """Whether an inequality of outputs follows from one of the file's."""
    factors, bound, strict = row
    if not factors:
        return bound > 0 or (bound == 0 and not strict)
    for held in inequalities:
        if held.outputs.keys() != factors.keys():
            continue
        scales = {factors[j] / held.outputs[j] for j in factors}
        if len(scales) != 1:
            continue
        [scale] = scales
        end = held.widest * scale
        if scale > 0 and (end < bound or (end == bound and (held.strict or not strict))):
            return True
    return False


def _bounds(clause):
    """`(low, high)`, dicts of the bounds of single inputs."""
    low, high = {}, {}
    for held in clause:
        if held.outputs or len(held.inputs) != 1:
            continue
        [(i, factor)] = held.inputs.items()
        end = held.widest / factor
        if factor > 0:
            high[i] = min(high.get(i, end), end)
        else:
            low[i] = max(low.get(i, end), end)
    return low, high


def _is_empty(clause):
    """Whether the bounds of some input contradict each other."""
    low, high = _bounds(clause)
    if any(low[i] > high[i] for i in low.keys() & high.keys()):
        return True
    points = {i for i in low.keys() & high.keys() if low[i] == high[i]}
    for held in clause:
        if held.outputs or (not held.strict and held.inputs):
            continue
        if not held.inputs:
            if held.widest < 0 or (held.strict and held.widest <= 0):
                return True
        elif len(held.inputs) == 1:
            [(i, factor)] = held.inputs.items()
            if i in points and held.widest / factor == low[i]:
                return True
    return False
