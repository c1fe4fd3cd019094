"""What every attack shares: input checks, the model's own verdict, and an honest result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from tf_lyapunov.attacks import backend
from tf_lyapunov.attacks.logits import LogitsView, logits_view
from tf_lyapunov.theory.balls import Ball


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack found, verified on the model itself; failures are reported as failures.

    Attributes:
        x_adv: float32 array like the input. The clean input where it is misclassified already,
            the adversarial input where the attack succeeded, else the attack's best iterate.
        success: bool array `(n,)`: outputs finite, ‖x_adv - x‖ ≤ radius in float64, and the
            model's prediction at `x_adv` wrong (or the target, for targeted attacks).
        distance: float64 array `(n,)`, the ball's norm of `x_adv - x`; NaN without success.
        labels: int array `(n,)`, true labels, or targets.
        predictions_adv: int array `(n,)`, the model's predictions at `x_adv`.
        margins: float64 array `(n,)`, f_y - max_j≠y f_j of the logits at `x_adv`.
        loss: float64 array `(n,)`, the attack's per-sample loss at `x_adv`.
        zero_gradient: bool array `(n,)`: attacked without success, and the loss had a zero or
            non-finite gradient on the way, so that the failure says little about the model.
        ball: the allowed perturbations.
        targeted: whether `labels` were targets.
        attack: description of the attack.
    """

    x_adv: np.ndarray
    success: np.ndarray
    distance: np.ndarray
    labels: np.ndarray
    predictions_adv: np.ndarray
    margins: np.ndarray
    loss: np.ndarray
    zero_gradient: np.ndarray
    ball: Ball
    targeted: bool
    attack: str

    def __len__(self):
        return len(self.success)

    @property
    def success_rate(self) -> float:
        """Share of inputs on which the attack succeeded."""
        return float(np.mean(self.success))

    @property
    def robust_accuracy(self) -> float:
        """Share of inputs on which it did not; accuracy under attack for true labels."""
        return 1.0 - self.success_rate

    def summary(self) -> dict:
        """The result in a few JSON-ready numbers; `median_distance` is None without success."""
        found = self.distance[self.success]
        return {
            "attack": self.attack,
            "n": len(self),
            "targeted": self.targeted,
            "success_rate": self.success_rate,
            "robust_accuracy": self.robust_accuracy,
            "median_distance": float(np.median(found)) if len(found) else None,
            "zero_gradient": int(np.sum(self.zero_gradient)),
        }

    def __str__(self):
        text = f"{self.attack}: {int(np.sum(self.success))} of {len(self)} inputs broken"
        if np.any(self.success):
            text += f", median distance {np.median(self.distance[self.success]):.4g}"
        stuck = int(np.sum(self.zero_gradient))
        return text + (f"; {stuck} failed at a zero gradient" if stuck else "")


@dataclass(frozen=True)
class Problem:
    """Correctly classified inputs to attack, samples flattened to rows.

    Attributes:
        view: the model's logits.
        x: float32 `(n, d)`.
        shape: shape of one sample.
        labels: int32 `(n,)`.
        radius: float64 `(n,)`.
        bounds: None, or float32 arrays `(1, d)` with the least and greatest allowed inputs.
        index: int `(n,)`, position of each row in the caller's data (for random starts that do
            not depend on the batching).
        total: number of samples in the caller's data.
    """

    view: LogitsView
    x: np.ndarray
    shape: tuple
    labels: np.ndarray
    radius: np.ndarray
    bounds: tuple | None
    index: np.ndarray
    total: int


class Attack:
    """Base class of attacks inside a norm ball; calling it returns an `AttackResult`.

    The call checks its inputs, takes out samples that are misclassified already (successes at
    distance zero), lets the subclass attack the others (`_perturb`), pulls iterates that rounding
    pushed over the radius back inside, and then asks the model itself (`predict_on_batch`) about
    the float32 result.

    Args:
        radius: `L2(...)` or `Linf(...)`, with one radius or one per sample.
        bounds: None (no clipping, as certificates over all of ℝⁿ demand), or `(low, high)`: numbers
            or arrays that broadcast to one sample.
        targeted: whether labels are targets to reach instead of labels to leave.
        batch_size: inputs per evaluation.
    """

    def __init__(self, radius: Ball, *, bounds=None, targeted=False, batch_size=256):
        if not isinstance(radius, Ball):
            raise TypeError(
                "`radius` must be a ball, such as L2(0.3) or Linf(8/255). "
                f"Received: radius={radius!r}."
            )
        self.ball = radius
        self.bounds = _checked_bounds(bounds)
        self.targeted = bool(targeted)
        self.batch_size = positive_int("batch_size", batch_size)

    def __call__(self, model, x, y=None) -> AttackResult:
        """Attack a classifier.

        Args:
            model: Keras model with one input and one output of logits, `(batch, classes)`, or
                `(batch, 1)` for two classes. Softmax and sigmoid heads are looked through.
            x: array `(n, ...)` of inputs, converted to float32.
            y: labels as ints `(n,)` or one-hot `(n, classes)`; targets if the attack is targeted.
                Default: the model's own predictions.

        Returns:
            An `AttackResult`.

        Raises:
            TypeError: if `model` is no Keras model or `x` holds no numbers.
            ValueError: for NaN or infinite inputs or outputs, wrong shapes, labels out of range,
                inputs outside `bounds`, or a model whose probabilities cannot be looked through.
        """
        x = _checked_inputs(model, x)
        if y is None and self.targeted:
            raise ValueError("A targeted attack needs its targets. Received: y=None.")
        radius = self.ball.per_sample(len(x))
        bounds = self._bounds_of(x)
        outputs = self._own_outputs(model, x)
        if outputs.ndim != 2:
            raise ValueError(
                "Attacks need one row of logits per input, (batch, classes). "
                f"Received: outputs of shape {outputs.shape}."
            )
        if not np.all(np.isfinite(outputs)):
            raise ValueError(
                "The model's outputs at `x` must be finite. Received: "
                f"{np.sum(~np.isfinite(outputs).all(axis=1))} rows with NaN or infinity."
            )
        view = logits_view(model)
        view.check_outputs(
            model,
            outputs,
            x,
            lambda z: self._own_outputs(model, z),
            lambda z: self._logits(view, z),
        )
        predictions = _predictions(outputs, view.head)
        classes = max(2, outputs.shape[1])
        labels = predictions if y is None else checked_labels(y, len(x), classes)
        todo = np.flatnonzero(~self._reached(predictions, labels))
        x_adv, stuck = x.copy(), np.zeros(len(x), bool)
        if len(todo):
            rows = x[todo].reshape(len(todo), -1)
            own = labels[todo].astype(np.int32)
            shape = x.shape[1:]
            problem = Problem(view, rows, shape, own, radius[todo], bounds, todo, len(x))
            found, stuck[todo] = self._perturb(problem)
            x_adv[todo] = self._inside(rows, found, radius[todo]).reshape((-1, *x.shape[1:]))
        return self._verified(model, view, x, x_adv, labels, radius, stuck)

    def _perturb(self, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
        """Best iterates, float32 `(n, d)`, and where the gradient vanished, bool `(n,)`."""
        raise NotImplementedError

    def _loss(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Per-sample loss from float64 logits; attacks report it."""
        return cross_entropy(logits, labels)

    def _reached(self, predictions, labels):
        return predictions == labels if self.targeted else predictions != labels

    def _verified(self, model, view, x, x_adv, labels, radius, stuck) -> AttackResult:
        outputs = self._own_outputs(model, x_adv)
        logits = outputs if view.head is None else self._logits(view, x_adv)
        finite = np.isfinite(outputs).all(axis=1) & np.isfinite(logits).all(axis=1)
        predictions = _predictions(np.nan_to_num(outputs, nan=-math.inf), view.head)
        distance = np.concatenate(
            [
                type(self.ball)(0.0).norm(x_adv[b].astype(np.float64) - x[b].astype(np.float64))
                for b in self._batches(len(x))
            ]
        )
        success = finite & (distance <= radius) & self._reached(predictions, labels)
        logits = _as_columns(logits)
        with np.errstate(invalid="ignore", over="ignore"):
            margins, loss = margin(logits, labels), self._loss(logits, labels)
        return AttackResult(
            x_adv=x_adv,
            success=success,
            distance=np.where(success, distance, np.nan),
            labels=labels,
            predictions_adv=predictions,
            margins=margins,
            loss=loss,
            zero_gradient=stuck & ~success,
            ball=self.ball,
            targeted=self.targeted,
            attack=repr(self),
        )

    def _inside(self, x, x_adv, radius):
        """Pull perturbations that exceed their float64 radius by rounding back inside."""
        unit = type(self.ball)
        for batch in self._batches(len(x)):
            clean = x[batch].astype(np.float64)
            change = x_adv[batch].astype(np.float64) - clean
            over = np.flatnonzero(unit(0.0).norm(change) > radius[batch])
            if not len(over):
                continue
            # A hair less than the radius, so that the norm's own rounding cannot exceed it.
            change = unit(radius[batch][over] * (1 - 1e-12)).project(change[over])
            rounded = (clean[over] + change).astype(np.float32)
            # Rounding towards the clean input: no entry grows, so no norm does.
            grown = np.abs(rounded - clean[over]) > np.abs(change)
            inwards = np.nextafter(rounded, x[batch][over])
            x_adv[batch.start + over] = np.where(grown, inwards, rounded)
        return x_adv

    def _own_outputs(self, model, x) -> np.ndarray:
        """Outputs of the model itself, by the path of `model.predict`."""
        n, parts = len(x), []
        for batch in self._batches(n):
            rows = x[batch]
            missing = self.batch_size - len(rows)
            if missing and n > self.batch_size:
                # Same shape as the other batches, so that nothing is compiled again.
                rows = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
            parts.append(np.asarray(_single(model.predict_on_batch(rows)))[: len(x[batch])])
        return np.concatenate(parts)

    def _logits(self, view, x) -> np.ndarray:
        key = ("logits", x.shape[1:])
        if key not in view.compiled:

            def evaluate(batch):
                return (ops.cast(view_function(batch), "float32"),)

            view_function = view.function
            view.compiled[key] = backend.compiled(
                evaluate, view.variables, [("float32", (None, *x.shape[1:]))]
            )
        return np.concatenate([view.compiled[key](x[b])[0] for b in self._batches(len(x))])

    def _batches(self, n):
        return [slice(i, min(i + self.batch_size, n)) for i in range(0, n, self.batch_size)]

    def _bounds_of(self, x):
        if self.bounds is None:
            return None
        try:
            low, high = (
                np.broadcast_to(bound, x.shape[1:]).astype(np.float32) for bound in self.bounds
            )
        except ValueError:
            raise ValueError(
                f"`bounds` must broadcast to one sample, of shape {x.shape[1:]}. Received: bounds "
                f"of shapes {self.bounds[0].shape} and {self.bounds[1].shape}."
            ) from None
        if np.any(x < low) or np.any(x > high):
            raise ValueError(
                "`x` must lie within `bounds`. Received: values from "
                f"{x.min():g} to {x.max():g}. Pass `bounds=None` to attack without a box."
            )
        return low.reshape(1, -1), high.reshape(1, -1)

    def __repr__(self):
        return f"{type(self).__name__}({self.ball!r})"


def margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Margin f_y - max_j≠y f_j in float64, negative where the class y is not the largest.

    Args:
        logits: array `(n, classes)`, at least two classes.
        labels: int array `(n,)`.

    Returns:
        float64 array `(n,)`.
    """
    logits = np.array(logits, np.float64)
    own, rows = logits[np.arange(len(logits)), labels], np.arange(len(logits))
    logits[rows, labels] = -math.inf
    return own - logits.max(axis=1)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy -log softmax(f)_y per sample, in float64.

    Args:
        logits: array `(n, classes)`.
        labels: int array `(n,)`.

    Returns:
        float64 array `(n,)`.
    """
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), labels]


def checked_labels(y, n: int, classes: int) -> np.ndarray:
    """Integer labels `(n,)` from ints or one-hot rows.

    Raises:
        ValueError: for another length, values out of range, or rows that are not one-hot.
    """
    y = _to_numpy(y)
    if y.ndim == 2 and y.shape == (n, classes) and classes > 1:
        y = y.astype(np.float64)
        if not (np.all((y == 0) | (y == 1)) and np.all(y.sum(axis=1) == 1)):
            raise ValueError(
                "Two-dimensional `y` must be one-hot: a single 1 per row. Pass class numbers of "
                f"shape ({n},) instead. Received: y of shape {y.shape} with other rows."
            )
        return np.argmax(y, axis=1)
    if y.shape == (n, 1):
        y = y[:, 0]
    if y.shape != (n,):
        raise ValueError(
            f"`y` must have shape ({n},), or ({n}, {classes}) if one-hot. "
            f"Received: y of shape {y.shape}."
        )
    values = y.astype(np.float64)
    if not np.all(np.isfinite(values)) or np.any(values != np.floor(values)):
        raise ValueError("Labels must be whole numbers. Received: fractions, NaN or infinity.")
    if np.any((values < 0) | (values >= classes)):
        raise ValueError(
            f"Labels must lie in [0, {classes - 1}]. Received: labels from {values.min():g} to "
            f"{values.max():g}."
        )
    return values.astype(np.int64)


def positive_int(name: str, value) -> int:
    """`value` as an int, refused unless it is a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer. Received: {name}={value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}.")
    return int(value)


def _predictions(outputs, head):
    if outputs.shape[1] == 1:
        return (outputs[:, 0] > (0.5 if head == "sigmoid" else 0.0)).astype(np.int64)
    return np.argmax(outputs, axis=1)


def _as_columns(logits):
    logits = np.asarray(logits, np.float64)
    if logits.shape[1] == 1:
        return np.concatenate([np.zeros_like(logits), logits], axis=1)
    return logits


def _single(outputs):
    if isinstance(outputs, (list, tuple, dict)):
        raise ValueError(f"Attacks need a model with one output. Received: {len(outputs)} outputs.")
    return outputs


def _to_numpy(values):
    if ops.is_tensor(values):
        return ops.convert_to_numpy(values)
    return np.asarray(values)


def _checked_inputs(model, x) -> np.ndarray:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model. Received: {type(model).__name__}.")
    try:
        x = _to_numpy(x)
        with np.errstate(over="ignore"):
            # A copy: results must not change the caller's data.
            x = np.array(x, dtype=np.float32, order="C")
    except (TypeError, ValueError):
        raise TypeError(
            f"`x` must be an array of numbers, (n, ...). Received: {type(x).__name__}."
        ) from None
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"`x` must hold at least one input, (n, ...). Received: x of shape {x.shape}."
        )
    if not np.all(np.isfinite(x)):
        raise ValueError(
            f"`x` must be finite. Received: {int(np.sum(~np.isfinite(x)))} NaN or infinite values."
        )
    expected = model.input_shape if model.built and hasattr(model, "inputs") else None
    if isinstance(expected, tuple) and all(e is None or isinstance(e, int) for e in expected):
        if len(expected) != x.ndim or any(
            e is not None and e != s for e, s in zip(expected[1:], x.shape[1:], strict=False)
        ):
            raise ValueError(
                f"`x` must have the shape of the model's input, {expected}. "
                f"Received: x of shape {x.shape}."
            )
    return x


def _checked_bounds(bounds):
    if bounds is None:
        return None
    try:
        low, high = (np.asarray(bound, dtype=np.float64) for bound in bounds)
    except (TypeError, ValueError):
        raise TypeError(
            f"`bounds` must be None or a pair (low, high). Received: bounds={bounds!r}."
        ) from None
    if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high)) and np.all(low < high)):
        raise ValueError(
            f"`bounds` must be finite with low < high. Received: bounds=({low}, {high})."
        )
    return low, high
