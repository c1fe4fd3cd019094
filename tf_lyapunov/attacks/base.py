"""What every attack shares: input checks, the model's own verdict, and an honest result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from keras import ops

from tf_lyapunov.attacks import backend
from tf_lyapunov.attacks.inputs import (
    checked_bounds,
    packed_inputs,
    positive_int,
)
from tf_lyapunov.attacks.logits import LogitsView, cross_entropy, logits_view, margin
from tf_lyapunov.attacks.results import AttackResult
from tf_lyapunov.losses.classes import class_numbers
from tf_lyapunov.program.holding import model_of
from tf_lyapunov.theory.balls import Ball


@dataclass(frozen=True)
class Problem:
    """Correctly classified inputs to attack, samples flattened to rows.

    Attributes:
        view: the model's logits.
        x: float32 `(n, d)`.
        shape: shape of one sample.
        labels: int32 `(n,)`.
        radius: float64 `(n,)`, infinite where every perturbation is allowed.
        bounds: None, or float32 arrays `(1, d)` with the least and greatest allowed inputs.
        index: int `(n,)`, position of each row in the caller's data (for random starts that do
            not depend on the batching).
        total: number of samples in the caller's data.
        classes: number of classes, at least two.
        reached: maps rows `(n, d)` to whether the model itself decides wrongly there (or for the
            target), bool `(n,)`.
        report: called with a text and a number of rows done, for progress.
        free: number of leading entries of a row that may change; the others are held fixed.
        image: shape of those that may.
    """

    view: LogitsView
    x: np.ndarray
    shape: tuple
    labels: np.ndarray
    radius: np.ndarray
    bounds: tuple | None
    index: np.ndarray
    total: int
    classes: int
    reached: Callable[[np.ndarray], np.ndarray]
    report: Callable[..., None]
    free: int
    image: tuple

    @property
    def box(self) -> tuple:
        """`bounds`, or arrays that nobody reads."""
        return self.bounds or (np.zeros((1, self.x.shape[1]), np.float32),) * 2

    def compiled(self, options: tuple, loop: Callable, arguments: str) -> Callable:
        """`loop(function, shape)`, compiled once per model, sample shape and options.

        Args:
            options: what the loop depends on besides; part of the cache's key.
            loop: maps the logits function and the sample shape to a function of tensors.
            arguments: one letter per argument: x rows `(n, d)`, l labels `(n,)`, c classes
                `(n, k)`, f numbers `(n,)`, b flags `(n,)`, w box `(1, d)`, s numbers `(k,)`,
                i an integer, t a table `(n, k, m)`.
        """
        cache, key = self.view.compiled, (options, self.shape)
        if key not in cache:
            width = math.prod(self.shape)
            kinds = {
                "x": ("float32", (None, width)),
                "l": ("int32", (None,)),
                "c": ("int32", (None, None)),
                "f": ("float32", (None,)),
                "b": ("bool", (None,)),
                "w": ("float32", (1, width)),
                "s": ("float32", (-1,)),  # free, and not the batch
                "i": ("int32", ()),
                "t": ("float32", (None, None, None)),
            }
            function = loop(self.view.function, self.shape)
            kinds = [kinds[letter] for letter in arguments]
            cache[key] = backend.compiled(function, self.view.variables, kinds)
        return cache[key]


class Attack:
    """Base class of attacks inside a norm ball; calling it returns an `AttackResult`.

    The call checks its inputs, takes out samples that are misclassified already (successes at
    distance zero), lets the subclass attack the others (`_perturb`), pulls iterates that rounding
    pushed over the radius back inside, and then asks the model itself (`predict_on_batch`) about
    the float32 result.

    Args:
        radius: `L2(...)` or `Linf(...)`, with one radius or one per sample.
        bounds: None (no clipping, as certificates over all of ℝⁿ demand), or `(low, high)`: numbers
            or arrays that broadcast to one sample, or dicts of them by input name.
        targeted: whether labels are targets to reach instead of labels to leave.
        batch_size: inputs per evaluation.
    """

    def __init__(self, radius: Ball, *, bounds=None, targeted=False, batch_size=256):
        if not isinstance(radius, Ball):
            raise TypeError(
                "`radius` must be a ball, such as L2(0.3) or Linf(8/255). "
                f"Received: radius={radius!r}."
            )
        self.ball, self.norm = radius, type(radius)
        self.bounds = checked_bounds(bounds)
        self.targeted = bool(targeted)
        self.batch_size = positive_int("batch_size", batch_size)

    def __call__(self, model, x, y=None, *, perturbed=None, progress=None) -> AttackResult:
        """Attack a classifier.

        Args:
            model: Keras model with one output of logits, `(batch, classes)`, or `(batch, 1)` for
                two classes. Softmax and sigmoid heads are looked through.
            x: array `(n, ...)` of inputs, converted to float32; for a model with several inputs a
                list, tuple or dict of arrays, as Keras takes them.
            y: labels as ints `(n,)` or one-hot `(n, classes)`; targets if the attack is targeted.
                Default: the model's own predictions.
            perturbed: which input of several is changed: its name or position, or a list of them,
                while the others are held fixed. Default: all, in the norm of their concatenation.
            progress: called with a line of text after each batch.

        Returns:
            An `AttackResult`.

        Raises:
            TypeError: if `model` is no Keras model or `x` holds no numbers.
            ValueError: for NaN or infinite inputs or outputs, wrong shapes, labels out of range,
                inputs outside `bounds`, or a model whose probabilities cannot be looked through.
        """
        model = model_of(model)
        given, (x, packing) = x, packed_inputs(model, x, perturbed)
        result = self.on_rows(model, x, y, np.arange(len(x)), len(x), progress, packing)
        return unpacked(result, packing, given)

    def on_rows(self, model, x, y, rows, total, progress=None, packing=None) -> AttackResult:
        """Attack some of the caller's inputs, with the radii and random numbers of their positions.

        Args:
            model: as for a call.
            x: float32 array `(n, ...)`, checked.
            y: labels of these inputs, or None.
            rows: int array `(n,)`, their positions in the caller's data.
            total: number of inputs in the caller's data.
            progress: as for a call.
            packing: `Packing` if `x` holds rows of several inputs.

        Returns:
            An `AttackResult` of these inputs, `x_adv` being rows.
        """
        if y is None and self.targeted:
            raise ValueError("A targeted attack needs its targets. Received: y=None.")
        radius = self._radii(total)[rows]
        bounds = self._bounds_of(x, packing)
        free = None if packing is None else packing.free
        keras_model, model = model, model if packing is None else _Packed(model, packing)
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
        view = logits_view(keras_model, packing)
        view.check_outputs(
            model,
            outputs,
            x,
            lambda z: self._own_outputs(model, z),
            lambda z: self._logits(view, z),
            free,
        )
        predictions = _predictions(outputs, view.head)
        labels = predictions if y is None else class_numbers(y, len(x), outputs.shape[1])
        todo = np.flatnonzero(~self._reached(predictions, labels))
        x_adv, stuck = x.copy(), np.zeros(len(x), bool)
        if len(todo):
            flat = x[todo].reshape(len(todo), -1)
            own = labels[todo].astype(np.int32)
            shape = x.shape[1:]

            def reached(points):
                everywhere = x.copy()
                everywhere[todo] = points.reshape((-1, *shape))
                if free is not None:
                    everywhere[:, free:] = x[:, free:]
                outputs = self._own_outputs(model, everywhere)
                decided = self._reached(_predictions(outputs, view.head), labels)
                return (decided & np.isfinite(outputs).all(axis=1))[todo]

            def report(done, what=self):
                if progress is not None:
                    progress(f"{what}: {done} of {len(todo)} inputs")

            problem = Problem(
                view=view,
                x=flat,
                shape=shape,
                labels=own,
                radius=radius[todo],
                bounds=bounds,
                index=rows[todo],
                total=total,
                classes=max(2, outputs.shape[1]),
                reached=reached,
                report=report,
                free=flat.shape[1] if free is None else free,
                image=shape if packing is None else packing.image,
            )
            found, stuck[todo] = self._perturb(problem)
            if free is not None:
                found[:, free:] = flat[:, free:]
            x_adv[todo] = self._inside(flat, found, radius[todo]).reshape((-1, *x.shape[1:]))
        return self._verified(model, view, x, x_adv, labels, radius, stuck)

    def _radii(self, n) -> np.ndarray:
        return self.ball.per_sample(n)

    def _perturb(self, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
        """Best iterates, float32 `(n, d)`, and where the gradient vanished, bool `(n,)`."""
        raise NotImplementedError

    def _notes(self, classes: int) -> tuple[str, ...]:
        """What is done otherwise than asked for models with so many classes."""
        return ()

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
                self.norm(0.0).norm(x_adv[b].astype(np.float64) - x[b].astype(np.float64))
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
            norm=self.norm,
            ball=self.ball,
            targeted=self.targeted,
            attack=repr(self),
            notes=self._notes(logits.shape[1]),
        )

    def _inside(self, x, x_adv, radius):
        """Pull perturbations that exceed their float64 radius by rounding back inside."""
        unit = self.norm
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

    def _bounds_of(self, x, packing=None):
        if self.bounds is None:
            return None
        if packing is None and isinstance(self.bounds[0], dict):
            raise ValueError(
                "`bounds` by input are for models with several inputs. Received: names "
                f"{', '.join(map(repr, self.bounds[0]))} for one input. Pass numbers or arrays."
            )
        if packing is not None:
            low, high = packing.box(self.bounds, x)
            _check_box(x[:, : packing.free], low[:, : packing.free], high[:, : packing.free])
            return low, high
        try:
            low, high = (
                np.broadcast_to(bound, x.shape[1:]).astype(np.float32) for bound in self.bounds
            )
        except ValueError:
            raise ValueError(
                f"`bounds` must broadcast to one sample, of shape {x.shape[1:]}. Received: bounds "
                f"of shapes {self.bounds[0].shape} and {self.bounds[1].shape}."
            ) from None
        _check_box(x, low, high)
        return low.reshape(1, -1), high.reshape(1, -1)

    def __repr__(self):
        return f"{type(self).__name__}({self.ball!r})"


def unpacked(result, packing, given):
    """A result whose `x_adv` has the structure of the inputs as they were given."""
    if packing is None:
        return result
    arrays = packing.arrays(result.x_adv)
    return dataclasses.replace(result, x_adv=packing.inputs.like(given, arrays))


class _Packed:
    """A model with several inputs, asked with rows."""

    def __init__(self, model, packing):
        self.model, self.packing, self.name = model, packing, model.name

    def predict_on_batch(self, rows):
        return self.model.predict_on_batch(self.packing.called(rows))


def _check_box(x, low, high):
    if np.any(x < low) or np.any(x > high):
        raise ValueError(
            "`x` must lie within `bounds`. Received: values from "
            f"{x.min():g} to {x.max():g}. Pass `bounds=None` to attack without a box."
        )


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
