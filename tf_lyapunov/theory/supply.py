"""The supply rate ω of pairs of signals, and searches for pairs that make it negative."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tf_lyapunov.theory.sectors import Indices, Sector


@dataclass(frozen=True)
class SupplyWitness:
    """A change of input with its change of output, and the supply rate it gives.

    Attributes:
        supply: ω(Δu, Δy); negative if the pair violates the claim.
        dx: Δu, shape (inputs,).
        dy: Δy, shape (outputs,).
        weight: the layer's linear map, shape (outputs, inputs).
    """

    supply: float
    dx: np.ndarray
    dy: np.ndarray
    weight: np.ndarray


def supply(dx, dy, indices: Indices) -> np.ndarray:
    """Supply rate ω(Δu, Δy) = Δuᵀ Δy - δ‖Δy‖² - ν‖Δu‖² of pairs of changes.

    Signals are flattened row-major, and the shorter one is padded with zeros in Δuᵀ Δy.

    Args:
        dx: Δu, shape (pairs, ...).
        dy: Δy, shape (pairs, ...).
        indices: (δ, ν).

    Returns:
        ω, shape (pairs,), float64.

    Raises:
        ValueError: if the numbers of pairs differ.

    Example:
        >>> supply([[1.0, 2.0]], [[3.0]], Indices(1.0, 0.0))
        array([-6.])

    Reference: Rahnama et al., Definition 1; the padding is ours (the papers leave it undefined).
    """
    dx, dy = np.asarray(dx, dtype=np.float64), np.asarray(dy, dtype=np.float64)
    if dx.ndim < 1 or dy.ndim < 1 or len(dx) != len(dy):
        raise ValueError(
            "`dx` and `dy` must hold the same number of pairs along their first axis. "
            f"Received: dx.shape={dx.shape}, dy.shape={dy.shape}."
        )
    dx, dy = dx.reshape(len(dx), -1), dy.reshape(len(dy), -1)
    shared = min(dx.shape[1], dy.shape[1])
    inner = np.sum(dx[:, :shared] * dy[:, :shared], axis=1)
    return inner - indices.delta * np.sum(dy * dy, 1) - indices.nu * np.sum(dx * dx, 1)


def finite_matrix(weight) -> np.ndarray:
    """`weight` as a finite float64 matrix, or an error that says what it is instead."""
    weight = np.asarray(weight, dtype=np.float64)
    if weight.ndim != 2 or 0 in weight.shape or not np.all(np.isfinite(weight)):
        raise ValueError(
            "`weight` must be a finite matrix of shape (outputs, inputs). "
            f"Received: shape={weight.shape}."
        )
    return weight


def _supply_form(gain_matrix: np.ndarray, indices: Indices) -> np.ndarray:
    """Symmetric matrix H with ω(Δu, VΔu) = Δuᵀ H Δu."""
    outputs, inputs = gain_matrix.shape
    square = np.zeros((inputs, inputs))
    shared = min(inputs, outputs)
    square[:shared] = gain_matrix[:shared]
    return (
        (square + square.T) / 2
        - indices.delta * gain_matrix.T @ gain_matrix
        - indices.nu * np.eye(inputs)
    )


def worst_supply(
    weight, sector: Sector, indices: Indices, *, draws: int = 32, seed: int = 0
) -> SupplyWitness:
    """Search for a change of input that makes a layer's supply rate negative.

    min over ‖Δu‖ = 1 and slopes d_i ∈ [α, β] of ω(Δu, diag(d)WΔu): for fixed slopes the smallest
    eigenvalue, for fixed Δu a concave or convex quadratic per unit; alternated from random
    starts. A search: a negative value is a counterexample, a positive one proves nothing.

    Args:
        weight: W, shape (outputs, inputs).
        sector: slopes of the activation.
        indices: (δ, ν) to be violated.
        draws: random starts.
        seed: of the generator.

    Returns:
        `SupplyWitness` with the smallest supply found; ‖dx‖ = 1.

    Example:
        >>> worst_supply(-np.eye(2), Sector.linear(), Indices(1.0, 0.0)).supply
        -2.0

    Reference: counterexample search of this library.
    """
    weight = finite_matrix(weight)
    outputs, inputs = weight.shape
    rng = np.random.default_rng(seed)
    starts = [np.full(outputs, sector.alpha), np.full(outputs, sector.beta)]
    starts += [rng.choice([sector.alpha, sector.beta], outputs) for _ in range(draws)]
    best = None
    for slopes in starts:
        for _ in range(20):
            values, vectors = np.linalg.eigh(_supply_form(slopes[:, None] * weight, indices))
            dx = vectors[:, 0]
            if best is None or values[0] < best.supply:
                best = SupplyWitness(float(values[0]), dx, slopes * (weight @ dx), weight)
            # Per unit, ω is d·(Δu_i v_i) - δ d²v_i²: compare both ends (and the vertex, δ < 0).
            v = weight @ dx
            u = np.zeros(outputs)
            u[: min(inputs, outputs)] = dx[: min(inputs, outputs)]
            low, high = sector.alpha, sector.beta
            ends = [d * u * v - indices.delta * d * d * v * v for d in (low, high)]
            chosen = np.where(ends[0] < ends[1], low, high)
            if indices.delta < 0:
                with np.errstate(divide="ignore", invalid="ignore"):
                    chosen = np.clip(np.nan_to_num(u / (2 * indices.delta * v)), low, high)
            if np.array_equal(chosen, slopes):
                break
            slopes = chosen
    return best


def null_coordinate_counterexample(weight, sector: Sector, indices: Indices) -> SupplyWitness:
    """A violation by any layer or network with fewer outputs than inputs, for ν > 0 and δ ≥ 0.

    Moving only the last input, which has no partner among the outputs, makes Δuᵀ Δy = 0, hence
    ω = -δ‖Δy‖² - ν‖Δu‖² < 0, whatever the map. Classifiers with ν > 0 are therefore vacuous.

    Args:
        weight: W, shape (outputs, inputs) with outputs < inputs.
        sector: slopes of the activation; its largest is used.
        indices: (δ, ν), δ ≥ 0 and ν > 0.

    Returns:
        `SupplyWitness` with negative supply.

    Raises:
        ValueError: if outputs ≥ inputs, ν ≤ 0 or δ < 0.

    Example:
        >>> null_coordinate_counterexample([[1.0, 0.0]], Sector.linear(), Indices(0.5, 0.1)).supply
        -0.1

    Reference: erratum to Rahnama et al., every published classifier design.
    """
    weight = finite_matrix(weight)
    if weight.shape[0] >= weight.shape[1] or indices.nu <= 0 or indices.delta < 0:
        raise ValueError(
            "The argument needs fewer outputs than inputs, nu > 0 and delta >= 0. "
            f"Received: shape={weight.shape}, {indices}."
        )
    dx = np.eye(weight.shape[1])[-1]
    dy = sector.beta * (weight @ dx)
    return SupplyWitness(float(supply(dx[None], dy[None], indices)[0]), dx, dy, weight)
