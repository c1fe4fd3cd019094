"""Several attacks as one: the nearest of what they find, or AutoAttack on what is left."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tf_lyapunov.archives import read_arrays
from tf_lyapunov.attacks.apgd import APGD
from tf_lyapunov.attacks.base import Attack, AttackResult, unpacked
from tf_lyapunov.attacks.fab import FAB
from tf_lyapunov.attacks.identity import described, inference_state
from tf_lyapunov.attacks.inputs import checked_seed, packed_inputs, positive_int
from tf_lyapunov.attacks.square import Square
from tf_lyapunov.progress import steps
from tf_lyapunov.theory.balls import Ball
from tf_lyapunov.writing import write_bytes

_FORMAT = "tf_lyapunov attack state 1"
_ARRAYS = (
    "x_adv",
    "success",
    "distance",
    "labels",
    "predictions_adv",
    "margins",
    "loss",
    "zero_gradient",
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EnsembleResult(AttackResult):
    """What the best of several attacks found.

    Attributes:
        found_by: array of str `(n,)`: the name of the attack whose result is kept, `"clean"` for
            inputs that are misclassified already, `""` without success.
    """

    found_by: np.ndarray | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Number of inputs by who broke them; `""` counts those that nobody did."""
        names, counts = np.unique(self.found_by, return_counts=True)
        return dict(zip(names.tolist(), counts.tolist(), strict=True))

    def summary(self) -> dict:
        return {**super().summary(), "found_by": self.counts, "notes": list(self.notes)}


class Ensemble:
    """Several attacks in one norm and ball; of what they find, the nearest is kept.

    Args:
        attacks: attacks, or a mapping from names to them; all untargeted or all targeted.
        survivors_only: whether each attack gets only the inputs that those before it did not
            break. False: every attack gets every input, for the smallest distances.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import DeepFool, Ensemble, MinimalFGV
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    >>> result = Ensemble([MinimalFGV(), DeepFool()])(model, [[1.0, 1.0]])
    >>> result.distance.round(5).tolist()
    [1.0]
    """

    def __init__(
        self, attacks: Mapping[str, Attack] | Sequence[Attack], *, survivors_only: bool = False
    ):
        if isinstance(attacks, Attack):
            attacks = [attacks]
        if not isinstance(attacks, Mapping):
            given, attacks = list(attacks), {}
            for attack in given:
                same = sum(name.split(" #")[0] == repr(attack) for name in attacks)
                attacks[f"{attack!r} #{same + 1}" if same else repr(attack)] = attack
        if not attacks or not all(isinstance(a, Attack) for a in attacks.values()):
            raise TypeError(
                f"`attacks` must be attacks, or names and attacks. Received: attacks={attacks!r}."
            )
        first = next(iter(attacks.values()))
        for name, attack in attacks.items():
            same = attack.norm is first.norm and attack.ball == first.ball
            if not same or attack.targeted != first.targeted:
                raise ValueError(
                    "The attacks must share norm, radius and `targeted`. "
                    f"Received: {attack!r} ({name}) beside {first!r}."
                )
        self.attacks = dict(attacks)
        self.survivors_only = bool(survivors_only)
        self.ball, self.norm, self.targeted = first.ball, first.norm, first.targeted

    def __repr__(self):
        return f"{type(self).__name__}([{', '.join(self.attacks)}])"

    def __call__(
        self,
        model,
        x,
        y=None,
        *,
        perturbed=None,
        state: str | Path | None = None,
        chunk_size: int = 1000,
        progress: Callable[[str], None] | None = None,
    ) -> EnsembleResult:
        """Attack a classifier.

        Args:
            model: as for every attack.
            x: array `(n, ...)`, or arrays for several inputs, as for every attack.
            y: labels or targets; default: the model's predictions.
            perturbed: which input of several is changed, as for every attack.
            state: file in which every finished attack on every chunk of inputs is kept, replaced
                whole each time, so that a killed run continues where it was. The result does
                not depend on how often it was killed.
            chunk_size: inputs per chunk.
            progress: called with a line of text.

        Returns:
            An `EnsembleResult`.

        Raises:
            TypeError, ValueError: as for every attack.
            ValueError: if `state` is damaged, or belongs to another model, data or ensemble.
        """
        given, (x, packing) = x, packed_inputs(model, x, perturbed)
        if y is None and self.targeted:
            raise ValueError("A targeted attack needs its targets. Received: y=None.")
        if y is not None and len(y) != len(x):
            raise ValueError(
                f"`y` must have one label per input, {len(x)}. Received: {len(y)} labels."
            )
        size = positive_int("chunk_size", chunk_size)
        chunks = [np.arange(i, min(i + size, len(x))) for i in range(0, len(x), size)]
        key = "" if state is None else self._fingerprint(model, x, y, size, packing)
        found = _Found.load(state, key, len(chunks) * len(self.attacks))
        tasks = [(n, c, *a) for n, c in enumerate(chunks) for a in enumerate(self.attacks.items())]
        for number, chunk, place, (name, attack) in steps(tasks, "attacks"):
            if found is not None and found.done[number * len(self.attacks) + place]:
                continue
            rows = chunk
            if place and self.survivors_only:
                rows = chunk[~found.arrays["success"][chunk]]
            if len(rows):
                if progress is not None:
                    progress(f"{name}: {len(rows)} inputs, chunk {number + 1} of {len(chunks)}")
                labels = (
                    found.arrays["labels"][rows]
                    if place
                    else None
                    if y is None
                    else (np.asarray(y)[rows])
                )
                result = attack.on_rows(model, x[rows], labels, rows, len(x), progress, packing)
                if found is None:
                    found = _Found.empty(x, len(chunks) * len(self.attacks))
                found.merge(rows, result, name, first=place == 0)
            found.done[number * len(self.attacks) + place] = True
            found.save(state, key)
        result = EnsembleResult(
            **found.arrays,
            norm=self.norm,
            ball=self.ball,
            targeted=self.targeted,
            attack=repr(self),
            notes=tuple(found.notes),
            found_by=found.found_by,
        )
        return unpacked(result, packing, given)

    def _fingerprint(self, model, x, y, size, packing=None):
        digest = hashlib.sha256(_FORMAT.encode())
        for part in (self.survivors_only, size, x.shape, None if y is None else np.asarray(y)):
            digest.update(_identity(part))
        if packing is not None:
            digest.update(_identity((packing.inputs.names, packing.chosen)))
        for name, attack in self.attacks.items():
            digest.update(_identity((name, type(attack).__name__, sorted(vars(attack).items()))))
        digest.update(repr(described(model)).encode())
        for array in (x, *inference_state(model)):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


class AutoAttack(Ensemble):
    """AutoAttack, standard version: four attacks inside a ball, each on what is left.

    APGD on the cross-entropy; APGD on the targeted ratio of logits; FAB on targets; Square. There
    is nothing to tune. The share that survives is an upper bound of the robust accuracy.

    Args:
        radius: `L2(...)` or `Linf(...)`; one radius, or one per sample.
        bounds: None, or `(low, high)`.
        steps: steps of the gradient attacks.
        targets: classes per input for APGD and FAB; fewer where the model has fewer.
        queries: queries of Square.
        seed: int.
        batch_size: inputs per evaluation.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import AutoAttack
    >>> from tf_lyapunov.theory.balls import L2
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    >>> result = AutoAttack(L2([0.9, 1.1]), queries=20)(model, [[1.0, 0.0], [1.0, 0.0]])
    >>> result.success.tolist(), result.found_by.tolist()
    ([False, True], ['', 'APGD-CE'])

    Reference:
        Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
        parameter-free attacks", ICML 2020, section 6.
    """

    def __init__(
        self,
        radius: Ball,
        *,
        bounds=None,
        steps: int = 100,
        targets: int = 9,
        queries: int = 5000,
        seed: int = 0,
        batch_size: int = 256,
    ):
        if not isinstance(radius, Ball):
            raise TypeError(
                "`radius` must be a ball, such as L2(0.3) or Linf(8/255). "
                f"Received: radius={radius!r}."
            )
        common = dict(bounds=bounds, seed=checked_seed(seed), batch_size=batch_size)
        gradient = dict(steps=steps, **common)
        super().__init__(
            {
                "APGD-CE": APGD(radius, **gradient),
                "APGD-T": APGD(radius, loss="dlr", classes=targets, **gradient),
                "FAB-T": FAB(radius, classes=targets, **gradient),
                "Square": Square(radius, queries=queries, **common),
            },
            survivors_only=True,
        )

    def __repr__(self):
        return f"AutoAttack({self.ball!r})"


class _Found:
    """What is known so far, and which attacks on which chunks are done."""

    def __init__(self, arrays, found_by, done, notes):
        self.arrays, self.found_by, self.done, self.notes = arrays, found_by, done, notes

    @classmethod
    def empty(cls, x, stages):
        n = len(x)
        arrays = {
            "x_adv": x.copy(),
            "success": np.zeros(n, bool),
            "distance": np.full(n, np.nan),
            "labels": np.zeros(n, np.int64),
            "predictions_adv": np.zeros(n, np.int64),
            "margins": np.full(n, np.nan),
            "loss": np.full(n, np.nan),
            "zero_gradient": np.zeros(n, bool),
        }
        return cls(arrays, np.full(n, "", object), np.zeros(stages, bool), [])

    def merge(self, rows, result, name, first):
        """Keep the nearer success, else the input that came closer to success."""
        known = {key: values[rows] for key, values in self.arrays.items()}
        nearer = result.success & ~(known["distance"] <= result.distance)
        ahead = result.margins - known["margins"]
        closer = (ahead > 0) if result.targeted else (ahead < 0)
        better = first | nearer | (~result.success & ~known["success"] & closer)
        for key in _ARRAYS:
            self.arrays[key][rows[better]] = getattr(result, key)[better]
        stuck = (known["zero_gradient"] | result.zero_gradient) & ~self.arrays["success"][rows]
        self.arrays["zero_gradient"][rows] = stuck
        who = np.where(result.distance == 0, "clean", name)
        won = better & result.success
        self.found_by[rows[won]] = who[won]
        for note in result.notes:
            text = f"{name}: {note}"
            self.notes += [] if text in self.notes else [text]

    def save(self, path, key):
        if path is None:
            return
        names = sorted(set(self.found_by.tolist()))
        header = {"format": _FORMAT, "key": key, "names": names, "notes": self.notes}
        number = {name: i for i, name in enumerate(names)}
        buffer = io.BytesIO()
        np.savez(
            buffer,
            **self.arrays,
            found_by=np.array([number[name] for name in self.found_by], np.int64),
            done=self.done,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
        )
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path, key, stages):
        """What `path` holds; None without a file."""
        if path is None or not Path(path).exists():
            return None

        def refuse(reason, error):
            raise ValueError(reason) from error

        try:
            content = {name: np.array(a) for name, a in read_arrays(Path(path), refuse).items()}
            header = json.loads(content.pop("header").tobytes())
            numbers, done = content.pop("found_by"), content.pop("done")
            names = np.array(header["names"], object)[numbers]
            fits = header["format"] == _FORMAT and set(content) == set(_ARRAYS)
            fits = fits and done.shape == (stages,)
            same = header["key"] == key
        except (OSError, EOFError, LookupError, ValueError, TypeError) as error:
            raise ValueError(f"`state` is no attack state. Received: {path} ({error}).") from None
        if not same or not fits:
            raise ValueError(
                "`state` belongs to another model, other data or another ensemble. Name a new file "
                f"or delete it. Received: {path}."
            )
        return cls(content, names, done, list(header["notes"]))


def _identity(value) -> bytes:
    """Bytes that tell settings apart, also arrays and balls."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}".encode() + value.tobytes()
    if isinstance(value, Ball):
        return type(value).__name__.encode() + _identity(np.asarray(value.radius))
    if isinstance(value, (tuple, list)):
        return b"(" + b",".join(_identity(part) for part in value) + b")"
    return repr(value).encode()
