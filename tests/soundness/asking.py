"""What the library answers about a case, and the functions that contradict it."""

import dataclasses

import keras
import numpy as np
from soundness import oracles

_RESIZING = ("Resizing", "UpSampling", "CenterCrop", "RandomCrop")


class Refused(Exception):
    """The library proves nothing of this model."""


@dataclasses.dataclass(frozen=True)
class Violation:
    """A claim that an oracle contradicts; `seed` reproduces it."""

    kind: str
    seed: int
    text: str


def asked(function, *args, **options):
    """The library's answer, or `Refused`."""
    try:
        return function(*args, **options)
    except (ValueError, NotImplementedError) as error:
        raise Refused(str(error)) from error


def functions(case):
    """The model and its twin (or None) as functions of arrays; the twin's values may be None."""

    def own(x):
        return oracles.evaluate(case.model, case.argument(x))

    def twin(x):
        if case.twin is None:
            return None
        return oracles.evaluate(case.twin, case.argument(x.astype(np.float64)))

    own.precision = case.policy.removeprefix("mixed_")
    for half in ("bfloat16", "float16"):  # of a layer's own policy
        if half in case.described and own.precision not in ("bfloat16", "float16"):
            own.precision = half
    if keras.backend.backend() == "tensorflow":
        # TensorFlow resizes in float32 whatever the type of an image.
        resized = any(name in case.described for name in _RESIZING)
        twin.precision = "float32" if resized else "float64"
        return own, twin
    # Products of float64 tensors are computed in float32 by the others: they have no twin.
    own.precision = "float32" if own.precision == "float64" else own.precision
    return own, None


def exact(case):
    """`(function, dtype of its inputs)`: the twin where there is one, else the model."""
    own, twin = functions(case)
    if twin is None or case.twin is None or case.input_dtype.kind in "iu":
        return own, case.input_dtype
    return twin, "float64"
