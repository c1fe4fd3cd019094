"""Certificates by semidefinite programming: against a plain formulation, and beyond its reach.

Wall times, but for the cost by depth. The matrices are small: one BLAS thread
(`OPENBLAS_NUM_THREADS=1`) is fastest, and on a machine that does other work several threads may be
ten times slower.
"""

import statistics
import time

TITLE = "LipSDP: time and bound"

# Hidden layers x width, at which the plain formulation ends in about two minutes.
SHAPES = ((3, 24), (5, 16), (10, 10))
DEPTHS = (10, 20, 40, 80, 160)


def random_chain(widths, seed=0):
    """ReLU chain with He-normal weights."""
    import numpy as np

    from tf_lyapunov.bounds.chains import Chain
    from tf_lyapunov.theory.sectors import Sector

    rng = np.random.default_rng(seed)
    shapes = zip(widths[1:], widths[:-1], strict=True)
    weights = tuple(rng.normal(size=shape) * np.sqrt(2 / shape[1]) for shape in shapes)
    return Chain(weights, (Sector(0.0, 1.0),) * (len(widths) - 2))


def plain_lipsdp(chain):
    """√ρ of LipSDP-neuron for ReLU as published: matrices A, B, T, and one dense cone."""
    import cvxpy as cp
    import numpy as np

    sizes = chain.widths[:-1]
    ends = np.cumsum([0, *sizes])
    total, units = int(ends[-1]), int(ends[-1]) - sizes[0]
    a, b = np.zeros((units, total)), np.eye(total)[sizes[0] :]
    for layer, weight in enumerate(chain.weights[:-1]):
        rows = slice(ends[layer + 1] - sizes[0], ends[layer + 2] - sizes[0])
        a[rows, ends[layer] : ends[layer + 1]] = weight
    rho, lam = cp.Variable(), cp.Variable(units, nonneg=True)
    t = cp.diag(lam)
    out = np.zeros((chain.widths[-1], total))
    out[:, ends[-2] :] = chain.weights[-1]
    first = np.eye(total)[: sizes[0]]
    form = a.T @ t @ b + b.T @ t @ a - 2 * b.T @ t @ b + out.T @ out - rho * first.T @ first
    problem = cp.Problem(cp.Minimize(rho), [(form + form.T) / 2 << 0])
    problem.solve(solver="CLARABEL")
    return float(np.sqrt(rho.value))


def timed(function, repeats=1):
    """`(median of seconds, last result)`."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), result


def bounds(chain, *, seconds=None):
    """One row per method: bound, seconds, and what the method leaves to gain."""
    from tf_lyapunov.bounds.chains import product_gain
    from tf_lyapunov.bounds.eclipse import closed_form, eclipse
    from tf_lyapunov.bounds.liplt import liplt
    from tf_lyapunov.bounds.lipsdp import lipsdp

    found = [("product of norms", *timed(lambda: product_gain(chain)))]
    searches = {
        "LipLT": lambda: liplt(chain),
        "closed form": lambda: closed_form(chain),
        "ECLipsE": lambda: eclipse(chain, seconds=seconds),
        "LipSDP-layer": lambda: lipsdp(chain, variant="layer", seconds=seconds),
        "LipSDP-neuron": lambda: lipsdp(chain, seconds=seconds),
    }
    for name, search in searches.items():
        taken, bound = timed(search)
        if bound.verdict != "PROVED":
            raise RuntimeError(f"{name} proved nothing: {bound.verdict}")
        found.append((name, taken, bound.gain_upper_bound, bound.least))
    return [
        {"method": name, "seconds": taken, "bound": value, "optimum above": (*rest, 0.0)[0]}
        for name, taken, value, *rest in found
    ]


def measure(quick):
    """Times and bounds at sizes that plain LipSDP reaches, and at those that it does not."""
    from tf_lyapunov.bounds.lipsdp import lipsdp

    lipsdp(random_chain((3, 3, 2)))  # imports
    against = []
    for layers, width in ((2, 8),) if quick else SHAPES:
        chain = random_chain((width,) * (layers + 1) + (width // 2,))
        ours, bound = timed(lambda chain=chain: lipsdp(chain), 3)
        interior, other = timed(lambda chain=chain: lipsdp(chain, solver="interior"), 3)
        plain, optimum = timed(lambda chain=chain: plain_lipsdp(chain), 3)
        against.append(
            {
                "hidden layers": f"{layers} x {width}",
                "first-order, s": ours,
                "interior point, s": interior,
                "plain cvxpy (Clarabel), s": plain,
                "times faster": plain / ours,
                "bound / plain optimum": bound.gain_upper_bound / optimum,
                "interior bound / plain optimum": other.gain_upper_bound / optimum,
            }
        )
    shapes = [(784, 256, 128, 10)]
    if not quick:
        shapes += [(784, 1024, 1024, 10), (784, 2000, 10)]
    larger = []
    for shape in shapes:
        rows = bounds(random_chain(shape), seconds=110)
        larger += [{"net": "-".join(map(str, shape)), **row} for row in rows]
    if not quick:
        rows = bounds(random_chain((64,) * 101 + (10,)), seconds=110)
        larger += [{"net": "100 hidden layers of 64", **row} for row in rows]
    return {"against": against, "larger": larger, "depth": depth_cost(quick)}


def depth_cost(quick, width=32):
    """CPU seconds of the layerwise methods and of one first-order step by depth."""
    import numpy as np

    from tf_lyapunov.bounds.chains import scaled_chain
    from tf_lyapunov.bounds.eclipse import closed_form, eclipse
    from tf_lyapunov.bounds.multipliers import smallest_squared_gain
    from tf_lyapunov.bounds.programs import first_order

    def cpu_seconds(function):
        # CPU time, the least of three: what other processes do must not bend the line.
        times = []
        for _ in range(3):
            begin = time.process_time()
            result = function()
            times.append(time.process_time() - begin)
        return min(times), result

    def step(chain):
        scaled = scaled_chain(chain)
        seconds, found = cpu_seconds(
            lambda: first_order.search(
                scaled.weights,
                scaled.alphas,
                scaled.betas,
                lambda lam: smallest_squared_gain(scaled, lam),
                iterations=1,
            )
        )
        return seconds / found.iterations

    methods = {
        "closed form": lambda chain: cpu_seconds(lambda: closed_form(chain))[0],
        "ECLipsE": lambda chain: cpu_seconds(lambda: eclipse(chain))[0],
        "LipSDP, one step": step,
    }
    depths = DEPTHS[:2] if quick else DEPTHS
    chains = {depth: random_chain((width,) * (depth + 1) + (10,), depth) for depth in depths}
    found = {}
    for name, method in methods.items():
        seconds = [method(chain) for chain in chains.values()]
        # Of the deeper half: fixed costs hide the slope of the others.
        slope = float(np.polyfit(np.log(depths[-3:]), np.log(seconds[-3:]), 1)[0])
        found[name] = {"CPU seconds": seconds, "exponent": slope}
    return {"width": width, "depths": list(depths), "methods": found}


def rows(section):
    """Table of all three parts."""
    table = [
        {
            "net": f"{row['hidden layers']} hidden",
            "method": "LipSDP-neuron, plain / ours",
            "seconds": f"{row['plain cvxpy (Clarabel), s']:.3g} / {row['first-order, s']:.3g}",
            "result": f"{row['times faster']:.3g} times faster, bound "
            f"{row['bound / plain optimum']:.7f} of the plain optimum",
        }
        for row in section["against"]
    ]
    table += [
        {
            "net": row["net"],
            "method": row["method"],
            "seconds": f"{row['seconds']:.3g}",
            "result": f"gain ≤ {row['bound']:.6g}"
            + (f", LipSDP's optimum ≥ {row['optimum above']:.6g}" if row["optimum above"] else ""),
        }
        for row in section["larger"]
    ]
    depth = section["depth"]
    table += [
        {
            "net": f"depth {depth['depths'][0]}-{depth['depths'][-1]}, width {depth['width']}",
            "method": name,
            "seconds": f"{part['CPU seconds'][0]:.3g}-{part['CPU seconds'][-1]:.3g}",
            "result": f"CPU time ~ depth^{part['exponent']:.2f}",
        }
        for name, part in depth["methods"].items()
    ]
    return table
