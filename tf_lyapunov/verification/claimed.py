"""Regions of inputs that proof files make claims about."""

import dataclasses

import numpy as np

from tf_lyapunov.verification.around.region import Region


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
                parts.append(f"within {radius:.9g} of the file's centre in {norm}")
        if np.any(np.isfinite(self.low)) or np.any(np.isfinite(self.high)):
            with np.errstate(over="ignore"):
                widest = float(np.max(self.high - self.low))
            parts.append(f"between the file's bounds, which are up to {widest:.9g} apart")
        return ", ".join(parts)
