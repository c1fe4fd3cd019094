"""Inputs of a model with several: a list, tuple or dict of arrays, and which of them may change."""

import dataclasses
from collections.abc import Mapping

import keras
import numpy as np

from tf_lyapunov.program.graph import is_graph


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a Keras model, in the order of `model.inputs`.

    Attributes:
        model: name of the model.
        names: keys of the dict that the model was built with, or names of its `Input` layers.
        structure: how the model takes them: a tensor, a list, tuple or dict of tensors, or None
            where that is not known (subclassed models, which take one array).
        shapes: with the batch axis, or None.
        dtypes: Keras names, or None.
    """

    model: str
    names: tuple
    structure: object = dataclasses.field(repr=False, compare=False)
    shapes: tuple | None = None
    dtypes: tuple | None = None

    @classmethod
    def of(cls, model):
        """Of a model; one that is not built, or no graph, counts as one with a single input."""
        name = getattr(model, "name", type(model).__name__)
        if not (isinstance(model, keras.Model) and model.built and is_graph(model)):
            return cls(name, ("input",), None)
        tensors = list(model.inputs)
        structure = getattr(model, "_inputs_struct", None)
        if structure is None:
            structure = tensors[0]
        keys = {}
        if isinstance(structure, Mapping):
            keys = {id(t): str(key) for key, t in structure.items()}
        return cls(
            name,
            tuple(keys.get(id(t), t.name) for t in tensors),
            structure,
            tuple(tuple(t.shape) for t in tensors),
            tuple(keras.backend.standardize_dtype(t.dtype) for t in tensors),
        )

    def __len__(self):
        return len(self.names)

    @property
    def several(self):
        """Whether there is more than one."""
        return len(self.names) > 1

    @property
    def _is_deep(self):
        """Whether some input is a list, tuple or dict of tensors itself."""
        if not keras.tree.is_nested(self.structure):
            return False
        held = self.structure.values() if isinstance(self.structure, Mapping) else self.structure
        return any(keras.tree.is_nested(part) for part in held)

    def called(self, arrays):
        """Arrays or tensors, one per input, as the model is called with them."""
        if not keras.tree.is_nested(self.structure):
            return arrays[0]
        return keras.tree.pack_sequence_as(self.structure, list(arrays))

    def flat(self, x, name="x"):
        """Arrays of one batch, one per input, in the order of the model.

        Args:
            x: for one input an array (n, …), or a dict with its name; for several a list or tuple
                of arrays in the order of the model's inputs, or a dict of arrays by name.
            name: of the argument, for messages.

        Returns:
            List of arrays of n rows each.

        Raises:
            ValueError: for another number of arrays, other names, ragged rows, differing lengths.
            TypeError: for a single array where the model has several inputs.
        """
        if isinstance(x, Mapping) and self.structure is None:
            raise TypeError(
                "A model with a `call` of its own is read with one array. Received: a dict for "
                f"model {self.model!r}. Wrap it: `inputs = {{name: keras.Input(...), ...}}; "
                "keras.Model(inputs, model(inputs))`."
            )
        if self._is_deep:
            found = self._as_built(x, name)
        elif isinstance(x, Mapping):
            found = self._by_name(x, name)
        elif not self.several:
            found = [x]
        elif not isinstance(x, (list, tuple)):
            kind = f"one array of shape {np.shape(x)}" if _is_array(x) else type(x).__name__
            raise TypeError(
                f"`{name}` must hold one array per input of the model. Received: {kind} for model "
                f"{self.model!r}. {self._advice()}"
            )
        elif _has_unsorted_keys(self.structure):
            raise ValueError(
                f"`{name}` must be a dict, since the model was built with one whose keys are not "
                f"in alphabetical order. Received: a {type(x).__name__}. Pass a dict with the keys "
                f"{', '.join(map(repr, self.names))}."
            )
        else:
            found = self._in_order(x, name)
        labels = [f"{name}[{n!r}]" for n in self.names] if self.several else [name]
        arrays = [to_array(a, label) for a, label in zip(found, labels, strict=True)]
        if self.several:
            self._check(arrays, name)
        return arrays

    def _by_name(self, x, name):
        missing = [n for n in self.names if n not in x]
        unknown = [k for k in x if k not in self.names]
        if missing or unknown:
            raise ValueError(
                f"`{name}` must have the names of the model's inputs as its keys. Received: "
                + "; ".join(
                    f"{what} {', '.join(map(repr, keys))}"
                    for what, keys in (("missing", missing), ("unknown", unknown))
                    if keys
                )
                + f". {self._advice()}"
            )
        return [x[n] for n in self.names]

    def _in_order(self, x, name):
        if len(x) != len(self):
            raise ValueError(
                f"`{name}` must hold one array per input of the model. Received: {len(x)} arrays "
                f"for {len(self)} inputs of model {self.model!r}. {self._advice()}"
            )
        return list(x)

    def _as_built(self, x, name):
        """Leaves of a nested structure, which must be that of the model."""
        try:
            keras.tree.assert_same_structure(
                keras.tree.lists_to_tuples(self.structure), keras.tree.lists_to_tuples(x)
            )
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"`{name}` must be nested as the inputs of the model are. Received: another "
                f"structure for model {self.model!r}, whose inputs are "
                f"{keras.tree.map_structure(lambda t: t.name, self.structure)}."
            ) from error
        return keras.tree.flatten(x)

    def _check(self, arrays, name):
        lengths = [len(a) if a.ndim else None for a in arrays]
        if None in lengths or len(set(lengths)) != 1:
            shapes = ", ".join(f"{n!r} {a.shape}" for n, a in zip(self.names, arrays, strict=True))
            raise ValueError(
                f"All arrays of `{name}` must have one row per input, hence equally many. "
                f"Received: {shapes}. The first axis counts the inputs."
            )

    def _advice(self):
        names = ", ".join(map(repr, self.names))
        return f"Pass a list in the order of its inputs, {names}, or a dict with these keys."

    def like(self, x, arrays):
        """Arrays, one per input, in the structure of `x` as `flat` took it."""
        if self._is_deep:
            return self.called(arrays)
        if isinstance(x, Mapping):
            by_name = dict(zip(self.names, arrays, strict=True))
            return {key: by_name[key] for key in x}
        if not self.several:
            return arrays[0]
        return tuple(arrays) if isinstance(x, tuple) else list(arrays)

    def chosen(self, perturbed):
        """Which inputs may change, bool per input.

        Args:
            perturbed: None for all, the name or the position of one, or a list of them.

        Raises:
            ValueError: for an input that the model does not have, one that is named twice, or none.
            TypeError: for anything else.
        """
        if perturbed is None:
            return (True,) * len(self)
        asked = perturbed if isinstance(perturbed, (list, tuple)) else [perturbed]
        positions = [self._position(one, perturbed) for one in asked]
        if not positions or len(set(positions)) != len(positions):
            raise ValueError(
                "`perturbed` must name at least one input, and each once. Received: "
                f"perturbed={perturbed!r}. Leave it out to perturb all inputs together."
            )
        return tuple(i in positions for i in range(len(self)))

    def _position(self, one, perturbed):
        if isinstance(one, str):
            if one in self.names:
                return self.names.index(one)
        elif isinstance(one, (int, np.integer)) and not isinstance(one, bool):
            if -len(self) <= one < len(self):
                return int(one) % len(self)
        else:
            raise TypeError(
                "`perturbed` must be None, the name or the position of an input, or a list of "
                f"them. Received: perturbed={perturbed!r}."
            )
        raise ValueError(
            "`perturbed` must be an input of the model. Received: "
            f"perturbed={perturbed!r} for model {self.model!r} with the inputs "
            f"{', '.join(map(repr, self.names))} (positions 0 to {len(self) - 1})."
        )

    def chosen_names(self, chosen):
        """Names of the chosen inputs; None where all are."""
        if all(chosen):
            return None
        return tuple(n for n, moves in zip(self.names, chosen, strict=True) if moves)


def built_on(model, x):
    """The model, built on the shape of an array of inputs if it is not built yet.

    Other kinds of data leave it as it is, and what reads it says so.
    """
    if isinstance(model, keras.Model) and not model.built and _is_array(x) and np.ndim(x) > 1:
        if isinstance(model, keras.Sequential):
            model.build((None, *np.shape(x)[1:]))
        else:
            model(x[:1])
    return model


def to_array(value, name="x"):
    """NumPy array of a tensor, an array or nested lists.

    Raises:
        ValueError: for rows of differing lengths, which no array can hold.
    """
    if keras.ops.is_tensor(value):
        return keras.ops.convert_to_numpy(value)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise _ragged(name) from error
    if array.dtype == object:
        raise _ragged(name)
    return array


def _ragged(name):
    return ValueError(
        f"`{name}` must be an array of numbers: all of its rows must have the same length. "
        "Received: a ragged list, or entries that are no numbers. Pad or cut the rows, or pass a "
        "dict of arrays by input name if the model has several inputs."
    )


def _is_array(x):
    return hasattr(x, "__array__") or keras.ops.is_tensor(x)


def _has_unsorted_keys(structure):
    """Keras itself takes no list for such a model, whose order it could not know."""
    if not isinstance(structure, Mapping):
        return False
    return list(structure) != sorted(structure)
