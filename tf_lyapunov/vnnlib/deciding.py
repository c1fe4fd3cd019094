"""Whether a property file is satisfiable: `sat` with a counterexample, `unsat`, or neither.

`unsat`: for every box of the file's unsafe set it is proved, of the exact function and of all real
inputs, that no output lies in the sets there. `sat`: an input in the network's own format that
satisfies the file's inequalities exactly, in rational arithmetic, together with the outputs that
onnxruntime gives for it and with those that the Keras model gives; the exact function, within a
bound on its rounding, breaks the property there too.
"""

import dataclasses
import time

import numpy as np

from tf_lyapunov.errors import PropertyFileError
from tf_lyapunov.local.regions import Region
from tf_lyapunov.local.verifying import verify_property
from tf_lyapunov.theory.arguments import checked_seconds
from tf_lyapunov.vnnlib.sets import cases

SAT, UNSAT, UNKNOWN, TIMEOUT = "sat", "unsat", "unknown", "timeout"
# Seconds that a search is given at least, and that a replay may take.
_LEAST, _REPLAY = 0.05, 10.0


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """What was found of a property file.

    Attributes:
        answer: `"sat"`, `"unsat"`, `"unknown"` or `"timeout"`.
        reason: one sentence.
        x, y: of a counterexample, the flat input in the network's format and what its runtime
            gives, float64; None without one.
        found: list of `verifying.Verification`, one per box that was searched.
        seconds: that it took.
    """

    answer: str
    reason: str
    x: np.ndarray | None
    y: np.ndarray | None
    found: list
    seconds: float

    @property
    def is_decided(self):
        """Whether it is `sat` or `unsat`."""
        return self.answer in (SAT, UNSAT)


def decide(subject, query, *, timeout=60.0, seed=0):
    """Decides a `Query` about a `Subject`.

    Several boxes share the time; what one leaves is the others'.

    Args:
        subject: `subjects.Subject`.
        query: `formulas.Query`.
        timeout: positive number of seconds, exceeded by the last batch of a search at most.
        seed: of the attack's random points.

    Returns:
        `Decision`.

    Raises:
        PropertyFileError: if the file is about other inputs or outputs than the network's, or
            cannot be stated as boxes of inputs with polyhedra of outputs.
        UnsupportedLayerError: naming a layer without a proven gain.

    Example:

    >>> import keras
    >>> from tf_lyapunov.vnnlib.reading import parse
    >>> from tf_lyapunov.vnnlib.subjects import subject_of
    >>> dense = keras.layers.Dense(1, kernel_initializer="ones", activation="relu")
    >>> subject = subject_of(keras.Sequential([keras.Input((1,)), dense]))
    >>> text = '''(declare-const X_0 Real) (declare-const Y_0 Real)
    ... (assert (<= X_0 1)) (assert (>= X_0 -1)) (assert (>= Y_0 {}))'''
    >>> decide(subject, parse(text.format(1.5))).answer
    'unsat'
    >>> found = decide(subject, parse(text.format(0.5)))
    >>> found.answer, bool(0.5 <= found.x[0] <= 1)
    ('sat', True)
    """
    checked_seconds("timeout", timeout)
    begin = time.monotonic()
    outputs = int(np.prod(subject.model.outputs[0].shape[1:]))
    inputs = int(np.prod(subject.shape))
    if (query.inputs, query.outputs) != (inputs, outputs):
        raise PropertyFileError(
            "A property must declare the inputs and outputs that the network has, "
            f"{inputs} and {outputs}. Received: {query.inputs} and {query.outputs}, in "
            f"{query.source}."
        )
    search = _Search(subject, query, begin + timeout, seed)
    answer, reason = search.run(cases(query))
    x, y = search.counterexample or (None, None)
    found = [search.results[k] for k in sorted(search.results)]
    return Decision(answer, reason, x, y, found, time.monotonic() - begin)


class _Search:
    """Goes through the boxes of a query.

    Attributes:
        results: dict from the boxes' positions to `Verification`.
        counterexample: `(x, y)`, or None.
    """

    def __init__(self, subject, query, deadline, seed):
        self.subject, self.query, self.deadline, self.seed = subject, query, deadline, seed
        self.results, self.counterexample, self.doubts = {}, None, []

    def run(self, waiting):
        """`(answer, reason)`."""
        if not waiting:
            return UNSAT, "The set that the file states is empty: its conditions contradict."
        waiting, late = dict(enumerate(waiting)), False
        for last in (False, True):
            open_ = dict(waiting)
            for left, (k, case) in zip(range(len(waiting), 0, -1), waiting.items(), strict=True):
                rest = self.rest()
                if rest <= _LEAST:
                    break
                result = self.results[k] = self.verified(case.low, case.high, case, rest / left)
                if result.is_refuted and self.confirmed(case, result):
                    return SAT, f"An input breaks the property, replayed by {self.replayed()}."
                if result.is_proved or result.is_refuted:
                    del open_[k]
                late = late or result.seconds >= result.timeout
            # Once more what had a part of the time alone.
            waiting, alone = open_, len(waiting) == 1
            if not open_ or alone or last:
                break
        if self.doubts:
            return UNKNOWN, self.doubts[0]
        if not waiting:
            return UNSAT, f"Proved on each of {len(self.results)} boxes of inputs."
        if late or self.rest() <= _LEAST:
            return TIMEOUT, "The time was up."
        if any(case.box.inside(self.subject.dtype) is None for case in waiting.values()):
            return UNKNOWN, self.no_number()
        return UNKNOWN, "Neither a proof nor a counterexample was found."

    def rest(self):
        return self.deadline - time.monotonic()

    def replayed(self):
        own = self.subject.runtime
        return own if self.subject.replay is None else f"{own} and by the Keras model"

    def no_number(self):
        return (
            f"Nothing was proved, and some input has no number of the type {self.subject.dtype} "
            "that satisfies the file, so that there is no counterexample either."
        )

    def verified(self, low, high, case, timeout):
        region = Region.box(*(np.reshape(v, self.subject.shape) for v in (low, high)))
        return verify_property(
            self.subject.model,
            region,
            case.property(),
            timeout=max(timeout, _LEAST),
            outputs="model",
            seed=self.seed,
        )

    def confirmed(self, case, result):
        """Whether a counterexample of a box, or one near it, is one of the file."""
        x = result.counterexample.x.ravel()
        inside = case.box.inside(self.subject.dtype)
        points = [x] if inside is None else [x, np.clip(x, *inside)]
        if any(self.replays(p, case) for p in points):
            return True
        if inside is None:
            self.doubts.append(self.no_number())
            return False
        # The corners of the box were rounded outwards: search those of the type's numbers in it.
        if self.rest() > _LEAST:
            again = self.verified(*(v.astype(np.float64) for v in inside), case, self.rest())
            if again.is_refuted and self.replays(again.counterexample.x.ravel(), case):
                return True
        self.doubts.append(
            "A counterexample to the bounds was found that does not satisfy the file itself "
            f"with the outputs of {self.replayed()}."
        )
        return False

    def replays(self, x, case):
        """Whether an input satisfies the file with every runtime's outputs; keeps it if so."""
        x = np.asarray(x, self.subject.dtype)
        y = None
        if self.subject.replay is not None:
            y = self.subject.replay(x)
            if not self.query.holds(x, y):
                return False
        own = self.verified(x.astype(np.float64), x.astype(np.float64), case, _REPLAY)
        if not own.is_refuted or not self.query.holds(x, own.counterexample.outputs):
            return False
        self.counterexample = x, own.counterexample.outputs if y is None else y
        return True
