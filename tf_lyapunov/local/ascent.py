"""Search for multipliers: any are valid, so that it may stop anywhere."""

import dataclasses

import numpy as np

from tf_lyapunov.local.curved import Curved
from tf_lyapunov.program import rounding

# λ that are tried first, relative to ‖c‖/ρ of each row and step; 0 is CROWN's.
TRIALS = (0.0, 0.01, 0.05, 0.2, 0.6, 2.0)
RATE = 0.25
_BETA = (0.8, 0.95)
PATIENCE = 6
_SMALL = 0.001


def tried(around, c, target, *, split=None, trials=TRIALS):
    """Multipliers with CROWN's slopes and the best of `trials` for λ, row by row.

    Args:
        around: `Around` whose steps up to `target` are known.
        c: float64 (rows, *shape of the target).
        target: position.

    Returns:
        `(multipliers, bound)`: dict by position, and float64 (rows,) without rounding.
    """
    multipliers = {}
    wanted = any(trials)
    bound, _, memory = around.backward(c, target, multipliers, record=wanted, split=split)
    best = bound
    scales = _scales(around, memory, multipliers, split) if wanted else {}
    if not scales:
        return multipliers, best
    for trial in trials:
        if trial == 0:
            continue
        other = {
            k: dataclasses.replace(m, log_lam=np.log(trial * scales[k])) if k in scales else m
            for k, m in multipliers.items()
        }
        bound, _, _ = around.backward(c, target, other, split=split)
        better = bound > best
        best = np.where(better, bound, best)
        for k in scales:
            multipliers[k].log_lam = np.where(better, other[k].log_lam, multipliers[k].log_lam)
    return multipliers, best


def ascend(around, c, target, multipliers, steps, *, rate=RATE, split=None, stop=None,
           patience=PATIENCE):  # fmt: skip
    """Improves multipliers in place by Adam on the bound's own derivatives, row by row.

    Args:
        steps: number of passes.
        stop: level of the bound at which the search ends, for all rows, or None.
        patience: passes after which it ends where little was gained, or None.

    Returns:
        float64 (rows,), the best bounds seen (without rounding), whose multipliers are kept.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number is no improvement
        return _ascend(around, c, target, multipliers, steps, rate, split, stop, patience)


def _ascend(around, c, target, multipliers, steps, rate, split, stop, patience):
    best = np.full(len(c), -np.inf, c.dtype)
    kept = {}
    moments = {}
    for i in range(steps + 1):
        is_last = i == steps
        bound, _, memory = around.backward(c, target, multipliers, record=not is_last, split=split)
        if i == 0:
            first_bound = before = bound
        better = bound > best
        best = np.where(better, bound, best)
        for k, m in multipliers.items():
            if k not in kept:
                kept[k] = m.copy()
            else:
                kept[k].take(m, better)
        if is_last or (stop is not None and np.all(best > stop)):
            break
        if patience is not None and i % patience == patience - 1:
            # Gains below a thousandth of what the bounds have gained so far are not worth a step.
            gained = np.abs(best - before)
            if np.all(gained <= _SMALL * np.abs(best - first_bound) + 1e-6 * np.abs(best)):
                break
            before = best
        if i == 0:
            _lift(around, memory, multipliers, split)
        found = around.derivatives(target, memory, multipliers, split=split)
        # The steps shrink towards the end.
        size = float(rate * (1 - i / (steps + 1)) ** 0.5)
        for k, derivatives in found.items():
            if k not in multipliers:
                continue
            held = moments.setdefault(k, [[0.0, 0.0] for _ in derivatives])
            moves = []
            for moment, by in zip(held, derivatives, strict=True):
                moment[0] = _BETA[0] * moment[0] + (1 - _BETA[0]) * by
                moment[1] = _BETA[1] * moment[1] + (1 - _BETA[1]) * by * by
                first = moment[0] / (1 - _BETA[0] ** (i + 1))
                second = moment[1] / (1 - _BETA[1] ** (i + 1))
                moves.append((first / (np.sqrt(second) + 1e-12)).astype(bound.dtype, copy=False))
            multipliers[k].move(moves, size)
    multipliers.update(kept)
    return best


def _scales(around, memory, multipliers, split):
    """λ of the size that matters, ‖c‖/ρ, per row of every step with a ball."""
    found = {}
    for k, own in memory:
        if own is None or k not in multipliers:
            continue
        step = (split or around.steps).get(k) or around.steps[k]
        if np.isfinite(step.radius) and not isinstance(step, Curved):
            size = rounding.euclidean_norms(own[0])
            found[k] = np.maximum(size, np.finfo(size.dtype).tiny) / max(step.radius, 1e-30)
    return found


def _lift(around, memory, multipliers, split):
    """Small λ in place of 0, from which no step of the search would lead away."""
    for k, scale in _scales(around, memory, multipliers, split).items():
        floor = np.log(np.maximum(1e-3 * scale, np.finfo(scale.dtype).tiny)).astype(scale.dtype)
        multipliers[k].log_lam = np.maximum(multipliers[k].log_lam, floor)
