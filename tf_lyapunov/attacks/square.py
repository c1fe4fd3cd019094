"""Square attack: random search with squares, without gradients."""

from __future__ import annotations

import functools
import math

import numpy as np
from keras import ops

from tf_lyapunov.attacks.base import Attack, margin
from tf_lyapunov.attacks.boundary import Gap, clip, extent
from tf_lyapunov.attacks.inputs import checked_seed, generator, positive_int, positive_number
from tf_lyapunov.theory.balls import L2, Ball, Linf

# The share of the image that a square covers is halved after these of 10,000 queries.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Queries between two looks at which samples are done.
_CHUNK = 200


class Square(Attack):
    """Random search for a larger margin loss max_j≠y f_j - f_y in a ball, one square at a time.

    l∞: a random square of the perturbation is set to ±radius per channel. l2: the mass of a second
    random square is moved into a pyramid pattern in the first, and all is scaled to the radius. A
    change is kept if it raises the loss. Samples `(h, w, c)` are images, `(h, w)` images of one
    channel, `(d,)` lines on which the squares are intervals.

    Args:
        radius: `L2(...)` or `Linf(...)`; one radius, or one per sample.
        queries: evaluations per sample and restart.
        share: share of the input that the first squares cover; it falls to 1/512 of that.
        restarts: number of runs, each on the samples that are not broken yet.
        bounds: None, or `(low, high)`.
        targeted: labels are targets to reach.
        seed: int; a sample's random numbers depend on it and on the sample's position alone.
        batch_size: inputs per query.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import Square
    >>> from tf_lyapunov.theory.balls import Linf
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.5, 0.0]])])
    >>> Square(Linf([0.9, 1.1]), queries=50)(model, [[1.0, 1.0], [1.0, 1.0]]).success.tolist()
    [False, True]

    Reference:
        Andriushchenko, Croce, Flammarion, Hein, "Square attack: a query-efficient black-box
        adversarial attack via random search", ECCV 2020, Algorithms 1 to 3.
    """

    def __init__(
        self,
        radius: Ball,
        *,
        queries: int = 5000,
        share: float = 0.8,
        restarts: int = 1,
        bounds=None,
        targeted: bool = False,
        seed: int = 0,
        batch_size: int = 256,
    ):
        super().__init__(radius, bounds=bounds, targeted=targeted, batch_size=batch_size)
        if self.norm not in (L2, Linf):
            raise TypeError(f"`radius` must be L2 or Linf. Received: {self.norm.__name__}.")
        self.queries = positive_int("queries", queries)
        self.restarts = positive_int("restarts", restarts)
        self.share = positive_number("share", share)
        if self.share > 1:
            raise ValueError(f"`share` must be at most 1. Received: share={share}.")
        self.seed = checked_seed(seed)

    def __repr__(self):
        targeted = ", targeted=True" if self.targeted else ""
        return f"Square({self.ball!r}, queries={self.queries}{targeted})"

    def _loss(self, logits, labels):
        return -margin(logits, labels)

    def _perturb(self, problem):
        point, found = problem.x.copy(), np.zeros(len(problem.x), bool)
        for run in range(self.restarts):
            rows = np.flatnonzero(~found)
            for batch in self._batches(len(rows)):
                here = rows[batch]
                point[here], found[here] = self._run(problem, here, run)
            problem.report(int(found.sum()), f"{self!r}, run {run + 1}, broken")
        return point, np.zeros(len(point), bool)

    def _run(self, problem, rows, run):
        """One run on one batch; samples that are broken leave it between chunks."""
        image, free = _image(problem.image), problem.free
        options = dict(
            norm=self.norm, targeted=self.targeted, boxed=problem.bounds is not None, image=image
        )
        loop = functools.partial(_Loop, **options)
        loop = problem.compiled(("square", *options.values()), loop, "xlfwwsst" + "xfb")
        randoms = [generator(self.seed, problem.index[row], run) for row in rows]
        size = problem.radius[rows]
        change = np.stack([self._start(random, image) for random in randoms])
        change = (change * size[:, None]).astype(np.float32)
        held = problem.x.shape[1] - free
        change = np.pad(change, [(0, 0), (0, held)]) if held else change
        if problem.bounds is not None:
            x = problem.x[rows]
            change = np.clip(x + change, *problem.bounds) - x
        least = np.full(len(rows), -np.inf, np.float32)
        found = np.zeros(len(rows), bool)
        for side, count in self._schedule(image):
            active = np.flatnonzero(~found)
            if not len(active):
                break
            numbers = np.stack(
                [randoms[i].random((count, 5 + image[2]), np.float32) for i in active]
            )
            there = rows[active]
            change[active], least[active], found[active] = loop(
                problem.x[there],
                problem.labels[there],
                size[active].astype(np.float32),
                *problem.box,
                np.asarray(side, np.float32),
                _pattern(*side).astype(np.float32).ravel(),
                numbers,
                change[active],
                least[active],
                found[active],
            )
        return problem.x[rows] + change, found

    def _start(self, random, image):
        """Stripes (l∞) or a grid of pyramids (l2), of norm one."""
        height, width, channels = image
        if self.norm is Linf:
            signs = random.choice([-1.0, 1.0], (1, width, channels))
            if width == 1:
                signs = random.choice([-1.0, 1.0], (height, 1, channels))
            return np.broadcast_to(signs, image).ravel()
        tall, wide = max(height // 5, 1), max(width // 5, 1)
        start, tile = np.zeros(image), _pattern(tall, wide)[:, :, None]
        for top in range(0, height - tall + 1, tall):
            for left in range(0, width - wide + 1, wide):
                signs = random.choice([-1.0, 1.0], channels)
                start[top : top + tall, left : left + wide] = tile * signs
        return start.ravel() / np.linalg.norm(start)

    def _schedule(self, image):
        """Window sides and numbers of queries, with at most `_CHUNK` queries each."""
        height, width, _ = image
        sides = []
        for query in range(self.queries):
            halvings = np.searchsorted(_HALVINGS, query * 10_000 // self.queries, side="left")
            share = self.share / 2.0**halvings
            if width == 1:
                side = (min(max(round(share * height), 1), height), 1)
            else:
                length = max(round(math.sqrt(share * height * width)), 1)
                if self.norm is L2:
                    length = max(length, 3) | 1
                side = (min(length, height, width),) * 2
            if sides and sides[-1][0] == side and sides[-1][1] < _CHUNK:
                sides[-1] = (side, sides[-1][1] + 1)
            else:
                sides.append((side, 1))
        return sides


def _image(shape):
    """Height, width, channels of a sample; a line has width one."""
    if len(shape) == 1:
        return (shape[0], 1, 1)
    if len(shape) == 2:
        return (*shape, 1)
    return (math.prod(shape[:-2]), *shape[-2:])


def _pattern(tall, wide):
    """Two pyramids of opposite sign, one above the other, of norm one."""
    upper = _pyramid(tall // 2, wide) if tall > 1 else np.zeros((0, wide))
    pattern = np.concatenate([upper, -_pyramid(tall - tall // 2, wide)])
    return pattern / np.linalg.norm(pattern)


def _pyramid(tall, wide):
    """Σ_k 1/k² over the centred rectangles of half-width k, of norm one."""
    pyramid = np.zeros((tall, wide))
    row, column = tall // 2, wide // 2
    for k in range(max(tall, wide) // 2 + 1):
        rows = slice(max(row - k, 0), min(row + k + 1, tall))
        columns = slice(max(column - k, 0), min(column + k + 1, wide))
        pyramid[rows, columns] += 1.0 / (k + 1) ** 2
    return pyramid / np.linalg.norm(pyramid)


class _Loop:
    """A number of queries on tensors; compiled as one graph."""

    def __init__(self, function, shape, norm, targeted, boxed, image):
        self.gap = Gap(function, shape, targeted)
        self.norm, self.boxed, self.image = norm, boxed, image

    def __call__(self, x, labels, radius, low, high, side, pattern, numbers, *state):
        tall, wide = ops.cast(side[0], "int32"), ops.cast(side[1], "int32")
        size = radius[:, None, None, None]
        height, width, channels = self.image
        free = height * width * channels
        rows, columns = ops.arange(height)[None, :], ops.arange(width)[None, :]
        count = ops.shape(numbers)[1]

        def window(first, second):
            """Offsets of every pixel from a random window's corner, and whether it lies inside."""
            down = rows - _corner(first, height - tall + 1)[:, None]
            right = columns - _corner(second, width - wide + 1)[:, None]
            inside = ((down >= 0) & (down < tall))[:, :, None] & ((right >= 0) & (right < wide))[
                :, None, :
            ]
            return down[:, :, None], right[:, None, :], inside[:, :, :, None]

        def proposal(change, random):
            down, right, inside = window(random[:, 0], random[:, 1])
            signs = ops.where(random[:, 5:] < 0.5, -1.0, 1.0)[:, None, None, :]
            if self.norm is Linf:
                return ops.where(inside, size * signs, change)
            *_, other = window(random[:, 2], random[:, 3])
            down, right = ops.clip(down, 0, tall - 1), ops.clip(right, 0, wide - 1)
            shape = ops.take(pattern, down * wide + right)
            # Squares, and only they, may lie on their side.
            turned = ops.take(pattern, ops.clip(right * wide + down, 0, tall * wide - 1))
            lying = (random[:, 4] < 0.5)[:, None, None] & ops.equal(tall, wide)
            shape = ops.where(lying, turned, shape)[:, :, :, None]
            mass = _sum_squares(change, inside | other)
            own = ops.sqrt(_sum_squares(change, inside))
            new = shape * signs + change / (1e-12 + own)
            new = new / (1e-12 + ops.sqrt(_sum_squares(new, inside)))
            spare = ops.maximum(size**2 - _sum_squares(change, None), 0.0) / channels
            new = new * ops.sqrt(spare + mass)
            change = ops.where(inside, new, ops.where(other, 0.0, change))
            total = ops.sqrt(_sum_squares(change, None))
            return change * ops.where(total > 0, size / ops.where(total > 0, total, 1.0), 0.0)

        def judged(change):
            logits = self.gap.logits(x + change)
            return self.gap.of(logits, labels), self.gap.surely(logits, labels)

        def unfinished(i, change, most, found):
            return ops.logical_and(i < count, ops.logical_not(ops.all(found)))

        def body(i, change, most, found):
            image = ops.reshape(change[:, :free], (-1, *self.image))
            new = ops.reshape(proposal(image, ops.take(numbers, i, axis=1)), (-1, free))
            if x.shape[1] > free:  # what is held fixed stays behind
                new = ops.concatenate([new, change[:, free:]], axis=1)
            new = clip(x + new, low, high, self.boxed) - x
            if self.norm is L2:
                length = extent(new, L2)
                scale = ops.where(length > radius, radius / ops.maximum(length, 1e-30), 1.0)
                new = scale[:, None] * new
            gap, broken = judged(new)
            better = ops.logical_not(found) & ((gap > most) | broken)
            change = ops.where(better[:, None], new, change)
            return i + 1, change, ops.where(better, gap, most), found | (better & broken)

        change, most, found = state
        gap, broken = judged(change)
        most = ops.maximum(most, ops.where(ops.isnan(gap), -math.inf, gap))
        start = (ops.zeros((), "int32"), change, most, found | broken)
        _, *state = ops.while_loop(unfinished, body, start)
        return tuple(state)


def _corner(uniform, places):
    """A whole number from 0 to `places` - 1."""
    places = ops.cast(places, "float32")
    return ops.cast(ops.minimum(ops.floor(uniform * places), places - 1), "int32")


def _sum_squares(change, mask):
    """Per channel inside a mask, or over everything."""
    square = ops.square(change)
    if mask is None:
        return ops.sum(square, axis=(1, 2, 3), keepdims=True)
    return ops.sum(ops.where(mask, square, 0.0), axis=(1, 2), keepdims=True)
