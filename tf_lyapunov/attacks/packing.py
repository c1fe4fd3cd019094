"""Several inputs of a model as one row per sample: what may change first, what is held last."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from keras import ops

from tf_lyapunov.program.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Packing:
    """How rows `(n, d)` hold the inputs of a model, those that may change before all others.

    Attributes:
        inputs: `Inputs` of the model.
        chosen: bool per input, those that an attack may change.
        shapes: of one sample, per input.
        dtypes: NumPy names, per input: of the model's inputs.
    """

    inputs: Inputs
    chosen: tuple
    shapes: tuple
    dtypes: tuple

    @classmethod
    def of(cls, inputs, chosen, arrays):
        """For arrays of the model's inputs."""
        dtypes = inputs.dtypes or ("float32",) * len(arrays)
        return cls(inputs, tuple(chosen), tuple(a.shape[1:] for a in arrays), tuple(dtypes))

    @property
    def order(self) -> list[int]:
        """Positions of the inputs in the order of the row."""
        return sorted(range(len(self.shapes)), key=lambda i: not self.chosen[i])

    @property
    def free(self) -> int:
        """Number of leading entries that may change."""
        return sum(math.prod(self.shapes[i]) for i in self.order if self.chosen[i])

    @property
    def width(self) -> int:
        """Length of a row."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def image(self) -> tuple:
        """Shape of the entries that may change: that of the input where it is one."""
        moving = [self.shapes[i] for i in self.order if self.chosen[i]]
        return moving[0] if len(moving) == 1 else (self.free,)

    def rows(self, arrays) -> np.ndarray:
        """float32 rows of arrays, one per input."""
        parts = [np.asarray(arrays[i]).reshape(len(arrays[i]), -1) for i in self.order]
        return np.concatenate([p.astype(np.float32) for p in parts], axis=1)

    def arrays(self, rows) -> list[np.ndarray]:
        """Arrays of the model's inputs, from rows; float32 where the model reads floats."""
        found, start = [None] * len(self.shapes), 0
        for i in self.order:
            size = math.prod(self.shapes[i])
            part = rows[:, start : start + size].reshape(len(rows), *self.shapes[i])
            whole = "int" in self.dtypes[i] or self.dtypes[i] == "bool"
            found[i] = part.astype(self.dtypes[i]) if whole else part
            start += size
        return found

    def called(self, rows):
        """Arrays from rows, as the model is called with them."""
        return self.inputs.called(self.arrays(rows))

    def tensors(self, rows):
        """As `called`, for tensors; no gradient flows to what is held."""
        found, start = [None] * len(self.shapes), 0
        for i in self.order:
            size = math.prod(self.shapes[i])
            part = ops.reshape(rows[:, start : start + size], (-1, *self.shapes[i]))
            part = part if self.chosen[i] else ops.stop_gradient(part)
            found[i] = part if self.dtypes[i] == "float32" else ops.cast(part, self.dtypes[i])
            start += size
        return self.inputs.called(found)

    def box(self, bounds, x):
        """Rows `(1, d)` of `bounds`; a box around the rows `x` for what is held.

        Raises:
            ValueError: if they do not fit the inputs.
        """
        held = x[:, self.free :]
        room = 1 + np.abs(held).max(axis=0, initial=0.0)
        ends = (held.min(axis=0, initial=0.0) - room, held.max(axis=0, initial=0.0) + room)
        try:
            return tuple(
                np.concatenate([self.spread(bound), end]).astype(np.float32)[None]
                for bound, end in zip(bounds, ends, strict=True)
            )
        except ValueError as error:
            shapes = {n: s for n, s in zip(self.inputs.names, self.shapes, strict=True)}
            raise ValueError(
                f"`bounds` must fit the inputs that may change, of shapes {shapes}: {error}"
            ) from None

    def spread(self, bound) -> np.ndarray:
        """Row of a bound: a number, or one number or array for each input that may change."""
        per_input = self._bound_by_position(bound)
        parts = [
            np.broadcast_to(per_input[i], self.shapes[i]).ravel()
            for i in self.order
            if self.chosen[i]
        ]
        return np.concatenate(parts).astype(np.float32)

    def _bound_by_position(self, bound) -> dict:
        """Bound of each input that may change, by position."""
        moving = [i for i, moves in enumerate(self.chosen) if moves]
        names = [self.inputs.names[i] for i in moving]
        if isinstance(bound, dict):
            if not set(names) <= set(bound) or not set(bound) <= set(self.inputs.names):
                raise ValueError(
                    "`bounds` must have one entry for each input that may change, "
                    f"{', '.join(map(repr, names))}. Received: entries "
                    f"{', '.join(map(repr, bound))}."
                )
            return {
                i: np.asarray(bound[name], np.float64)
                for i, name in zip(moving, names, strict=True)
            }
        if np.ndim(bound) == 0:
            return dict.fromkeys(moving, np.asarray(bound, np.float64))
        if len(moving) == 1:
            return {moving[0]: np.asarray(bound, np.float64)}
        raise ValueError(
            "`bounds` of several inputs must be numbers, or dicts with a number or an array for "
            f"each of {', '.join(map(repr, names))}. Received: an array of shape "
            f"{np.shape(bound)}."
        )
