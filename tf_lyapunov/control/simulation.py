"""Simulated loops: attacks on regions of attraction, and how large a region simulations see."""

import dataclasses

import numpy as np

from tf_lyapunov.showing import Page, Shown, number

# What float64 simulation may err by, relative to V.
_ROOM = 1e-9
# Trajectories that are simulated together.
PART = 4096


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoopAttack(Shown):
    """Outcome of `RegionOfAttraction.attack`.

    Attributes:
        starts: float64 (n, states), on the ellipsoid's boundary.
        left: bool (n,): the trajectory left the ellipsoid or the box.
        rate: largest V(x⁺)/V(x) met.
        steps: number of steps simulated.
        trajectories: float64 (steps + 1, few, states), for figures.
    """

    starts: np.ndarray
    left: np.ndarray
    rate: float
    steps: int
    trajectories: np.ndarray

    def __len__(self):
        return len(self.starts)

    def _page(self):
        return Page(
            "LoopAttack",
            (
                ("trajectories", len(self)),
                ("left", int(self.left.sum())),
                ("steps", self.steps),
                ("largest V(x⁺)/V(x)", f"{self.rate:.6g}"),
            ),
        )


def control_of(controller):
    """Function from states (…, n) to π(x) - π(0), float64, of a `loops.Controller`."""

    def control(x):
        moved = x
        for weight, operation, rest in zip(
            controller.weights[:-1], controller.activations, controller.rests, strict=True
        ):
            rest = rest[None]
            signal = rest + moved @ weight.T
            zero = np.zeros_like(signal)
            moved = operation.forward(signal, zero)[0] - operation.forward(rest, rest * 0)[0]
        return moved @ controller.weights[-1].T

    return control


def boundary(shape, count, seed):
    """Points with xᵀPx = 1, evenly spread directions in the ellipsoid's own metric."""
    rng = np.random.default_rng(seed)
    n = len(shape)
    if n == 2:
        angle = 2 * np.pi * (np.arange(count) + rng.random()) / count
        directions = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    else:
        directions = rng.normal(size=(count, n))
    # P = RRᵀ, so that ‖Rᵀx‖² = V(x).
    root = np.linalg.cholesky(shape)
    points = np.linalg.solve(root.T, directions.T).T
    return points / np.sqrt(np.einsum("ij,jk,ik->i", points, shape, points))[:, None]


def attack(plant, control, shape, rate, box, starts, steps, kept=16):
    """`LoopAttack` from starts on or in the ellipsoid."""
    starts = np.array(starts)
    some = np.linspace(0, len(starts) - 1, min(kept, len(starts))).astype(int)
    left, worst = np.zeros(len(starts), bool), 0.0
    for part in _parts(len(starts)):
        left[part], most = _followed(plant, control, shape, rate, box, starts[part], steps)
        worst = max(worst, most)
    x = starts[some]
    paths = [x]
    for _ in range(steps):
        x = plant.step(x, control(x))
        paths.append(x)
    return LoopAttack(starts, left, worst, steps, np.array(paths))


def _parts(count):
    """Slices of starts whose arrays stay in the cache."""
    return (slice(first, first + PART) for first in range(0, count, PART))


def _followed(plant, control, shape, rate, box, x, steps):
    """`(left, largest ratio)` of trajectories from x."""
    left, worst = np.zeros(len(x), bool), 0.0
    value = np.einsum("ij,jk,ik->i", x, shape, x)
    for _ in range(steps):
        x = plant.step(x, control(x))
        after = np.einsum("ij,ij->i", x @ shape, x)
        # Far below the boundary, V is made of rounding.
        told = value > 1e-12
        ratio = np.divide(after, value, out=np.zeros_like(after), where=told)
        worst = max(worst, float(np.max(ratio, initial=0.0)))
        left |= ~(after <= 1 + _ROOM) | ~np.all(np.abs(x) <= box * (1 + _ROOM), axis=1)
        left |= ~(ratio <= rate + _ROOM)
        value = after
    return left, worst


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison(Shown):
    """How large the proved ellipsoid is beside what simulations of the same box see.

    Attributes:
        starts: float64 (n, states), drawn in the box.
        stayed: bool (n,): the trajectory stayed in the box and came near 0: an estimate.
        inside: bool (n,): the start is in the ellipsoid.
        share: volume of the ellipsoid over that of the simulated region, an estimate.
    """

    starts: np.ndarray
    stayed: np.ndarray
    inside: np.ndarray
    share: float

    def _page(self):
        facts = (
            ("starts", len(self.starts)),
            ("stayed", int(self.stayed.sum())),
            ("in the ellipsoid", int(self.inside.sum())),
            ("share", number(100 * self.share, 3) + "%"),
        )
        return Page("Comparison", facts)


def compare(plant, control, shape, volume, box, count, steps, seed):
    """`Comparison` on random starts of the box."""
    rng = np.random.default_rng(seed)
    starts = rng.uniform(-1.0, 1.0, (count, len(box))) * box
    stayed = np.ones(count, bool)
    for part in _parts(count):
        x, there = starts[part], stayed[part]
        for _ in range(steps):
            x = plant.step(x, control(x))
            there &= np.all(np.abs(x) <= box, axis=1)
            x = np.where(there[:, None], x, 0.0)
        there &= np.all(np.abs(x) <= 0.05 * box, axis=1)
    inside = np.einsum("ij,jk,ik->i", starts, shape, starts) <= 1
    whole = float(np.prod(2 * box)) * float(stayed.mean())
    return Comparison(starts, stayed, inside, volume / whole if whole else np.inf)
