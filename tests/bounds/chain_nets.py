"""Random dense chains, lower bounds on their gains, and an independent formulation of LipSDP."""

import numpy as np

from tf_lyapunov.bounds.chains import Chain
from tf_lyapunov.theory.sectors import Sector

RELU = Sector(0.0, 1.0)


def random_chain(widths, sector=RELU, seed=0, nonnegative=False):
    rng = np.random.default_rng(seed)
    weights = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        weight = rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)
        weights.append(np.abs(weight) if nonnegative else weight)
    return Chain(tuple(weights), (sector,) * (len(widths) - 2))


def sampled_gain(chain, seed=0, starts=64, rounds=30):
    """Largest norm of a Jacobian W_n D_{n-1} … D_1 W_1 found, D_l of slopes in {α, β}.

    Slopes at random inputs (attained by the network itself for piecewise linear functions with a
    kink at zero and random biases), improved by steps along the leading singular vector.
    """
    rng = np.random.default_rng(seed)
    best = 0.0
    biases = [0.3 * rng.normal(size=w.shape[0]) for w in chain.weights]
    x = rng.normal(size=(starts, chain.widths[0]))
    for start in x:
        point = start
        for _ in range(rounds):
            jacobian, signal = np.eye(len(point)), point
            layers = zip(chain.weights, biases, (*chain.sectors, None), strict=True)
            for weight, bias, sector in layers:
                signal, jacobian = weight @ signal + bias, weight @ jacobian
                if sector is not None:
                    slope = np.where(signal > 0, sector.beta, sector.alpha)
                    jacobian = slope[:, None] * jacobian
                    signal = slope * signal
            _, values, directions = np.linalg.svd(jacobian, full_matrices=False)
            if values[0] > best:
                best = values[0]
            point = point + 0.5 * rng.normal() * directions[0]
    return best


def plain_lipsdp(chain, solver="CLARABEL"):
    """√ρ of LipSDP-neuron in the published form: one dense cone, matrices A, B and T."""
    import cvxpy as cp

    sizes = chain.widths[:-1]
    total, hidden = sum(sizes), sum(sizes[1:])
    a, b = np.zeros((hidden, total)), np.zeros((hidden, total))
    row, column = 0, 0
    for weight in chain.weights[:-1]:
        a[row : row + len(weight), column : column + weight.shape[1]] = weight
        row, column = row + len(weight), column + weight.shape[1]
    b[:, sizes[0] :] = np.eye(hidden)
    alpha = np.repeat([sector.alpha for sector in chain.sectors], sizes[1:])
    beta = np.repeat([sector.beta for sector in chain.sectors], sizes[1:])
    rho, lam = cp.Variable(), cp.Variable(hidden, nonneg=True)
    t = cp.diag(lam)
    p, s = np.diag(alpha * beta), np.diag(alpha + beta)
    form = a.T @ (-2 * p @ t) @ a + a.T @ (s @ t) @ b + b.T @ (s @ t) @ a + b.T @ (-2 * t) @ b
    first, last = np.zeros((sizes[0], total)), np.zeros((sizes[-1], total))
    first[:, : sizes[0]], last[:, -sizes[-1] :] = np.eye(sizes[0]), np.eye(sizes[-1])
    out = chain.weights[-1] @ last
    form = form + out.T @ out - rho * first.T @ first
    options = {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 100_000} if solver == "SCS" else {}
    cp.Problem(cp.Minimize(rho), [(form + form.T) / 2 << 0]).solve(solver=solver, **options)
    return float(np.sqrt(rho.value))
