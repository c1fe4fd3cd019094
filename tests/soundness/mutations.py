"""Old faults, put back one at a time, to see that the oracles still find them.

A mutation is a context manager around one stable seam. Those of the reading of a model
(`READER_FAULTS`) are data with an adapter to be written: the reader's seams are not stable yet.
"""

import contextlib
from unittest import mock

import numpy as np


@contextlib.contextmanager
def distances_shrunk():
    """Radii with distances a hundredth of what is proved."""
    from tf_lyapunov.certification import margins

    original = margins.pair_distances
    with mock.patch.object(margins, "pair_distances", lambda *a: 0.01 * original(*a)):
        yield


@contextlib.contextmanager
def pairs_without_root_of_two():
    """Radii of pairs of classes that leave out √2 (Tsuzuku's proposition)."""
    from tf_lyapunov.certification import heads, margins

    with (
        mock.patch.object(margins, "_SQRT2_UP", 0.1),
        mock.patch.object(heads, "_SQRT2_UP", 0.1),
        mock.patch.object(margins, "heads", _none),
    ):
        yield


@contextlib.contextmanager
def logits_of_another_class():
    """Decisions read from the smallest logit."""
    from tf_lyapunov.certification import margins

    def smallest(logits):
        return np.argmin(logits, axis=1).astype(np.int64)

    def radii(logits, labels, *rest, original=margins.certified_radii):
        return original(-logits, labels, *rest)

    with (
        mock.patch.object(margins, "decisions", smallest),
        mock.patch.object(margins, "certified_radii", radii),
    ):
        yield


@contextlib.contextmanager
def metric_gain_measured_low():
    """`CertifiedAccuracy` with a constant of a tenth of the gain."""
    from tf_lyapunov import metrics

    original = metrics._CertifiedMetric._measured
    with mock.patch.object(
        metrics._CertifiedMetric, "_measured", lambda self, model: 0.1 * original(self, model)
    ):
        yield


@contextlib.contextmanager
def steps_of_the_optimizer_unseen():
    """Growth bounds that forget the optimizer's steps."""
    from tf_lyapunov import growth

    with mock.patch.object(growth, "_moves", lambda optimizer, variable, count: [0.0] * count):
        yield


@contextlib.contextmanager
def monitor_gain_halved():
    """A monitor that reports half of its stages' gain."""
    from tf_lyapunov.callbacks import LyapunovMonitor

    original = LyapunovMonitor._gain
    with mock.patch.object(LyapunovMonitor, "_gain", lambda self, b: 0.25 * original(self, b)):
        yield


def _none(*_):
    return None


# Name: (mutation, kinds of claims to check, seeds' range).
STABLE = {
    "pair distances shrunk": (distances_shrunk, ["radius"]),
    "√2 of a pair left out": (pairs_without_root_of_two, ["radius"]),
    "another class decides": (logits_of_another_class, ["radius"]),
    "metric's gain too low": (metric_gain_measured_low, ["metric"]),
    "optimizer's steps unseen": (steps_of_the_optimizer_unseen, ["training"]),
    "monitor's gain halved": (monitor_gain_halved, ["training"]),
}

# Faults of reading, each with words that `generator.Case.described` holds where it shows.
# To be given an adapter (a context manager as above) when the reader's seams are stable.
READER_FAULTS = {
    "cast in the graph ignored": "ops cast",
    "integer Input of a nested model ignored": "nested int32",
    "float16 Input of a nested model ignored": "nested float16",
    "keyword of a nested call dropped": "nested keyword",
    "mask of Softmax dropped": "Softmax mask",
    "activation recognised by its name": "wrapped",
    "call of an instance ignored": "call replaced",
    "attribute changed after the first trace ignored": "activation changed",
    "slope changed after the first trace ignored": "slope changed",
    "array constant of a merging layer ignored": "merge array",
}
