"""Properties of outputs: what must hold for every input of a region.

A property is kept by what breaks it: a union of sets {y : A y ≤ b}, one or several rows each, rows
being strict where the property itself holds with equality. VNN-LIB states the same sets: `unsat`
there is PROVED here.
"""

import dataclasses
import itertools

import numpy as np

# Sets of a disjunction of conjunctions at most.
_MOST = 10_000
# Parts of a property that are named one by one, at most.
_SHOWN = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Unsafe:
    """The outputs that break a property, {y : A_k y ≤ b_k} for some k, as one table of rows.

    Attributes:
        rows: float64 (r, outputs), the rows of all A_k, one set after the other.
        bounds: float64 (r,), b.
        strict: bool (r,), whether a row is A y < b.
        starts: int (sets,), the first row of each.
    """

    rows: np.ndarray
    bounds: np.ndarray
    strict: np.ndarray
    starts: np.ndarray

    @property
    def set_of(self):
        """Which set each row belongs to, int (r,)."""
        return np.repeat(np.arange(len(self.starts)), self.lengths)

    @property
    def lengths(self):
        """Rows of each set."""
        return np.diff(np.append(self.starts, len(self.rows)))

    def of_rows(self, excess):
        """Largest entry of A y - b per set, for entries per row (n, r): positive outside of it."""
        return np.maximum.reduceat(excess, self.starts, axis=1)

    def margin(self, values):
        """min over sets of max over rows of A y - b, for outputs (n, outputs): how safe they are.

        Example:

        >>> unsafe = Property.classified_as(0).resolved(3)
        >>> unsafe.margin(np.array([[3.0, 1.0, 2.5]])).tolist()
        [0.5]
        """
        return self.of_rows(values @ self.rows.T - self.bounds).min(axis=1)

    def holds(self, lower):
        """Whether lower bounds of A y - b (n, r) keep y outside of every set, bool (n, sets)."""
        outside = np.where(self.strict, lower >= 0, lower > 0)
        return np.logical_or.reduceat(outside, self.starts, axis=1)

    def breaks(self, values, errors=None):
        """Whether outputs lie in one of the sets, bool (n,).

        Args:
            values: float64 (n, outputs).
            errors: float64 (n, outputs); then whether all y within them do, whatever the rounding.
        """
        found = values @ self.rows.T - self.bounds
        if errors is not None:
            size = (np.abs(values) + errors) @ np.abs(self.rows.T) + np.abs(self.bounds)
            unit = 4 * (self.rows.shape[1] + 4) * 2.0**-53
            found = found + (errors @ np.abs(self.rows.T)) * (1 + unit) + unit * size
        inside = np.where(self.strict, found < 0, found <= 0)
        return np.logical_and.reduceat(inside, self.starts, axis=1).any(axis=1)


class Property:
    """What the outputs y of a model must satisfy; `&` joins properties, `|` needs one of two.

    Use `classified_as`, `linear` and `avoids`.

    Example:

    >>> mild = Property.linear([[1.0, 0.0]], 2.0) & Property.linear([[0.0, 1.0]], 3.0)
    >>> print(mild)
    (1 linear inequality) and (1 linear inequality)
    >>> len(mild.resolved(2).starts)
    2
    """

    def __init__(self, make, text, has_labels=False):
        self._make, self._text, self.has_labels = make, text, has_labels

    @classmethod
    def classified_as(cls, label):
        """y_label > y_j for every other j; a single output decides by its sign, labels 0 and 1.

        Args:
            label: int, position of the class among the outputs.
        """
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or label < 0:
            raise ValueError(
                f"`label` must be the number of a class, 0 or larger. Received: label={label!r}."
            )
        label = int(label)

        def make(outputs):
            if label >= max(outputs, 2):
                raise ValueError(
                    "A property must be about outputs that exist. Received: "
                    f"label={label} for a model with {outputs} outputs."
                )
            if outputs == 1:
                rows = np.array([[1.0 if label == 1 else -1.0]])
            else:
                rows = -np.eye(outputs)[np.arange(outputs) != label]
                rows[:, label] = 1.0
            return [(row[None], np.zeros(1), np.zeros(1, bool)) for row in rows]

        return cls(make, f"classified as {label}", has_labels=True)

    @classmethod
    def linear(cls, rows, bounds):
        """C y ≤ d in every row.

        Args:
            rows: float (m, outputs) C, or (outputs,) for one row.
            bounds: float (m,) d, or one number for all rows.
        """
        rows, bounds = _checked(rows, bounds)

        def make(outputs):
            _fits(rows, outputs)
            pairs = zip(rows, bounds, strict=True)
            return [(-c[None], -np.array([d]), np.ones(1, bool)) for c, d in pairs]

        many = "inequality" if len(rows) == 1 else "inequalities"
        return cls(make, f"{len(rows)} linear {many}")

    @classmethod
    def avoids(cls, rows, bounds):
        """Not A y ≤ b in all rows at once: y stays out of a polyhedron, as VNN-LIB states it.

        Args:
            rows: float (m, outputs) A, or (outputs,) for one row.
            bounds: float (m,) b, or one number for all rows.
        """
        rows, bounds = _checked(rows, bounds)

        def make(outputs):
            _fits(rows, outputs)
            return [(rows, bounds, np.zeros(len(rows), bool))]

        return cls(make, f"outside of a set of {len(rows)} inequalities")

    def __and__(self, other):
        if not isinstance(other, Property):
            return NotImplemented
        return Property(
            lambda n: self._make(n) + other._make(n),
            _joined("and", self._text, other._text),
            self.has_labels or other.has_labels,
        )

    def __or__(self, other):
        if not isinstance(other, Property):
            return NotImplemented

        def make(outputs):
            mine, theirs = self._make(outputs), other._make(outputs)
            if len(mine) * len(theirs) > _MOST:
                raise ValueError(
                    f"A property may have {_MOST} unsafe sets at most. Received: "
                    f"{len(mine)}·{len(theirs)} of them. Verify its parts one by one."
                )
            return [
                tuple(np.concatenate(parts) for parts in zip(a, b, strict=True))
                for a, b in itertools.product(mine, theirs)
            ]

        text = _joined("or", self._text, other._text)
        return Property(make, text, self.has_labels or other.has_labels)

    def __str__(self):
        return str(self._text)

    def __repr__(self):
        return f"Property({self._text})"

    def resolved(self, outputs):
        """`Unsafe` for a number of outputs.

        Raises:
            ValueError: if it is about outputs that do not exist.
        """
        sets = self._make(outputs)
        lengths = [len(s[0]) for s in sets]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(int)
        return Unsafe(*(np.concatenate(parts) for parts in zip(*sets, strict=True)), starts)


def _joined(word, *texts):
    """Texts joined by a word; those that it joins already stay side by side, long ones counted."""
    parts = []
    for text in texts:
        held = text if isinstance(text, _Joined) and text.word == word else _Joined(word, (text,))
        parts += held.parts
    return _Joined(word, tuple(parts))


@dataclasses.dataclass(frozen=True)
class _Joined:
    word: str
    parts: tuple

    def __str__(self):
        if len(self.parts) > _SHOWN:
            return f"{'all' if self.word == 'and' else 'one'} of {len(self.parts)} properties"
        return f" {self.word} ".join(f"({part})" for part in self.parts)


def _checked(rows, bounds):
    try:
        rows = np.atleast_2d(np.asarray(rows, np.float64))
        bounds = np.broadcast_to(np.asarray(bounds, np.float64), (len(rows),)).copy()
    except (TypeError, ValueError):
        raise ValueError(
            "A property needs rows of numbers and one bound for each. Received: "
            f"rows of shape {np.shape(rows)}, bounds of shape {np.shape(bounds)}."
        ) from None
    if rows.ndim != 2 or not rows.size:
        raise ValueError(
            f"A property needs rows (m, outputs) with m ≥ 1. Received: shape {rows.shape}."
        )
    if not (np.all(np.isfinite(rows)) and np.all(np.isfinite(bounds))):
        raise ValueError(
            "A property must be made of finite numbers. Received: NaN or infinity. Leave rows out "
            "whose bound is infinite."
        )
    return rows, bounds


def _fits(rows, outputs):
    if rows.shape[1] != outputs:
        raise ValueError(
            "A property must be about the outputs that exist. Received: rows of "
            f"{rows.shape[1]} numbers for a model with {outputs} outputs."
        )
