"""Independent oracles for guarantees: they call the user's model, and nothing of the library.

A radius is false if a perturbation inside it changes the decision. Perturbed inputs are rounded to
the model's input type first and their distance is measured afterwards, in float64, so that a
finding is a pair of inputs that the model really takes. Three rules keep float noise out:

    a flip counts if the float64 twin of the model decides as the model does (both flipped), or
    if the model's flipped margin exceeds `NOISE` of the largest output around; probabilities do not
    show how large the logits were whose rounding they pass on: there the twin alone decides, or,
    without one, a flip by `CLEAR` of what is possible counts;
    a flip `FAR` away counts if the model's outputs are no numbers there;
    a gain is a quotient ‖f(a) - f(b)‖/‖a - b‖ of the twin, or of the model less its noise.
"""

import dataclasses

import keras
import numpy as np

# Share of a radius that is searched: what rounding to float32 moves an input by lies within 1e-4.
INSIDE = 1 - 1e-4
# Distances, to an input's own size, from which on rounding may be all that decides.
FAR = 1e4
# A gain is proved in float64: secants of a float64 function have errors below this.
GAIN_SLACK = 1e-6
# Flips of the model alone: hundreds of roundings, of values ten times the outputs.
NOISE = {"float64": 1e-11, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
# Flips of probabilities without a twin.
CLEAR = 0.9
# Radius searched where the claim is "any perturbation", in units of 1 + ‖x‖.
EVERYWHERE = 1e3


@dataclasses.dataclass(frozen=True)
class Flip:
    """A perturbation that a certificate excludes: input number, its norm, the two decisions."""

    index: int
    norm: float
    radius: float
    label: int
    found: int
    margin: float


def evaluate(model, x):
    """Outputs of the model as its user calls it, float64 (n, classes)."""
    count = len(keras.tree.flatten(x)[0])
    # JAX compiles every operation for every shape: a few sizes of batches suffice.
    rows = count if keras.backend.backend() != "jax" else 2 ** int(np.ceil(np.log2(count + 7)))

    def tensor(part):
        repeated = np.concatenate([part, np.repeat(part[-1:], rows - count, axis=0)])
        return keras.ops.convert_to_tensor(repeated)

    outputs = model(keras.tree.map_structure(tensor, x), training=False)
    outputs = keras.ops.convert_to_numpy(outputs)[:count]
    return np.asarray(outputs).astype(np.float64).reshape(count, -1)


def margin(outputs, label, threshold=0.0):
    """By how much every output speaks for the label; negative where another class wins.

    A single output decides by its side of `threshold` (1/2 for a probability).
    """
    broken = ~np.isfinite(outputs).all(axis=1)
    known = np.nan_to_num(outputs, nan=0.0, posinf=1e300, neginf=-1e300)
    if outputs.shape[1] == 1:
        found = (known[:, 0] - threshold) * (1.0 if label == 1 else -1.0)
    else:
        others = np.delete(known, label, axis=1)
        found = known[:, label] - others.max(axis=1)
    for row in np.flatnonzero(broken):  # infinite or no numbers: whatever the user's argmax says
        found[row] = 1e300 if decision(outputs[row], threshold) == label else -1e300
    return found


def decision(outputs, threshold=0.0):
    """Class of one row of outputs."""
    if len(outputs) == 1:
        return int(outputs[0] > threshold)
    return int(np.argmax(outputs))


def _norms(e):
    return np.sqrt(np.sum(np.square(e.reshape(len(e), -1)), axis=1))


def _units(e):
    norm = _norms(e).reshape(-1, *([1] * (e.ndim - 1)))
    return e / np.maximum(norm, 1e-300)


def _directions(x, count, rng):
    """Coordinates, random directions, the way to the origin; the whole circle for two inputs."""
    size = x.size
    if size == 2:
        angle = np.linspace(0, 2 * np.pi, 256, endpoint=False)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).reshape(-1, *x.shape)
    axes = np.eye(size)[rng.permutation(size)[:count]]
    ones = np.ones((1, size))
    random = rng.normal(size=(count, size))
    found = np.concatenate([axes, random, x.reshape(1, -1) + 1e-300, ones])
    return _units(np.concatenate([found, -found]).reshape(-1, *x.shape))


def candidates(x, radius, directions, dtype):
    """Inputs of the model's type on spheres within the radius, and their distances from x."""
    sizes = np.concatenate([np.full(len(directions), s) for s in (INSIDE, 0.5)])
    directions = np.concatenate([directions, directions])
    sizes = (sizes * INSIDE).reshape(-1, *([1] * x.ndim))
    with np.errstate(over="ignore", invalid="ignore"):
        points = x.astype(np.float64) + radius * sizes * directions
        if np.dtype(dtype).kind in "iu":
            points = np.rint(points)
        points = points.astype(dtype)
        distances = _norms(points.astype(np.float64) - x.astype(np.float64))
    return points, distances


def find_flips(function, x, labels, radii, *, twin=None, threshold=0.0, dtype=None, seed=0):
    """A `Flip` within its radius, or None, of every input, as a list; they are searched in step.

    Args:
        function: outputs float64 (n, classes) of inputs (n, …), as the model computes them.
        x: inputs.
        labels: classes that the certificate claims.
        radii: claimed radii, may be infinite.
        twin: the same function in float64, or None.
        threshold: where a single output changes its decision.
        dtype: type of the model's inputs.
        seed: of the directions.
    """
    searches = [
        _search(function, part, int(label), float(radius), threshold, dtype, seed)
        for part, label, radius in zip(x, labels, radii, strict=True)
    ]
    return _in_step(searches, function, twin)


def _in_step(searches, function, twin):
    """Results of searches whose questions are asked together: one call answers all of a round.

    A search is a generator that yields `(of the twin, points)` and receives outputs.
    """
    results, asked = [None] * len(searches), {}
    answers = dict.fromkeys(range(len(searches)))
    while answers:
        asked = {}
        for i, answer in answers.items():
            try:
                asked[i] = searches[i].send(answer)
            except StopIteration as end:
                results[i] = end.value
        answers = {}
        for of_twin in (False, True):
            mine = {i: points for i, (which, points) in asked.items() if which == of_twin}
            if not mine:
                continue
            if of_twin and twin is None:
                answers |= dict.fromkeys(mine)
                continue
            joined = np.concatenate(list(mine.values()))
            found = (twin if of_twin else function)(joined)
            if found is None:
                answers |= dict.fromkeys(mine)
                continue
            ends = np.cumsum([len(p) for p in mine.values()])[:-1]
            answers |= dict(zip(mine, np.split(found, ends), strict=True))
    return results


def _search(function, x, label, radius, threshold, dtype, seed):
    rng = np.random.default_rng(seed)
    dtype = dtype or x.dtype
    if not np.isfinite(radius):
        radius = EVERYWHERE * (1 + float(np.linalg.norm(x.astype(np.float64))))
    precision = "float64" if np.dtype(dtype) == np.float64 else "float32"
    directions = _directions(x, 8, rng)
    for round_ in range(3):
        points, distances = candidates(x, radius, directions, dtype)
        points[0] = x.astype(dtype)  # the claim includes the input itself
        distances[0] = 0.0
        inside = (distances <= radius * INSIDE) & np.isfinite(points.reshape(len(points), -1)).all(
            axis=1
        )
        if not inside.any():
            return None
        points, distances = points[inside], distances[inside]
        outputs = yield False, points
        margins = margin(outputs, label, threshold)
        worst = int(np.argmin(margins))
        if margins[worst] < 0:
            scale = np.max(np.abs(outputs[np.isfinite(outputs)]), initial=1e-300)
            loud = -margins[worst] > noise_of(function, precision) * scale
            # At the input itself the model's own class is what is claimed.
            moved = distances[worst] > 0
            shares = moved and bool(np.all((outputs >= 0) & (outputs <= 1)))
            # Far away, rounding is that of signals which cancel, in float64 too: outputs that are
            # numbers do not show its size.
            far = distances[worst] > FAR * (1 + np.linalg.norm(x.astype(np.float64)))
            if far:
                loud = -margins[worst] >= 1e300
            elif shares or not loud:
                replayed = yield True, points[worst : worst + 1]
                if replayed is not None:
                    loud = margin(replayed, label, threshold)[0] < 0
                else:
                    loud = shares and -margins[worst] > CLEAR * (1 - threshold)
            if loud:
                found = decision(outputs[worst], threshold)
                return Flip(
                    0, float(distances[worst]), float(radius), int(label), found, -margins[worst]
                )
        if round_ == 2 or np.dtype(dtype).kind in "iu":
            break
        base = points[worst] if round_ else x.astype(dtype)
        slope = yield from _gradient(base, label, threshold, 0.05 * radius)
        if not np.any(slope):
            break
        spread = np.array([0.0, 0.1, 0.3, 0.6]).reshape(-1, *([1] * x.ndim))
        mixed = _units(-slope)[None][0] + spread * _units(rng.normal(size=(4, *x.shape)))
        toward = _units((points[worst].astype(np.float64) - x)[None]) if round_ else mixed[:1]
        directions = _units(np.concatenate([mixed, mixed[:1] + toward, toward]))
    return None


def noise_of(function, default):
    """Share of the outputs that is noise in the function's own precision."""
    return NOISE[getattr(function, "precision", default)]


def _gradient(x, label, threshold, step):
    """Central differences of the margin, over at most 64 coordinates."""
    size = x.size
    chosen = np.arange(size)[:64]
    moves = np.zeros((len(chosen), size))
    moves[np.arange(len(chosen)), chosen] = step
    base = x.astype(np.float64).reshape(1, -1)
    points = np.concatenate([base + moves, base - moves]).reshape(-1, *x.shape).astype(x.dtype)
    outputs = yield False, points
    with np.errstate(all="ignore"):
        values = margin(outputs, label, threshold)
        slope = values[: len(chosen)] - values[len(chosen) :]
    gradient = np.zeros(size)
    gradient[chosen] = np.nan_to_num(slope)
    peak = np.max(np.abs(gradient))
    return (gradient / peak if peak > 0 else gradient).reshape(1, *x.shape)


def false_radii(function, x, certificate, *, twin=None, threshold=0.0, dtype=None, seed=0):
    """Every input's `Flip` inside its certified radius, as a list."""
    proved = np.flatnonzero(certificate.radius > 0)
    searches = [
        _search(
            function,
            np.asarray(x[i]),
            int(certificate.labels[i]),
            float(certificate.radius[i]),
            threshold,
            dtype,
            seed + int(i),
        )
        for i in proved
    ]
    found = zip(proved, _in_step(searches, function, twin), strict=True)
    return [dataclasses.replace(f, index=int(i)) for i, f in found if f is not None]


def measured_gain(function, shape, *, scales=(0.01, 1.0, 30.0), seed=0, dtype="float64"):
    """Largest secant ‖f(a) - f(b)‖/‖a - b‖ found: from below, whatever the function.

    Jacobians by differences at random points of several sizes give the directions of largest
    stretch; the secants along them are what counts.
    """
    rng = np.random.default_rng(seed)
    size, best = int(np.prod(shape)), 0.0
    moves = np.eye(size)[: min(size, 48)]
    precision = getattr(function, "precision", "float64")
    rounding = {"float64": 1e-14, "float32": 1e-5}.get(precision, 0.05)
    units = {"float64": 0.0, "float32": 2.0**-22}.get(precision, 2.0**-9)

    def values(parts):
        """Outputs of several arrays of inputs, by one call."""
        found = function(np.concatenate(parts).reshape(-1, *shape).astype(dtype))
        return np.split(found, np.cumsum([len(part) for part in parts])[:-1])

    centres = [
        (rng.normal(size=(1, size)) * scale).astype(dtype).astype(np.float64) for scale in scales
    ]
    steps = [1e-3 * scale for scale in scales]
    around = [
        np.concatenate([x + step * moves, x - step * moves])
        for x, step in zip(centres, steps, strict=True)
    ]
    asked = []
    for x, scale, step, found in zip(centres, scales, steps, values(around), strict=True):
        jacobian = (found[: len(moves)] - found[len(moves) :]) / (2 * step)
        if not np.all(np.isfinite(jacobian)) or not np.any(jacobian):
            continue
        top = np.linalg.svd(jacobian.T, full_matrices=False)[2][0] @ moves
        ends = [x]
        for length in (0.1 * scale, step, 10 * step):
            ends += [x + length * top, x - length * top]
        # What rounding may have added: of the outputs, by their size; of what cancels on the way,
        # by the spread over inputs that differ by some units in the last place.
        beside = x * (1 + units * rng.uniform(-1, 1, size=(16, size)))
        asked.append((np.concatenate(ends).astype(dtype), beside.astype(dtype)))
    if not asked:
        return best
    found = values([part for pair in asked for part in pair])
    for (inputs, _), outputs, near in zip(asked, found[::2], found[1::2], strict=True):
        spread = np.max(_norms(near - outputs[:1]))
        flat = inputs.reshape(len(inputs), -1).astype(np.float64)
        rise = _norms(outputs[1:] - outputs[:1]) - 2 * spread
        rise = rise - rounding * np.max(np.abs(outputs), initial=0.0)
        run = _norms(flat[1:] - flat[:1])
        quotients = np.where(run > 0, rise / np.maximum(run, 1e-300), 0.0)
        best = max(best, float(np.max(quotients)))
    return best
