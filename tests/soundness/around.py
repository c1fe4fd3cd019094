"""Claims about a region of inputs: ranges of outputs, gains between its points, properties."""

import numpy as np
from soundness import oracles
from soundness.asking import Refused, Violation, asked, exact

import tf_lyapunov as tfl

POINTS = 400


def local(case):
    """No point of a region leaves the proved ranges, moves further than the gain, or breaks what
    is proved of it."""
    if len(case.shapes) != 1 or case.input_dtype.kind in "iub":
        raise Refused("a region is about one input of real numbers")
    rng = np.random.default_rng([case.seed, 13])
    function, dtype = exact(case)
    # TensorFlow rounds settings of float64 layers to float32.
    noise = max(oracles.noise_of(function, np.dtype(dtype).name), oracles.GAIN_SLACK)
    x = case.x[0].astype(np.float64)
    norm = ("l2", "linf", "l1")[rng.integers(3)]
    size = float(10 ** rng.uniform(-2, 0.5)) * max(float(np.abs(x).max()), 1e-3)
    region = asked(tfl.Region.ball, x, size, norm)
    points = (x + _inside(rng, x.shape, size, norm)).astype(dtype)
    # What the type of the inputs rounds away may lie outside.
    points = points[_distances(points - x, norm) <= size]
    values = function(points) if len(points) else np.zeros((0, 1))
    finite = np.all(np.isfinite(values), axis=1)
    points, values = points[finite], values[finite]
    if len(values) < 2:
        return
    room = noise * (1e-6 + np.abs(values).max(axis=0))
    ranges = asked(tfl.output_bounds, case.model, region, outputs="model")
    low, high = values.min(axis=0), values.max(axis=0)
    if np.any(low < ranges.lower - room) or np.any(high > ranges.upper + room):
        text = f"{norm} {size:.3g}: {low} … {high} found, {ranges.lower} … {ranges.upper} proved"
        yield Violation("local/ranges", case.seed, text)
    if norm != "l1":
        gain = float(asked(tfl.gain_on, case.model, x[None], size, norm=norm, outputs="model")[0])
        half = len(points) // 2
        moved = values[:half] - values[half : 2 * half]
        apart = _distances(points[:half].astype(float) - points[half : 2 * half], norm)
        steps = _distances(moved, norm) - np.sum(room)
        if np.any(steps > gain * apart * (1 + oracles.GAIN_SLACK)):
            text = f"{norm} {size:.3g}: {np.max(steps / apart):.6g} measured, {gain:.6g} proved"
            yield Violation("local/gain", case.seed, text)
    row = rng.normal(size=values.shape[1])
    row /= np.abs(row).max()
    least = values @ row
    broken = least.min() + 2 * float(np.abs(row) @ room)
    if not broken < least.max():
        return
    # rowᵀy > broken is false at the least point, by more than noise.
    claim = tfl.Property.linear(-row, -broken)
    found = asked(
        tfl.verify_property, case.model, region, claim, timeout=0.5, outputs="model", seed=case.seed
    )
    if found.is_proved:
        text = f"{norm} {size:.3g}: row {row} of a point is {least.min()}, {broken} proved"
        yield Violation("local/property", case.seed, text)


def _inside(rng, shape, size, norm):
    """Steps of the ball, most of them on its boundary, where sets of inputs are least alike."""
    steps = rng.normal(size=(POINTS, *shape))
    if norm == "linf":
        steps = np.sign(steps) * np.where(rng.uniform(size=steps.shape) < 0.7, 1.0, 0.5)
    steps[: POINTS // 4] *= rng.uniform(size=steps[: POINTS // 4].shape) < 0.3
    shares = np.where(rng.uniform(size=POINTS) < 0.6, 1 - 1e-6, rng.uniform(size=POINTS))
    distances = np.maximum(_distances(steps, norm), 1e-300) / (size * shares)
    return steps / distances.reshape(-1, *([1] * len(shape)))


def _distances(steps, norm):
    flat = np.abs(steps.reshape(len(steps), -1).astype(np.float64))
    if norm == "linf":
        return flat.max(axis=1)
    return flat.sum(axis=1) if norm == "l1" else np.sqrt(np.sum(flat**2, axis=1))
