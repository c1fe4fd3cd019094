"""How far softmax outputs move, from ranges and gains of margins.

With m_k = f_c - f_k ∈ [l_k, h_k] on a set, k ≠ c, and p the softmax of f,

    p_k ≤ 1/(1 + e^l_k),   1 - p_c ≤ R/(1 + R), R = Σ e^-l_k,   p_c ≤ 1/(1 + Σ e^-h_k),
    p_k ≥ 1/(1 + e^h_k + Σ_{j≠k,c} e^(h_k - l_j)).                                            (R)

**Slopes.** The change of f from x to x + e leads along a segment, on which margins keep their
ranges, being linear in f. Where margins change by d_k along it, |d_k| ≤ g_k‖e‖, p changes at the
rate -Σ_k d_k p_k(e_k - p), as Jacobians diag(p) - ppᵀ send ones to 0. In l2, ‖e_k - p‖² =
(1-p_k)² + Σ_{j≠k} p_j² ≤ 2(1-p_k)², in l∞ it is (1-p_k)². Hence, for any λ ≥ 0 and with M the range
of 1 - p_c,

    ‖Δp‖/‖e‖ ≤ √2 (l∞: 1) · [ Σ_k max_{0≤p≤u_k} (g_k p(1-p) - λp) + λM ],                      (P)

by weak duality for Σp_k ≤ M; the inner maximum is at ½(1 - λ/g_k), cut to its range. One competing
class has √2·g/4, with g at most √2 times the gain of f: never more than half of that gain.

**Distances.** Changes Δp sum to 0, and lie in [-b, a] entry by entry. Their positive and negative
parts both sum to S ≤ min(Σa, Σb, ½Σmax(a, b)), and ‖Δp‖² is convex: for a fixed S it is largest
where the largest entries are filled one after another, and grows with S.                       (D)
"""

import math

import numpy as np

# Of exponentials, quotients and sums of up to 10⁴ terms, with room.
_ROUNDING = 1e-11
# What probabilities below the smallest that are told apart count as; e^-690 is smaller.
_SMALL, _MOST = 1e-299, 690.0
_STEPS = 60


class Margins:
    """Ranges of f_c - f_k on a set.

    Args:
        low, high: float64 (classes - 1,), or (1,) of one logit, whose other class has logit 0.
    """

    def __init__(self, low, high):
        self.low, self.high = (np.clip(v, -_MOST, _MOST) for v in (low, high))

    @property
    def missing(self):
        """Upper bound on 1 - p_c."""
        rest = float(np.sum(np.exp(-self.low)))
        return min(rest / (1 + rest) * (1 + _ROUNDING) + _SMALL, 1.0)

    def steepest(self, head):
        """Largest ‖diag(p) - ppᵀ‖, at most max 2p(1-p) in l2 and l∞; of a sigmoid p(1-p)."""
        missing = self.missing
        found = 0.25 if missing >= 0.5 else missing * (1 - missing) * (1 + _ROUNDING)
        return found if head == "sigmoid" else 2 * found

    def probabilities(self):
        """(R): `(low, high)`, those of the other classes, and of c at the end."""
        high = 1 / (1 + np.exp(self.low)) * (1 + _ROUNDING) + _SMALL
        most = 1 / (1 + float(np.sum(np.exp(-self.high)))) * (1 + _ROUNDING)
        below = np.exp(-self.low)
        others = np.sum(below) - below  # cancels to rounding of the sum
        others = np.maximum(others, 0.0) + np.sum(below) * 1e-14
        with np.errstate(over="ignore"):
            low = 1 / (1 + np.exp(self.high) * (1 + others)) * (1 - _ROUNDING)
        low = np.maximum(low - _SMALL, 0.0)
        least = max(1 - self.missing, 0.0)
        return np.append(low, least), np.minimum(np.append(high, most), 1.0)


def slope(margins, gains, norm, head):
    """(P): upper bound on ‖Δp‖/‖e‖ for gains of the margins.

    Args:
        margins: `Margins` on the set.
        gains: float64 (k,), |Δm_k| ≤ gains_k·‖e‖.
        norm: `"l2"` or `"linf"`, of the changes of p.
        head: `"softmax"`, or `"sigmoid"` with its one probability.
    """
    most = np.minimum(margins.probabilities()[1][:-1], margins.missing)
    gains = np.maximum(gains, _SMALL)

    def best(price):
        p = np.clip((1 - price / gains) / 2, 0.0, most)
        return p, float(np.sum(p * (gains * (1 - p) - price))) + price * margins.missing

    low, high = 0.0, float(np.max(gains))
    p, found = best(low)
    if np.isfinite(high) and np.sum(p) > margins.missing:
        for _ in range(_STEPS):  # every price proves a bound
            middle = (low + high) / 2
            p, value = best(middle)
            found = min(found, value)
            low, high = (middle, high) if np.sum(p) > margins.missing else (low, middle)
    return found * factor(norm, head) * (1 + _ROUNDING) + _SMALL


def distance(margins, centre, norm, head):
    """(D): upper bound on ‖p' - p‖ for p' of the set and p at a centre.

    Args:
        margins, centre: `Margins` on the set, and at one of its points.
        norm, head: as above.
    """
    (low, high), (own_low, own_high) = margins.probabilities(), centre.probabilities()
    rounded = _ROUNDING * (high + own_high)
    up = np.clip(high - own_low + rounded, 0.0, 1.0)
    down = np.clip(own_high - low + rounded, 0.0, 1.0)
    if head == "sigmoid":
        up, down = up[:1], down[:1]
    if norm == "linf" or head == "sigmoid":
        return float(max(up.max(), down.max()))
    moved = float(np.sum(np.maximum(up, down))) / 2
    total = min(float(np.sum(up)), float(np.sum(down)), moved, 1.0) * (1 + _ROUNDING)
    return math.sqrt(_filled(up, total) + _filled(down, total)) * (1 + _ROUNDING)


def factor(norm, head):
    """Upper bound on ‖e_k - p‖/(1 - p_k); one probability alone changes by its own share."""
    return math.sqrt(2) * (1 + 1e-15) if norm == "l2" and head == "softmax" else 1.0


def _filled(most, total):
    """Largest Σv² of 0 ≤ v ≤ most with Σv = total."""
    ordered = np.sort(most)[::-1]
    left = np.maximum(total - np.concatenate([[0.0], np.cumsum(ordered)[:-1]]), 0.0)
    return float(np.sum(np.minimum(ordered, left + 1e-15) ** 2))
