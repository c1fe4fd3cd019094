"""Supply rates of systems with memory, beside `Indices`: a gain, a general form, contraction.

A system x⁺ = f(x, u), y = h(x, u) is incrementally dissipative for the supply rate s if a storage
V ≥ 0 of the difference of two trajectories satisfies, at every step and for all inputs,

    V(Δx⁺) - V(Δx) ≤ s(Δu, Δy) = ΔyᵀQΔy + 2ΔyᵀSᵀΔu + ΔuᵀRΔu.                                (1)

Summed over time it bounds the outputs by the inputs and by V(Δx₀) of the initial states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tf_lyapunov.digits import exactly
from tf_lyapunov.theory.arguments import finite_float
from tf_lyapunov.theory.sectors import Indices
from tf_lyapunov.theory.spectra import symmetric_matrix


@dataclass(frozen=True)
class L2Gain:
    """Gain γ over sequences: Σ‖Δy_t‖² ≤ γ²Σ‖Δu_t‖² + γV(Δx₀).

    Q = -I/γ, S = 0, R = γI in (1).

    Args:
        gamma: γ, positive.

    Raises:
        ValueError: if γ is not positive and finite.

    Example:

    >>> L2Gain(2.0)
    L2Gain(gamma=2.0)
    """

    gamma: float

    def __post_init__(self):
        gamma = finite_float("gamma", self.gamma)
        if gamma <= 0:
            raise ValueError(f"`gamma` must be positive. Received: gamma={gamma}.")
        object.__setattr__(self, "gamma", gamma)

    def matrices(self, outputs, inputs):
        """`(Q, S, R)` of (1), float64."""
        zero = np.zeros((inputs, outputs))
        return -np.eye(outputs) / self.gamma, zero, self.gamma * np.eye(inputs)


@dataclass(frozen=True)
class Contracting:
    """Contraction: V(Δx⁺) ≤ rate²·V(Δx) for equal inputs, so that initial states are forgotten.

    Args:
        rate: a, above 0 and at most 1.

    Raises:
        ValueError: if the rate is not in (0, 1].

    Example:

    >>> Contracting(0.9)
    Contracting(rate=0.9)
    """

    rate: float

    def __post_init__(self):
        rate = finite_float("rate", self.rate)
        if not 0 < rate <= 1:
            raise ValueError(
                f"`rate` must be above 0 and at most 1. Received: rate={rate}. A rate above 1 "
                "would let differences grow."
            )
        object.__setattr__(self, "rate", rate)


@dataclass(frozen=True, eq=False)
class Supply:
    """A supply rate (1) of given matrices, with Q ≺ 0 and R - SQ⁻¹Sᵀ ≻ 0.

    Q ≺ 0 makes V a storage that vanishing inputs cannot refill; the second condition is what a
    system needs that answers to its input at once.

    Args:
        Q: (outputs, outputs), symmetric and negative definite.
        S: (inputs, outputs).
        R: (inputs, inputs), symmetric.

    Raises:
        ValueError: if shapes do not fit, Q is not negative definite, or no system with a direct
            answer to its input can satisfy the rate.

    Example:

    >>> rate = Supply(Q=[[-0.5]], S=[[0.0]], R=[[2.0]])  # a gain of 2
    >>> rate.outputs, rate.inputs
    (1, 1)
    """

    Q: np.ndarray
    S: np.ndarray
    R: np.ndarray

    def __repr__(self):
        return f"Supply(Q={exactly(self.Q)}, S={exactly(self.S)}, R={exactly(self.R)})"

    def __post_init__(self):
        q, r = symmetric_matrix(self.Q, "Q"), symmetric_matrix(self.R, "R")
        s = np.asarray(self.S, dtype=np.float64)
        if s.shape != (len(r), len(q)) or not np.all(np.isfinite(s)):
            raise ValueError(
                "`S` must be a finite matrix (inputs, outputs) of the sizes of R and Q. Received: "
                f"shapes Q {q.shape}, S {s.shape}, R {r.shape}."
            )
        top = float(np.linalg.eigvalsh(q)[-1])
        if not top < 0:
            raise ValueError(
                "`Q` must be negative definite: with an indefinite Q the supply rate bounds no "
                f"output. Received: largest eigenvalue {top:.3g}. Subtract a multiple of I."
            )
        low = float(np.linalg.eigvalsh(r + s @ np.linalg.solve(-q, s.T))[0])
        if not low > 0:
            raise ValueError(
                "`R - S Q⁻¹ Sᵀ` must be positive definite, or only outputs that do not see some "
                f"input satisfy the supply rate. Received: smallest eigenvalue {low:.3g}. Add a "
                "multiple of I to R."
            )
        for name, value in (("Q", q), ("S", s), ("R", r)):
            object.__setattr__(self, name, value)

    @property
    def outputs(self):
        return len(self.Q)

    @property
    def inputs(self):
        return len(self.R)

    def matrices(self, outputs, inputs):
        """`(Q, S, R)` of (1), float64."""
        if (outputs, inputs) != (self.outputs, self.inputs):
            raise ValueError(
                f"The supply rate is of {self.outputs} outputs and {self.inputs} inputs. "
                f"Received: a system of {outputs} outputs and {inputs} inputs."
            )
        return self.Q, self.S, self.R


def supply_matrices(supply, outputs, inputs):
    """`(Q, S, R)` of a supply rate for given sizes: Q = -2δI, S = I, R = -2νI for `Indices`.

    Inputs and outputs of different numbers are paired from the first on, as everywhere here.

    Args:
        supply: `L2Gain`, `Indices` or `Supply`.
        outputs, inputs: sizes.

    Returns:
        Float64 arrays (outputs, outputs), (inputs, outputs), (inputs, inputs).

    Raises:
        TypeError: for another object.

    Example:

    >>> Q, S, R = supply_matrices(Indices(0.5, -1.0), 1, 1)
    >>> Q.item(), S.item(), R.item()
    (-1.0, 1.0, 2.0)
    """
    if isinstance(supply, Indices):
        q, r = -2 * supply.delta * np.eye(outputs), -2 * supply.nu * np.eye(inputs)
        return q, np.eye(inputs, outputs), r
    if isinstance(supply, L2Gain | Supply):
        return supply.matrices(outputs, inputs)
    raise TypeError(
        "`supply` must be L2Gain(gamma), Indices(delta, nu), Supply(Q, S, R) or Contracting(rate). "
        f"Received: supply={supply!r}."
    )


def supply_config(supply):
    """A supply rate as JSON can hold it; `supply_from_config` is the way back.

    Example:

    >>> supply_from_config(supply_config(L2Gain(2.0)))
    L2Gain(gamma=2.0)
    """
    names = {L2Gain: ("gamma",), Contracting: ("rate",), Indices: ("delta", "nu")}
    if isinstance(supply, Supply):
        return {"kind": "Supply", **{n: getattr(supply, n).tolist() for n in ("Q", "S", "R")}}
    return {"kind": type(supply).__name__, **{n: getattr(supply, n) for n in names[type(supply)]}}


def supply_from_config(config):
    """The supply rate of `supply_config`; a supply rate is returned as it is.

    Raises:
        ValueError: if it names no kind of supply rate.

    Example:

    >>> supply_from_config({"kind": "Contracting", "rate": 0.5})
    Contracting(rate=0.5)
    """
    kinds = {cls.__name__: cls for cls in (L2Gain, Contracting, Supply, Indices)}
    if isinstance(config, tuple(kinds.values())):
        return config
    if not isinstance(config, dict) or config.get("kind") not in kinds:
        raise ValueError(
            f"`supply` must be one of {', '.join(sorted(kinds))}. Received: supply={config!r}."
        )
    fields = {name: value for name, value in config.items() if name != "kind"}
    return kinds[config["kind"]](**fields)


def feedthrough_form(supply, outputs, inputs):
    """`(center, half, root)` with which D = center + half·Z·root, ‖Z‖ < 1, satisfies the rate.

        center = -Q⁻¹Sᵀ,  half = (-Q)^{-1/2},  rootᵀroot = R - SQ⁻¹Sᵀ:
        R + SD + DᵀSᵀ + DᵀQD = rootᵀ(I - ZᵀZ)root.                                            (2)

    With D = center + N the left side of (2) is R - SQ⁻¹Sᵀ + NᵀQN, and N = half·Z·root.

    Args:
        supply: a supply rate with Q ≺ 0.
        outputs, inputs: sizes.

    Returns:
        Float64 arrays (outputs, inputs), (outputs, outputs), (inputs, inputs).

    Raises:
        ValueError: if Q is not negative definite, or R - SQ⁻¹Sᵀ not positive definite.

    Example:

    >>> center, half, root = feedthrough_form(Indices(0.5, 0.0), 1, 1)
    >>> center.item(), half.item(), root.item()
    (1.0, 1.0, 1.0)
    """
    q, s, r = supply_matrices(supply, outputs, inputs)
    values, vectors = np.linalg.eigh(-q)
    if not values[0] > 0:
        raise ValueError(
            f"The supply rate must have Q ≺ 0. Received: {supply!r}. Give a positive `delta`, "
            "however small."
        )
    inverse = (vectors / values) @ vectors.T
    half = (vectors / np.sqrt(values)) @ vectors.T
    schur = r + s @ inverse @ s.T
    values, vectors = np.linalg.eigh((schur + schur.T) / 2)
    if not values[0] > 1e-9 * max(abs(values[-1]), 1e-300):
        raise ValueError(
            "The supply rate leaves no room for an answer to every input. Received: "
            f"{supply!r} for {outputs} outputs and {inputs} inputs. "
            + _room(supply, outputs, inputs)
        )
    root = (vectors * np.sqrt(values)) @ vectors.T
    return inverse @ s.T, half, root


def _room(supply, outputs, inputs):
    if not isinstance(supply, Indices):
        return "Enlarge R."
    if inputs > outputs and supply.nu >= 0:
        return "With fewer outputs than inputs `nu` must be negative."
    return f"Lower `nu` below {math.nextafter(0.25 / supply.delta, 0.0):.9g}."
