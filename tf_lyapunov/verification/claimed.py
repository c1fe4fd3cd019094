"""Regions of inputs that proof files make claims about."""

import dataclasses

import numpy as np

from tf_lyapunov.digits import at_least
from tf_lyapunov.verification.around import evidence
from tf_lyapunov.verification.around.region import Region
from tf_lyapunov.verification.contents import exactly, layers_of, notes_of, quoted

_HEADER = {"format", "version", "layers", "notes"}


def pack(version, network, arrays, pieces=(), notes=()):
    """`(header, arrays)` for `archive.write` of a claim about a region.

    Args:
        arrays: dict of the claim's own.
        pieces: list of `evidence.Piece`; or, of several inputs, a dict of such lists by number.
        notes: sentences.
    """
    header = {
        "version": version,
        "layers": [[r.name, r.settings, r.weights] for r in network.layers],
        "notes": list(notes),
    }
    if not isinstance(pieces, dict):
        pieces = {0: list(pieces)} if pieces else {}
    around = evidence.pack(pieces)
    return header, arrays | {f"around_{name}": array for name, array in around.items()}


def unpack(header, arrays, kinds, inputs=None):
    """`(layers, fields, pieces, notes)` of a file's contents.

    Args:
        kinds: dict from the names of the claim's arrays to their types.
        inputs: name of the array that has one entry per input, if there may be several, for which
            the pieces are a dict.

    Raises:
        KeyError, TypeError, ValueError: if something is missing, unknown or of the wrong type.
    """
    exactly(header, _HEADER, "header")
    around = {name: arrays[f"around_{name}"] for name in evidence.ARRAYS}
    unknown = sorted(set(arrays) - set(kinds) - {f"around_{name}" for name in around})
    if unknown:
        raise ValueError(f"it holds an array {quoted(unknown[0])} that no proof has")
    for name, kind in kinds.items():
        if arrays[name].dtype.str[1:] != kind or np.any(np.isnan(arrays[name])):
            raise ValueError(f"{name} is of another type, or NaN")
    fields = {name: np.array(arrays[name]) for name in kinds}
    pieces = evidence.unpack(around, 1 if inputs is None else fields[inputs].size)
    if inputs is None:
        pieces = pieces.get(0, [])
    return layers_of(header), fields, pieces, notes_of(header)


@dataclasses.dataclass(frozen=True, eq=False)
class ClaimedRegion:
    """All x with low ≤ x ≤ high, ‖x - center‖₂ ≤ radii[0] and ‖x - center‖₁ ≤ radii[1].

    Attributes:
        center, low, high: float64 of the shape of one input; the bounds possibly infinite.
        radii: float64 (2,), possibly infinite.
    """

    center: np.ndarray
    low: np.ndarray
    high: np.ndarray
    radii: np.ndarray

    def check(self):
        """Refuses what is no region; its arrays are float64 without NaN."""
        if self.center.ndim < 1 or not (self.low.shape == self.high.shape == self.center.shape):
            raise ValueError("the bounds of the region have another shape than its centre")
        if self.radii.shape != (2,) or np.any(self.radii < 0):
            raise ValueError("the radii of the region are not two numbers ≥ 0")
        if not (np.all(self.low <= self.center) and np.all(self.center <= self.high)):
            raise ValueError("the centre of the region is not within its bounds")
        if not np.all(np.isfinite(self.center)):
            raise ValueError("the centre of the region is not finite")

    def region(self):
        """`Region` that holds all these inputs."""
        within = self.low, self.high
        for radius, norm in zip(self.radii, ("l2", "l1"), strict=True):
            if np.isfinite(radius):
                return Region(self.center, radius, norm, within)
        return Region(self.center, np.inf, "linf", within)

    def words(self):
        """The region on one line."""
        parts = [f"inputs of shape {self.center.shape}"]
        for radius, norm in zip(self.radii, ("l2", "l1"), strict=True):
            if np.isfinite(radius):
                parts.append(f"within {at_least(radius)} of the file's centre in {norm}")
        if np.any(np.isfinite(self.low)) or np.any(np.isfinite(self.high)):
            with np.errstate(over="ignore"):
                widest = float(np.max(self.high - self.low))
            parts.append(f"between the file's bounds, which are up to {at_least(widest)} apart")
        return ", ".join(parts)
