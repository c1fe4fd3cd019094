"""Search for an input of a region that breaks a property, and the check that it does.

Candidates come from the region's centre, corners and random points, improved by projected steps
along the gradient of every set's largest row; the gradient's sign where the region is a box. One
counts only if it lies in the region exactly, in the model's own format, if the model itself, called
on it, breaks the property, and if the exact function does too: its float64 evaluation with a bound
on all its rounding.
"""

import dataclasses

import numpy as np

from tf_lyapunov.local.evaluating import Evaluation, enclosed
from tf_lyapunov.program import rounding
from tf_lyapunov.program.logits import LogitsModel, no_gradients
from tf_lyapunov.program.tensors import as_array, as_tensor
from tf_lyapunov.program.validation import own_outputs

_CHECKED = 8
_SHRINKS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)


@dataclasses.dataclass(frozen=True, eq=False)
class Counterexample:
    """An input that breaks a property.

    Attributes:
        x: array of the model's input dtype, one input, in the region.
        outputs: float64 (outputs,), what the model itself gives there.
        margin: float, of the exact outputs, see `Unsafe.margin`; not positive.
    """

    x: np.ndarray
    outputs: np.ndarray
    margin: float


class Attacker:
    """Searches and checks for one flow, region and property.

    Args:
        network, flow: `Network` and its `Flow`.
        region: `Region`.
        unsafe: `Unsafe`.
        outputs: `"logits"` or `"model"`, what the flow ends with.
        rng: `numpy.random.Generator`.

    Attributes:
        least: smallest margin of the exact function seen so far at a point of the region.
    """

    def __init__(self, network, flow, region, unsafe, outputs, rng):
        self.network, self.flow, self.region, self.unsafe = network, flow, region, unsafe
        self.is_whole, self.rng = outputs == "model", rng
        self.model = None if self.is_whole else LogitsModel(network)
        self.dtype = network.graph.inputs[0].dtype
        low, high = region.center - region.reach(), region.center + region.reach()
        self.low, self.high = np.maximum(low, region.low), np.minimum(high, region.high)
        self.least = np.inf

    def search(self, points=(), *, starts=8, steps=40, stop=lambda: False):
        """A `Counterexample`, or None.

        Args:
            points: float64 (n, *shape), to begin from, besides centre, corners and random points.
            starts: number of those.
            steps: along the gradient.
            stop: says whether time is up.
        """
        points = [self.region.center[None], *(np.asarray(p)[None] for p in points)]
        if starts:
            points += [self._corners(starts // 2), self._random(starts - starts // 2)]
        points = self.projected(np.concatenate(points))
        found = self.tried(points)
        sets = len(self.unsafe.starts)
        if found or not steps or stop():
            return found
        # For every set the points where it is nearest.
        excess = self.sets(Evaluation(self.flow, points).outputs)
        keep = max(2, min(len(points), 64 // sets))
        order = np.argsort(excess, axis=0, kind="stable")[:keep]
        if sets > 32:
            near = np.argsort(excess.min(axis=0), kind="stable")[:32]
            order = order[:, near]
        else:
            near = np.arange(sets)
        return self._descend(points[order].reshape(-1, *points.shape[1:]),
                             np.tile(near, len(order)), steps, stop)  # fmt: skip

    def sets(self, outputs):
        """Largest entry of A y - b per set (n, sets), infinite where it is no number."""
        with np.errstate(invalid="ignore"):
            excess = outputs @ self.unsafe.rows.T - self.unsafe.bounds
        return self.unsafe.of_rows(np.where(np.isnan(excess), np.inf, excess))

    def _descend(self, x, targets, steps, stop):
        is_ball = np.isfinite(self.region.radius)
        size = self.high - self.low
        lengths, starts = self.unsafe.lengths, self.unsafe.starts
        for i in range(steps):
            evaluation = Evaluation(self.flow, x)
            excess = evaluation.outputs @ self.unsafe.rows.T - self.unsafe.bounds
            found = self._seen(x, excess)
            if found or stop():
                return found
            # The row that is farthest from holding, of the set that each point is after.
            rows = np.array(
                [s + np.argmax(e[s : s + n])
                 for e, s, n in zip(excess, starts[targets], lengths[targets], strict=True)]
            )  # fmt: skip
            gradient = evaluation.gradient(self.unsafe.rows[rows])
            share = 0.5 * 0.02 ** (i / max(steps - 1, 1))
            flat = gradient.reshape(len(x), -1)
            if is_ball:
                norm = rounding.euclidean_norms(flat)
                step = flat / np.maximum(norm, 1e-300)[:, None] * self.region.radius
            else:
                step = np.sign(flat) * size.ravel()
            x = self.projected(x - share * step.reshape(x.shape))
        return self.tried(x)

    def projected(self, x):
        """Points moved into the region, up to rounding."""
        region = self.region
        x = np.clip(x, self.low, self.high)
        for radius, order in ((region.radius, 2), (region.radius_l1, 1)):
            if np.isfinite(radius):
                # Towards the centre they stay within the box.
                away = (x - region.center).reshape(len(x), -1)
                norm = np.linalg.norm(away, order, axis=1)
                scale = np.minimum(1.0, radius * (1 - 1e-7) / np.maximum(norm, 1e-300))
                x = region.center + (away * scale[:, None]).reshape(x.shape)
        return x

    def _corners(self, count):
        pick = self.rng.integers(0, 2, (count, *self.low.shape)).astype(bool)
        return np.where(pick, self.low, self.high)

    def _random(self, count):
        return self.rng.uniform(self.low, self.high, (count, *self.low.shape))

    def tried(self, x):
        """A `Counterexample` among points near the region (n, *shape), or None."""
        return self.shown(x, Evaluation(self.flow, x).outputs)

    def shown(self, x, outputs):
        """The same where the outputs (n, outputs) are known, nearly."""
        return self._seen(x, outputs @ self.unsafe.rows.T - self.unsafe.bounds)

    def _seen(self, x, excess):
        margins = self.unsafe.of_rows(np.where(np.isnan(excess), np.inf, excess)).min(axis=1)
        self.least = min(self.least, float(margins.min(initial=np.inf)))
        order = np.argsort(margins, kind="stable")[:_CHECKED]
        for i in order:
            if margins[i] > 0:
                break
            found = self.checked(x[i])
            if found is not None:
                return found
        return None

    def checked(self, point):
        """The `Counterexample` at a point of the model's format next to this one, or None."""
        x = self.held(point)
        if x is None:
            return None
        exact = as_array(as_tensor(x, self.dtype))
        values, errors = enclosed(self.flow, exact[None])
        if not np.all(np.isfinite(errors)) or not self.unsafe.breaks(values, errors)[0]:
            return None
        own = self.own(x)
        if not np.all(np.isfinite(own)) or not self.unsafe.breaks(own[None])[0]:
            return None
        return Counterexample(x, own, float(self.unsafe.margin(values)[0]))

    def own(self, x):
        """What the model itself gives for one input, float64 (outputs,)."""
        if not self.is_whole:
            return self.model.predict(x[None], 1)[0].ravel()
        with no_gradients():
            return as_array(own_outputs(self.network.model, [as_tensor(x[None], self.dtype)])[0])[
                0
            ].ravel()

    def held(self, point):
        """A point of the model's format in the region, exactly, near a given one, or None.

        Returns:
            Array of the format; of float32 for bfloat16, whose numbers are among those.
        """
        center = self.region.center
        for shrink in _SHRINKS:
            x = self._rounded(point + shrink * (center - point))
            if x is not None and self.contains(x.astype(np.float64)):
                return x
        return None

    def _rounded(self, point):
        point = np.clip(point, self.region.low, self.region.high)
        if "int" in self.dtype or self.dtype == "bool":
            return np.rint(point).astype(self.dtype)
        if self.dtype == "bfloat16":
            x = point.astype(np.float32)
            return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        x = point.astype(self.dtype)
        wide = x.astype(np.float64)
        end = np.array(np.inf, x.dtype)
        x = np.where(wide > self.region.high, np.nextafter(x, -end), x)
        return np.where(wide < self.region.low, np.nextafter(x, end), x)

    def contains(self, x):
        """Whether a float64 point lies in the region, whatever the rounding of the distances."""
        region = self.region
        if not np.all((region.low <= x) & (x <= region.high)):
            return False
        away = rounding.up(np.abs(x - region.center))
        if np.isfinite(region.radius) and not (
            float(rounding.euclidean_norms_up(away[None])[0]) <= region.radius
        ):
            return False
        total = float(away.sum()) * (1 + 2 * away.size * 2.0**-53)
        return not np.isfinite(region.radius_l1) or total <= region.radius_l1
