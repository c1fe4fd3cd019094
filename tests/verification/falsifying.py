"""Forged claims at random, and points that would break what still verifies."""

import numpy as np

from tf_lyapunov.certification import read_network
from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.program.logits import Float64Logits
from tf_lyapunov.verification import archive, verify


def region_points(claim, rng, count):
    """Points of a `ClaimedRegion`, most of them at its edge."""
    x0, shape = claim.center, (count, *claim.center.shape)
    radius, radius_l1 = claim.radii
    # A box around what the balls leave.
    reach = min(radius, radius_l1, 1e6)
    low, high = np.maximum(claim.low, x0 - reach), np.minimum(claim.high, x0 + reach)
    x = np.where(rng.random(shape) < 0.5, low, high)
    share = np.where(rng.random((count, *[1] * x0.ndim)) < 0.6, 1.0, rng.random(shape))
    x = x0 + share * (x - x0)
    if np.isfinite(radius_l1):  # corners, where linear functions have their ends
        corner = np.zeros((count, x0.size))
        corner[np.arange(count), rng.integers(x0.size, size=count)] = rng.choice([-1, 1], count)
        x[::2] = (x0 + (corner * radius_l1).reshape(shape))[::2]
    return moved_into(claim, x)


def moved_into(claim, x):
    """Points moved into a region: onto the box, then towards the centre."""
    x = np.clip(x, claim.low, claim.high)
    away = (x - claim.center).reshape(len(x), -1)
    share = np.ones(len(x))
    for order, radius in zip((2, 1), claim.radii, strict=True):
        size = np.linalg.norm(away, order, axis=1)
        share = np.minimum(share, np.where(size > radius, radius / np.maximum(size, 1e-300), 1))
    share = np.where(share < 1, share * (1 - 1e-12), 1.0)
    return claim.center + (away * share[:, None]).reshape(x.shape)


class Model:
    """Exact logits of a Keras model, up to rounding."""

    def __init__(self, model):
        self.logits = Float64Logits(read_network(model))

    def __call__(self, x):
        return self.logits.predict(x, max(len(x), 1))


def least_margins(model, claim, rng, count=600, rounds=6):
    """Smallest distance from the sets of a property claim that random search finds, per set."""
    x = region_points(claim, rng, count)
    best, least = x, None
    size = np.abs(x - claim.center).max(initial=1e-9)
    for k in range(rounds):
        excess = model(x) @ claim.rows.T - claim.bounds
        values = np.maximum.reduceat(excess, claim.starts, axis=1)
        least = values.min(axis=0) if least is None else np.minimum(least, values.min(axis=0))
        order = np.argsort(values.min(axis=1))[: max(count // 10, 1)]
        best = x[order]
        step = rng.normal(size=(count, *claim.center.shape)) * size * 0.5**k
        x = moved_into(claim, best[rng.integers(len(best), size=count)] + step)
    return least


def edited(header, arrays, rng):
    """One random edit of one array or field; its name."""
    names = sorted(name for name in arrays if arrays[name].size)
    name = names[rng.integers(len(names))]
    held = arrays[name].copy()
    flat = held.reshape(-1)
    kind = rng.integers(9)
    at = rng.integers(flat.size)
    with np.errstate(all="ignore"):
        if kind == 0:
            flat[at] = flat[at] * rng.choice([0, -1, 2, 0.5, 1.01, 0.99])
        elif kind == 1:
            flat[at] = flat[at] + rng.choice([1, -1, 2, 5])
        elif kind == 2:
            held = (held * rng.choice([1.02, 0.98, 1.3, -1, 0])).astype(held.dtype)
        elif kind == 3:
            held = (held + rng.choice([0.02, -0.02, 0.5, -0.5, 1, -1])).astype(held.dtype)
        elif kind == 4:
            held = np.roll(held, 1, axis=-1)
        elif kind == 5:
            held = rng.permuted(held, axis=-1)
        elif kind == 6:
            other = flat[rng.integers(flat.size)]
            flat[at] = other
        elif kind == 7:
            held = held[:-1] if held.ndim and len(held) > 1 else held
        else:
            big = [0, 1e30, -1e30, 1e-30]
            if held.dtype.kind in "iu":
                limits = np.iinfo(held.dtype)
                big = [max(-1, limits.min), 0, 1, 2, min(2**31 - 1, limits.max)]
            flat[at] = rng.choice(big)
    arrays[name] = held
    return name


def forgery(path, model, rng, edits=1, change=edited):
    """`Verification` of a file with random edits and a fresh checksum, or None if it is refused."""
    header, arrays = archive.read(path)
    arrays = dict(arrays)
    for _ in range(edits):
        change(header, arrays, rng)
    other = path.with_name("forged.npz")
    archive.write(other, header, arrays)
    try:
        return verify(other, model)
    except ProofFileError:
        return None
