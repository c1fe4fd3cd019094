"""Gains of dense chains: products, LipLT, and the matrix inequality that multipliers must satisfy.

For slopes in [α_l, β_l], m = (α+β)/2, p = αβ and diagonal Λ_l ≥ 0, every pair of inputs has
Σ λ(y - αv)(βv - y) ≥ 0 with v = W_l Δx_{l-1}, y = Δx_l. So ‖Δf‖² ≤ ρ‖Δx_0‖² wherever

    ρ‖x_0‖² - ‖W_n x_{n-1}‖² + Σ_l (x_lᵀΛ_l x_l - 2m x_lᵀΛ_lW_l x_{l-1} + p‖Λ_l^½ W_l x_{l-1}‖²) ≥ 0

as a quadratic form in (x_0, …, x_{n-1}). With Δx_0ᵀΔf - δ‖Δf‖² - ν‖Δx_0‖² in the place of the first
two terms, taken negatively, it proves the network IIFOFP(δ, ν).
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.verification.arithmetic import (
    SLACK,
    SMALLEST,
    TINY,
    UNIT,
    frobenius_up,
    gamma,
    is_semidefinite,
    norm_up,
    product_up,
    sqrt_up,
    sum_up,
    times,
    up,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Multipliers:
    """A claim about a chain: Λ_l ≥ 0 and sectors (α_l, β_l) that make the form ≥ 0 at ρ.

    Attributes:
        squared: ρ.
        values: one array per hidden layer.
        sectors: one (alpha, beta) per hidden layer; must contain the activation's own slopes.
    """

    squared: float
    values: tuple
    sectors: tuple


def product_gain(chain):
    """‖W_n‖·Π_l max|slope|·‖W_l‖."""
    norms = [norm_up(w, e) for w, e in zip(chain.weights, chain.errors, strict=True)]
    return product_up(*norms, *(max(map(abs, s)) for s in chain.slopes))


def liplt_gain(chain):
    """Bound by the norms of products of neighbouring layers.

    k_l = ‖W_l m_{l-1}W_{l-1} … W_1‖ + Σ_{j<l} ‖W_l m_{l-1} … m_{j+1}W_{j+1}‖·r_j·k_j, with
    φ(t) = m·t + r·ψ(t) and ψ of gain at most one.
    """
    return _liplt(chain)[0]


def liplt_pair_gains(chain):
    """The same for all differences of outputs, (K, K): the rows of the last products differ.

    A product P of the layers up to the outputs has the rows of all of them; that of f_i - f_j is
    P_i - P_j.
    """
    parts = _liplt(chain)[1]
    count = len(chain.weights[-1])
    found = np.zeros((count, count))
    for i in range(count):
        for j in range(i):
            total = 0.0
            for product, error, factor in parts:
                row = product[i : i + 1] - product[j : j + 1]
                spread = 2 * UNIT * np.abs(row)
                if np.ndim(error):
                    spread = (spread + error[i : i + 1] + error[j : j + 1]) * SLACK
                else:
                    spread = spread + 2 * error
                total = sum_up(total, product_up(norm_up(row, spread), factor))
            found[i, j] = found[j, i] = total
    return found


def _liplt(chain):
    """k of the outputs, and `(product, error, r·k)` of the products that end there."""
    reach, parts = [], []
    for layer, weight in enumerate(chain.weights):
        product, error, parts = weight, chain.errors[layer], []
        for j in range(layer - 1, -1, -1):
            alpha, beta = chain.slopes[j]
            radius = float(up((beta - alpha) / 2 * (1 + 2 * UNIT)))
            parts.append((product, error, product_up(radius, reach[j])))
            mean = (alpha + beta) / 2
            spread = abs(mean) * error + 4 * UNIT * abs(mean) * np.abs(product) + SMALLEST
            spread = spread * SLACK
            product, error = times(mean * product, chain.weights[j], spread, chain.errors[j])
        parts.append((product, error, 1.0))
        total = 0.0
        for part, spread, factor in parts:
            total = sum_up(total, product_up(norm_up(part, spread), factor))
        reach.append(total)
    return reach[-1], parts


def refusal(chain, multipliers):
    """Why a claim does not fit a chain at all, or None."""
    return unfit([len(w) for w in chain.weights[:-1]], chain.slopes, multipliers, "chain")


def unfit(widths, slopes, multipliers, whole):
    """Why multipliers do not fit elementwise functions of these widths and slopes, or None."""
    if len(multipliers.values) != len(slopes) or len(multipliers.sectors) != len(slopes):
        return f"the {whole} has {len(slopes)} hidden layers"
    for lam, width in zip(multipliers.values, widths, strict=True):
        if lam.shape != (width,):
            return f"a layer of {width} units has {lam.size} multipliers"
        if not (np.all(np.isfinite(lam)) and np.all(lam >= 0)):
            return "a multiplier is negative, infinite or NaN"
    for used, own in zip(multipliers.sectors, slopes, strict=True):
        if not (used[0] <= own[0] and own[1] <= used[1] and np.all(np.isfinite(used))):
            return f"slopes in {own} of an activation are outside the sector {tuple(used)}"
    return None


def proves_gain(chain, multipliers):
    """Whether the multipliers prove that the chain's squared gain is at most ρ."""
    if refusal(chain, multipliers) is not None:
        return False
    if not (math.isfinite(multipliers.squared) and multipliers.squared > 0):
        return False
    matrix, error, ends = _layers_form(chain, multipliers)
    first, tail = slice(0, ends[1]), slice(ends[-2], ends[-1])
    add_block(matrix, error, (first, first), multipliers.squared * np.eye(ends[1]))
    gram, spread = times(chain.weights[-1].T, chain.weights[-1], *transposed_pair(chain.errors[-1]))
    add_block(matrix, error, (tail, tail), -gram, spread)
    return is_semidefinite((matrix + matrix.T) / 2, (error + error.T) * SLACK)


def proves_indices(chain, delta, nu, multipliers):
    """Whether the multipliers prove the chain IIFOFP(δ, ν) (unequal widths: zero-padded)."""
    if refusal(chain, multipliers) is not None or not (math.isfinite(delta + nu) and delta > 0):
        return False
    matrix, error, ends = _layers_form(chain, multipliers)
    last, spread = chain.weights[-1], chain.errors[-1]
    first, tail = slice(0, ends[1]), slice(ends[-2], ends[-1])
    shared = min(len(last), ends[1])
    add_block(matrix, error, (first, first), -nu * np.eye(ends[1]))
    gram, gram_error = times(last.T, last, *transposed_pair(spread))
    add_block(
        matrix, error, (tail, tail), -delta * gram, delta * gram_error + UNIT * np.abs(delta * gram)
    )
    half, half_error = np.zeros((2, ends[1], ends[-1] - ends[-2]))
    half[:shared] = last[:shared] / 2
    half_error[:shared] = np.broadcast_to(spread, last.shape)[:shared] / 2
    add_block(matrix, error, (first, tail), half, half_error)
    add_block(matrix, error, (tail, first), half.T, half_error.T)
    return is_semidefinite((matrix + matrix.T) / 2, (error + error.T) * SLACK)


def cone_gain(delta, nu):
    """Largest slope (1 + √(1 - 4δν))/(2δ) of the cone of IIFOFP(δ, ν), rounded up; δ > 0."""
    inside = 1 - 4 * delta * nu
    inside += 8 * UNIT * (1 + 4 * abs(delta * nu))
    if not inside >= 0:
        return math.inf
    return float((1 + sqrt_up(inside)) / (2 * delta) * (1 + 8 * UNIT))


def narrow_input(chain):
    """A chain of at least the same gain whose input is no wider than its first hidden layer.

    W_1 = RT with ‖T‖ ≤ 1 if RRᵀ ⪰ W_1W_1ᵀ, so that R may stand for W_1.
    """
    root = narrow_weight(chain.weights[0], chain.errors[0])
    if root is None:
        return chain
    return dataclasses.replace(
        chain, weights=(root, *chain.weights[1:]), errors=(0.0, *chain.errors[1:])
    )


def narrow_weight(weight, error):
    """R of as many columns as rows with RRᵀ ⪰ WWᵀ for every W within the error; None without."""
    if weight.shape[1] <= weight.shape[0]:
        return None
    gram, spread = times(weight, weight.T, error, np.transpose(error) if np.ndim(error) else 0.0)
    gram = (gram + gram.T) / 2
    side, trace = len(gram), float(np.trace(gram))
    shift = 4 * frobenius_up(spread) + 16 * gamma(side + 16) * trace
    raised = gram + shift * np.eye(side)
    try:
        root = np.linalg.cholesky(raised)
    except np.linalg.LinAlgError:
        return None
    square, rounding = times(root, root.T)
    # RRᵀ - G - shift·I is this small, and G this close to W_1W_1ᵀ.
    defect = sum_up(
        frobenius_up(square - raised) * (1 + 4 * UNIT),
        frobenius_up(rounding),
        frobenius_up(spread) * (1 + 4 * UNIT),
        4 * UNIT * frobenius_up(raised),
    )
    return root if defect <= shift else None


def _layers_form(chain, multipliers):
    """Matrix of the layers' terms over (x_0, …, x_{n-1}), its entrywise error, block ends."""
    ends = np.cumsum([0, *(w.shape[1] for w in chain.weights)])
    total = int(ends[-1])
    matrix, error = np.zeros((total, total)), np.zeros((total, total))
    for layer, (lam, sector) in enumerate(
        zip(multipliers.values, multipliers.sectors, strict=True)
    ):
        before, here = slice(*ends[layer : layer + 2]), slice(*ends[layer + 1 : layer + 3])
        weight, spread = chain.weights[layer], chain.errors[layer]
        sector_terms(matrix, error, weight, spread, lam, sector, before, here)
    return matrix, error, ends


def sector_terms(matrix, error, weight, spread, lam, sector, before, here):
    """Adds zᵀΛz - 2m zᵀΛy + p yᵀΛy of y = W x to a form and its errors.

    Args:
        matrix, error: float64 (n, n), changed in place.
        weight, spread: W and its entrywise error, an array or 0.0.
        lam: diagonal of Λ.
        sector: (α, β), with m = (α + β)/2 and p = αβ.
        before, here: slices of x and z among the signals.
    """
    alpha, beta = sector
    add_block(matrix, error, (here, here), np.diag(lam))
    mean, product = (alpha + beta) / 2, alpha * beta
    scaled = lam[:, None] * weight
    scaled_error = 2 * UNIT * np.abs(scaled) + lam[:, None] * spread * SLACK + SMALLEST
    cross = -mean * scaled
    cross_error = (abs(mean) * scaled_error + 4 * UNIT * np.abs(cross)) * SLACK
    add_block(matrix, error, (here, before), cross, cross_error)
    add_block(matrix, error, (before, here), cross.T, cross_error.T)
    if alpha != 0 and beta != 0:
        turned = np.transpose(spread) if np.ndim(spread) else 0.0
        square, square_error = times(weight.T, scaled, turned, scaled_error)
        size = square_error + np.abs(square)
        square_error = abs(product) * (square_error + 4 * UNIT * size) + SMALLEST * size
        add_block(matrix, error, (before, before), product * square, square_error)


def add_block(matrix, error, block, value, value_error=0.0):
    """Adds a block, and to the errors its own and that of this sum."""
    error[block] += value_error + 2 * UNIT * (np.abs(matrix[block]) + np.abs(value)) + TINY
    matrix[block] += value


def transposed_pair(error):
    """Errors of WᵀW's factors."""
    return (np.transpose(error), error) if np.ndim(error) else (0.0, 0.0)
