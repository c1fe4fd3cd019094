"""Parts of a region on which hidden units lie below or above points, and bounds on them.

A split divides the inputs by whether what an activation reads, z_i, is at most a point p or at
least p, or an input itself is: every input lies in one half or in both. On a half, l_i ≤ z_i ≤ u_i
is cut at p, and (L) of `relaxation` holds with the smaller box, ball and centre being those of the
whole region; g of a unit that was cut is the multiplier of what cut it. Where boxes are renewed, a
half bounds all units that are no lines on it, or were cut, once more, by passes that rest on its
own boxes, and so what maxima read. A half whose boxes have crossing ends has no inputs.
"""

import dataclasses

import numpy as np

from tf_lyapunov.verification.around.functionals import of_units
from tf_lyapunov.verification.around.region import Region
from tf_lyapunov.verification.around.relaxation import Relaxation


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Inputs of a region.

    Attributes:
        region: `Region` of the inputs.
        boxes: dict from names of steps to `(low, high)`, flat, of the signals whose boxes are
            smaller than on the whole region.
        free: dict from the same names to sets of flat units that were cut.
        relaxed: dict from names of steps to `Relaxation` or `Maximum`, of those that read such
            signals.
    """

    region: Region
    boxes: dict
    free: dict
    relaxed: dict


class Parts:
    """Parts of one region.

    Args:
        around: `Surroundings` of the whole region.
        is_renewed: whether boxes are bounded anew on every half.
    """

    def __init__(self, around, is_renewed):
        self.around, self.is_renewed = around, is_renewed
        self.place = {name: k for k, name in enumerate(around.order)}
        # By name of a signal: the activations and maxima that read it.
        self.readers = {}
        for name in around.order:
            if name in around.relaxed:
                self.readers.setdefault(around.steps[name].inputs[0], []).append(name)

    @property
    def numbers(self):
        """Numbers that one part holds, at most, beside what it shares."""
        signals = [self.around.order[0], *self.readers]
        return sum(4 * self.around.values[name].size for name in signals)

    def whole(self):
        """The `Part` that is all of the region."""
        return Part(self.around.region, {}, {}, {})

    def half(self, part, name, unit, point, is_above):
        """The half of a part, or None if it is found to hold no input.

        Args:
            part: `Part`.
            name: of the signal that is cut, that of the first step for the input itself.
            unit: flat index.
            point: float.
            is_above: whether the half is the upper one.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return self._half(part, name, unit, point, is_above)

    def _half(self, part, name, unit, point, is_above):
        region, boxes, free = part.region, dict(part.boxes), dict(part.free)
        if name == self.around.order[0]:
            region = region.half(unit, point, is_above)
            if region is None:
                return None
        if name in self.readers:
            low, high = (v.copy() for v in self._box(part, name))
            if is_above:
                low[unit] = max(low[unit], point)
            else:
                high[unit] = min(high[unit], point)
            if not low[unit] <= high[unit]:
                return None
            boxes[name] = low, high
            free[name] = free.get(name, frozenset()) | {unit}
        found = Part(region, boxes, free, dict(part.relaxed))
        self._relax(found, name)
        if self.is_renewed and not self._renew(found, self.place[name]):
            return None
        return found

    def lower(self, part, c, multipliers):
        """Lower bounds of cᵀf on a part, f the logits, float64 (rows,).

        Args:
            part: `Part`.
            c: `Functionals` of the logits.
            multipliers: dict from names of steps to `Multipliers` of these rows.
        """
        target = self.around.network.logits
        with np.errstate(over="ignore", invalid="ignore"):
            return self.around.lower(target, c, multipliers, part.relaxed, part.region)

    def _box(self, part, name):
        if name in part.boxes:
            return part.boxes[name]
        return tuple(v.reshape(-1) for v in self.around.boxes[name])

    def _relax(self, part, name):
        """Renews the relaxations of what reads a signal."""
        if name not in part.boxes:
            return
        for reader in self.readers[name]:
            whole, box = self.around.relaxed[reader], part.boxes[name]
            free = sorted(part.free.get(name, ()))
            if isinstance(whole, Relaxation):
                part.relaxed[reader] = whole.within(*box, free)
            else:
                part.relaxed[reader] = whole.within(*box)

    def _renew(self, part, since):
        """Bounds the signals behind a place anew; False if the part is found to be empty."""
        around = self.around
        for name in self.readers:
            if self.place[name] <= since:
                continue
            units = np.zeros(around.values[name].size, bool)
            units[sorted(part.free.get(name, ()))] = True
            for reader in self.readers[name]:
                own = part.relaxed.get(reader) or around.relaxed[reader]
                units |= ~own.pieces.lines() if isinstance(own, Relaxation) else own.units
            low, high = (v.copy() for v in self._box(part, name))
            for some in around.tiles(name, np.flatnonzero(units)):
                c = of_units(some, around.values[name].shape)
                found = around.lower(name, c, None, part.relaxed, part.region)
                low[some] = np.maximum(low[some], found[: len(some)])
                high[some] = np.minimum(high[some], -found[len(some) :])
            if not np.all(low <= high):
                return False
            part.boxes[name] = low, high
            self._relax(part, name)
        return True
