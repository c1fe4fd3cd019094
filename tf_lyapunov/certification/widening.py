"""Radii in other norms, and what bounds around each input add to those of the global gains."""

import contextlib
import dataclasses
import math
import os
import time

import numpy as np

from tf_lyapunov.bounds.composition import Allowance
from tf_lyapunov.certification.state import Kept, digest_of
from tf_lyapunov.local.intervals import box_radii, line_of
from tf_lyapunov.local.linear import check_applies, linear_radii
from tf_lyapunov.local.regions import check_norm, checked_bounds, fitted
from tf_lyapunov.local.slopes import LocalGains, local_radii
from tf_lyapunov.program import rounding

_WORDS = {"l2": "l2", "linf": "l∞", "l1": "l1"}
# Inputs that tell what bounds around inputs are worth, and the share of `time_budget` for them.
_FIRST, _TRIAL = 3, 0.5
# Share that the search for gains gets where these enlarged the radii of most of them, and where
# not; and what the other inputs may take, relative to the first.
_LEAST, _EQUAL, _LONGER = 0.1, 0.5, 1.25


class Widening:
    """What `certify` does beyond global gains, for one network.

    Args:
        network: `Network`.
        method: of `certify`.
        norm: `"l2"`, `"linf"` or `"l1"`.
        bounds: `(low, high)` of valid inputs, or None.
        time_budget: seconds for everything.
        jobs, state: of `certify`.

    Raises:
        UnsupportedLayerError: if the method does not apply to the model.
        ValueError: for a `state` where nothing is searched around inputs.
    """

    def __init__(self, network, method, norm, bounds, time_budget, jobs=1, state=None):
        self.network, self.method, self.norm, self.bounds = network, method, norm, bounds
        self.local = LocalGains(network) if method == "local" else None
        self.linear = method in ("linear", "auto") and len(network.inputs) == 1
        self.boxed = method == "box"
        if method == "linear":
            check_applies(network)
        if self.boxed:
            line_of(network)
        if state is not None and (self.boxed or not self.reads_inputs):
            raise ValueError(
                "`state` keeps searches around inputs, which other methods than 'local', 'linear' "
                "and, for models with one input, 'auto' do without. Received: "
                f"method={method!r} and {len(network.inputs)} inputs. Leave it out."
            )
        self.jobs, self.state, self.kept = jobs, state, None
        # Multipliers of bounds around inputs, by number of the input; None if too large to keep.
        self.records = {}
        self.seconds = time_budget
        self.deadline = time.monotonic() + time_budget
        # What was found around the first inputs, and seconds for the search for gains after that.
        self.first, self.learned, self.gain_seconds = {}, [], time_budget

    @property
    def reads_inputs(self):
        """Whether all inputs must be kept."""
        return self.local is not None or self.linear or self.boxed

    @property
    def within(self):
        """The bounds that radii are limited to, in words, or None."""
        return _shown(self.bounds) if self.kept_bounds is not None else None

    @property
    def kept_bounds(self):
        """The bounds that radii are limited to, or None."""
        return self.bounds if self.linear or self.boxed else None

    def check(self, arrays):
        """Refuses inputs outside the bounds."""
        for x in arrays if self.bounds is not None else ():
            low, high = found = tuple(fitted(v, x.shape[1:]) for v in self.bounds)
            if len(arrays) == 1:
                self.bounds = found
            if np.any(x < low) or np.any(x > high):
                raise ValueError(
                    f"Inputs must lie within `bounds`. Received: values from {np.min(x)} to "
                    f"{np.max(x)}, bounds={_shown(self.bounds)}. Scale them, or leave it out."
                )

    def converted(self, radius, size):
        """Radii of l2 balls in the norm asked for: ‖e‖₂ ≤ √n‖e‖_∞ and ‖e‖₂ ≤ ‖e‖₁."""
        if self.norm != "linf":
            return radius
        root = rounding.sqrt_up(float(size))
        with np.errstate(invalid="ignore"):
            lower = np.maximum(rounding.down(radius / root), 0.0)
            return np.where(np.isfinite(radius), lower, radius)

    def l2_within(self, radius, size):
        """Radii of l2 balls that lie within those of the norm: ‖e‖_∞ ≤ ‖e‖₂, ‖e‖₁ ≤ √n‖e‖₂."""
        return radius / math.sqrt(size) if self.norm == "l1" else radius

    def l2_around(self, radius, size):
        """Radii of l2 balls that hold those of the norm."""
        if self.norm != "linf":
            return radius
        return np.where(np.isfinite(radius), rounding.up(radius * rounding.sqrt_up(size)), radius)

    def moved(self, moved, size):
        """How far a cast moved the inputs, in the norm asked for."""
        return rounding.up(moved * rounding.sqrt_up(float(size))) if self.norm == "l1" else moved

    def open(self, digest, x, labels, allowance):
        """Reads the state, before anything lasts long.

        Args:
            digest: of the claim.
            x, labels, allowance: see `radii`.

        Raises:
            ValueError: if the state is damaged or belongs to something else.
        """
        if not self.reads_inputs:
            return
        shown = None if self.bounds is None else [
            v.item() if v.ndim == 0 else digest_of(v) for v in self.bounds
        ]  # fmt: skip
        settings = {"method": self.method, "norm": self.norm, "bounds": shown}
        # What they are measured against: it depends on precision, backend and device.
        lost = [allowance.of(slice(None), extra) for extra in (0.0, 1.0)]
        identity = {
            "model": digest,
            "inputs": digest_of(x),
            "labels": digest_of(labels),
            "settings": settings,
            "rounding": digest_of(*lost),
        }
        self.kept = Kept(self.state, identity, len(x))

    def learn(self, x, logits, labels, radius, size, allowance):
        """Searches around the first inputs, so that the search for gains takes no time from bounds
        that pay more; after `open`.

        What others need for their bounds is kept, at the pace of the first, if these beat the
        composition rule on most of them; a share of `_LEAST` is for gains all the same.

        Args:
            x, logits, labels, size, allowance: see `radii`.
            radius: float64 (n,), l2 radii by the composition rule.
        """
        if self.method != "auto" or not self.linear:
            return
        begin, count, known = time.monotonic(), min(_FIRST, len(x)), set(self.kept.findings)
        first = self.converted(radius[:count], size)
        with self.kept.keeping():
            found, _, _ = linear_radii(
                self.network,
                _real(x[:count]),
                labels[:count],
                logits.shape[1],
                first,
                Needed(allowance, *self._factors(logits, size)),
                norm=self.norm,
                bounds=self._bounds(x),
                deadline=begin + _TRIAL * self.seconds,
                kept=self.kept,
                told=self.first.__setitem__,
            )
        pays = np.sum(found > first) > count / 2
        spent, workers = time.monotonic() - begin, self.jobs or 1
        workers = os.cpu_count() or 1 if workers < 0 else workers
        made = len(self.first.keys() - known)
        needed = _LONGER * spent / made * (len(x) - count) / workers if made else math.inf
        share = _LEAST if pays else _EQUAL
        left = max(self.deadline - time.monotonic(), 0.0)
        self.gain_seconds = min(max(left - needed, share * self.seconds), left)
        self.learned = [
            f"Bounds around each input went first on {count} inputs and enlarged the radius of "
            f"{np.sum(found > first)} of them: what the others need at that pace was kept from the "
            f"search for gains, which had {share:.0%} of the time at least, where as much was left."
        ]

    def radii(self, x, logits, labels, errors, radius, size, allowance):
        """`(radius in the norm, sentences)` of all inputs, after `open`.

        Args:
            x: inputs as the model receives them, or None where the method does not read them.
            logits, labels, errors: see `margins.certified_radii`.
            radius: float64 (n,), l2 radii by global gains.
            size: entries of one input.
            allowance: `composition.Allowance`.
        """
        with contextlib.nullcontext() if self.kept is None else self.kept.keeping():
            return self._radii(x, logits, labels, errors, radius, size, allowance)

    def _radii(self, x, logits, labels, errors, radius, size, allowance):
        sentences, common = [], dict(jobs=self.jobs, kept=self.kept)
        if self.local is not None:
            wider = local_radii(self.local, x, logits, labels, errors, radius, **common)
            sentences.append(
                "Slopes on the ball around each input enlarged the radius of "
                f"{np.mean(wider > radius):.1%} of them."
            )
            radius = wider
        radius = self.converted(radius, size)
        if self.linear:
            radius, more, self.records = linear_radii(
                self.network,
                _real(x),
                labels,
                logits.shape[1],
                radius,
                Needed(allowance, *self._factors(logits, size)),
                norm=self.norm,
                bounds=self._bounds(x),
                deadline=self.deadline,
                known=self.first,
                **common,
            )
            sentences += [*self.learned, *more]
        elif self.boxed:
            needed = Needed(allowance, *self._factors(logits, size))
            radius, more = box_radii(
                self.network,
                x,
                labels,
                radius,
                needed.of,
                norm=self.norm,
                bounds=self._bounds(x),
                deadline=self.deadline,
            )
            sentences += more
        return radius, sentences

    def _factors(self, logits, size):
        """Largest ratios: of the l2 norm to the one asked for, of a margin's error to logits'."""
        root = math.sqrt(size) if self.norm == "linf" else 1.0
        return root, 1.0 if logits.shape[1] == 1 else math.sqrt(2.0)

    def _bounds(self, x):
        if self.bounds is None:
            return None
        # A cast may have moved inputs beyond them.
        low, high = self.bounds
        return np.minimum(low, x.min(axis=0)), np.maximum(high, x.max(axis=0))

    def sentences(self, sentences):
        """Assumptions in the words of the norm and the bounds."""
        found = []
        for text in sentences:
            if text.startswith("Changes of the input are measured in the l2 norm"):
                text = text.replace("the l2 norm", f"the {_WORDS[self.norm]} norm")
                if self.kept_bounds is not None:
                    text = text.replace(
                        "over all of real space", f"within the bounds {_shown(self.bounds)}"
                    )
            found.append(text)
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Needed:
    """What every margin of an input must exceed on a ball of a radius."""

    allowance: Allowance
    root: float
    factor: float

    def __call__(self, i, radius):
        return self.factor * self.allowance(i, radius * self.root) * (1 + 1e-12)

    def of(self, rows, radius):
        """The same for several inputs and their radii, float64."""
        return self.factor * self.allowance.of(rows, radius * self.root) * (1 + 1e-12)


def checked(norm, bounds):
    """Bounds as arrays, and the name of the norm checked.

    Raises:
        ValueError: for an unknown norm, or bounds that are no pair low ≤ high.
    """
    check_norm(norm)
    return None if bounds is None else checked_bounds(bounds)


def _real(x):
    """Inputs as numbers with fractions."""
    return x.astype(np.float64) if x.dtype.kind in "iub" else x


def _shown(bounds):
    low, high = (v if v.ndim == 0 else np.array([v.min(), v.max()]) for v in bounds)
    return f"{low.tolist()} to {high.tolist()}"
