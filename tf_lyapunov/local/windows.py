"""Boxes of convolutional steps from the window of the input that each unit sees.

A unit behind convolutions, elementwise steps and scales per channel depends on a window of every
signal before it. Its rows of a backward pass are zero elsewhere, so that whole rows are wasted: a
window flow holds the same links on windows, one row per unit, gathered from the full signals with
zeros where a window leaves them, and convolutions without padding. Balls are tighter too: norms
of convolutions of a window bound how far it moves.
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.local import gains, maps
from tf_lyapunov.local.around import Around
from tf_lyapunov.local.flow import Flow, Link, Trace, Whole
from tf_lyapunov.local.maxima import WindowMaximum, is_window_maximum
from tf_lyapunov.local.pairs import Halves, Rejoined, difference_gain
from tf_lyapunov.local.pieces import has_pieces
from tf_lyapunov.local.relaxation import Elementwise
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import pooling as geometry
from tf_lyapunov.program.families.elementwise import Kinked
from tf_lyapunov.program.families.linear import Linear
from tf_lyapunov.program.families.pooling import Pooled
from tf_lyapunov.program.families.scaling import Scaled
from tf_lyapunov.program.operation import Operation
from tf_lyapunov.theory.operators import LinearMap, convolution_axes

# Windows larger than this share of a signal are not worth the gathering.
_WORTH = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class Windowed(Operation):
    """A convolution without padding of windows, some of whose entries lie outside and are zero.

    Attributes:
        linear: `Linear` on one window.
        inside: (rows, *window, 1), 1 where the window lies within the signal, else 0.
    """

    linear: Linear
    inside: np.ndarray


@maps.adjoint.register
def _(operation: Windowed, c, shapes):
    (found,) = maps.adjoint(operation.linear, c, shapes)
    return [found * operation.inside]


@maps.absolute.register
def _(operation: Windowed, sizes):
    return maps.absolute(operation.linear, [sizes[0] * operation.inside])


@maps.offset.register
def _(operation: Windowed):
    return maps.offset(operation.linear)


@maps.terms.register
def _(operation: Windowed, shapes):
    return maps.terms(operation.linear, shapes)


@maps.norms.register
def _(operation: Windowed, shapes):
    # Entries outside are columns left out.
    return maps.norms(operation.linear, shapes)


@maps.forwards.register
def _(operation: Windowed, values):
    return maps.applied(operation.linear, [values[0] * operation.inside])


@dataclasses.dataclass(frozen=True, eq=False)
class WindowedPool(Operation):
    """Maxima over windows of a window, some of whose cells lie outside and never count.

    Attributes:
        pooled: `Pooled` without padding, of maxima.
        inside: (rows, *window, 1), as for `Windowed`.
    """

    pooled: Pooled
    inside: np.ndarray

    def step(self, center, low, high, radius):
        """Its relaxation."""
        exists = np.broadcast_to(self.inside > 0, center.shape)
        return WindowMaximum(self.pooled, center, low, high, radius, exists)


class Windows:
    """The windows behind the units of one position of a flow.

    Args:
        flow: `Flow`.
        traced: `Trace`, for shapes.
        source: position.

    Attributes:
        applies: whether there are windows, small enough to be worth it.
    """

    def __init__(self, flow, traced, source):
        self.flow, self.source = flow, source
        # Per position: per spatial axis (size, step of the window's start per unit, start).
        self.plans = [None] * (source + 1)
        self.linears, self.pools = {}, {}
        self.applies = source > 0 and self._plan(traced)

    def _plan(self, traced):
        shape = traced.shape(self.source)
        if len(shape) < 2:
            return False
        plan = [(1, 1, 0)] * (len(shape) - 1)
        self.plans[self.source] = plan
        for k in range(self.source, 0, -1):
            link = self.flow.links[k - 1]
            operation, before = link.operation, traced.shape(k - 1)
            if link.inputs != (k - 1,) or len(before) != len(shape):
                return False
            if isinstance(operation, Whole):
                return False
            if isinstance(operation, Linear):
                plan = self._behind(operation, plan, before)
                if plan is None:
                    return False
                self.linears[k] = operation
            elif is_window_maximum(operation):
                if operation.channels_first or operation.sizes is None:
                    return False
                plan = self._pooled(operation, plan, before)
                self.pools[k] = operation
            elif isinstance(operation, Halves):
                if operation.channels_first:
                    return False
                plan = list(plan)
                size, step, start = plan[operation.axis - 1]
                plan[operation.axis - 1] = (2 * size, 2 * step, 2 * start)
            elif isinstance(operation, Rejoined):
                if operation.channels_first:
                    return False
            elif isinstance(operation, Scaled):
                if not (_per_channel(operation.scale) and _per_channel(operation.shift)):
                    return False
                if operation.scale.size > 1 and operation.scale.shape[-1] != before[-1]:
                    return False
            elif isinstance(operation, Kinked):
                if not _per_channel(operation.slopes):
                    return False
            elif not has_pieces(operation):
                return False
            self.plans[k - 1] = plan
        whole = sum(math.prod(traced.shape(k)) for k in range(self.source))
        seen = sum(
            math.prod(n for n, _, _ in self.plans[k]) * traced.shape(k)[-1]
            for k in range(self.source)
        )
        return seen <= _WORTH * whole

    @staticmethod
    def _behind(operation, plan, before):
        linear_map = operation.linear_map
        if linear_map.kind not in ("conv", "depthwise") or operation.channels_first:
            return None
        axes = convolution_axes(
            operation.kernel.shape, dataclasses.replace(linear_map, input_shape=tuple(before))
        )
        return [
            (
                (size - 1) * axis.stride + (axis.taps - 1) * axis.dilation + 1,
                step * axis.stride,
                start * axis.stride - axis.left,
            )
            for (size, step, start), axis in zip(plan, axes, strict=True)
        ]

    @staticmethod
    def _pooled(operation, plan, before):
        sizes, strides, padding = operation.sizes, operation.strides, operation.padding
        found = []
        for (size, step, start), n, q, s in zip(plan, before[:-1], sizes, strides, strict=True):
            first = int(geometry.windows(n, q, s, padding)[0])
            found.append(((size - 1) * s + q, step * s, start * s + first))
        return found

    def indices(self, k, places, shape):
        """Flat spatial indices (rows, *window) of position k behind `places`, and which exist."""
        found, inside = 0, True
        rank = len(shape) - 1
        for axis, ((size, step, start), n) in enumerate(zip(self.plans[k], shape, strict=False)):
            cells = places[axis][:, None] * step + start + np.arange(size)
            ok = (cells >= 0) & (cells < n)
            form = [len(cells)] + [size if a == axis else 1 for a in range(rank)]
            found = found * n + np.clip(cells, 0, n - 1).reshape(form)
            inside = inside & ok.reshape(form)
        return found, inside


def _per_channel(array):
    return array.ndim == 0 or all(n == 1 for n in array.shape[:-1])


def window_around(around, windows, units, balls):
    """`Around` of the windows behind some units of a position, one row per unit.

    Args:
        around: the full `Around`, whose boxes are read.
        windows: `Windows` that apply.
        units: flat indices within the position.
        balls: whether to use balls.

    Returns:
        `(Around, c)`: rows of c are the units; those of -c give minus their upper ends.
    """
    source, flow = windows.source, around.flow
    shape = around.trace.shape(source)
    places = np.unravel_index(units, shape)
    count, channel = len(units), places[-1]
    places = places[:-1]
    values, boxes, links, sizes, before = [], [], [], [None], None
    for k in range(source + 1):
        whole = around.trace.shape(k)
        index, inside = windows.indices(k, places, whole)
        mask = inside[..., None].astype(around.dtype)

        def gather(array, index=index, mask=mask, whole=whole):
            flat = np.broadcast_to(array, (1, *whole)).reshape(-1, whole[-1])
            return flat[index] * mask

        values.append(gather(around.values[k]))
        low, high = around.box(k)
        boxes.append((gather(low), gather(high)))
        if k:
            link = flow.links[k - 1]
            operation = link.operation
            sizes.append(None if around.sizes[k] is None else gather(around.sizes[k]))
            if k in windows.linears:
                operation = Windowed(without_padding(operation, values[k - 1].shape[1:]), before)
            elif k in windows.pools:
                operation = WindowedPool(dataclasses.replace(operation, padding="valid"), before)
            links.append(Link(link.name, operation, (k - 1,)))
        before = mask
    region = _rows_region(around.region, windows, places, around)
    traced = Trace(values, [0.0] * (source + 1))
    small = WindowAround(Flow(tuple(links), flow.name), traced, region, around)
    small.sizes = sizes
    small.boxes = dict(enumerate(boxes))
    radius = around.radii[0]
    radii = [radius]
    for k in range(1, source + 1):
        operation = small.flow.links[k - 1].operation
        lost = around.trace.noise[k]
        lost = lost if np.ndim(lost) == 0 else float(rounding.euclidean_norms_up(lost)[0])
        known = float(min(radius, around.radii[k - 1])) if balls else np.inf
        part = difference_gain(flow, around.trace, k - 1)
        if part is not None and balls:
            reached = rounding.product_up(part[0], radii[part[1]])
            known = min(known, float(reached) + around.loss(part[1] + 1, k - 1))
        if isinstance(operation, WindowedPool):
            small.steps[k] = operation.step(values[k - 1], *boxes[k - 1], known)
            radius = gains.radius(operation.pooled, [values[k - 1].shape[1:]], [radius])
        elif k in around.steps and has_pieces(operation):
            small.steps[k] = Elementwise(operation, values[k - 1], *boxes[k - 1], known)
            steepest = max(float(np.max(np.abs(s), initial=0.0)) for s in around.steps[k].slopes)
            radius = rounding.product_up(steepest, radius)
        else:
            radius = maps.radius(operation, [values[k - 1].shape[1:]], [radius])
        radius = min(rounding.sum_up(radius, lost), around.radii[k])
        radii.append(radius)
    c = np.zeros((count, *values[source].shape[1:]), around.dtype)
    c.reshape(count, -1)[np.arange(count), channel] = 1.0
    return small, c


class WindowAround(Around):
    """An `Around` whose signals have a row of their own for every row of a pass."""

    def __init__(self, flow, traced, region, around):
        self.flow, self.trace, self.region = flow, traced, region
        self.dtype, self.deadline = around.dtype, around.deadline
        self.values = traced.values
        self.sum_length = around.sum_length
        self.steps, self.boxes, self.radii = {}, {}, around.radii
        self.underflow = around.underflow  # windows hold parts of the same signals


def without_padding(operation, shape):
    """A convolution of windows that hold all it reads."""
    linear_map = operation.linear_map
    return dataclasses.replace(
        operation,
        linear_map=LinearMap(
            linear_map.kind,
            tuple(shape),
            linear_map.strides,
            linear_map.dilation,
            "valid",
            linear_map.groups,
        ),
    )


class _Rows:
    """A region seen through windows: the same ball, and the box of each row's window."""

    def __init__(self, region, low, high):
        self.whole, self.low, self.high = region, low, high

    def minimum(self, c):
        if np.isfinite(self.whole.radius) and not self.whole.is_cut:
            return self.whole.minimum(c)
        return self.whole.minimum_between(c, self.low, self.high)

    def slack(self, c):
        flat = np.abs(c.reshape(len(c), -1))
        reach = np.minimum(
            np.maximum(np.abs(self.low), np.abs(self.high)).reshape(len(self.low), -1),
            min(self.whole.radius, self.whole.radius_l1),
        )
        reach = np.broadcast_to(reach, flat.shape)
        return 4 * np.einsum("ij,ij->i", flat, reach) + 4 * self.whole.l2_radius() * flat.sum(
            axis=1
        )


def _rows_region(region, windows, places, around):
    if np.isfinite(region.radius) and not region.is_cut:
        endless = np.full((1, 1), np.inf)
        return _Rows(region, -endless, endless)
    shape = region.center.shape
    index, inside = windows.indices(0, places, shape)
    mask = inside[..., None]

    def gather(array):
        values = array.reshape(-1, shape[-1])[index]
        return np.where(mask, values, 0.0).astype(around.dtype)

    return _Rows(region, gather(region.low - region.center), gather(region.high - region.center))
