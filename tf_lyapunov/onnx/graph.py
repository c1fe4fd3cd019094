"""A graph of ONNX nodes that the operations of a program write themselves into.

Signals keep the layout that Keras gives them. A transposed signal is a *view* of another one: no
node is made until something needs its entries in that order, functions of every entry and
reductions are applied to what lies beneath it, and two transpositions that undo one another leave
none.
"""

import dataclasses
import hashlib

import numpy as np

from tf_lyapunov.program.operation import EXACT, Signal

BATCH = "batch"


@dataclasses.dataclass(frozen=True)
class Node:
    """One ONNX node: operator, names of inputs (`""` for one that is left out) and of outputs."""

    kind: str
    inputs: tuple
    outputs: tuple
    attributes: dict
    name: str


class Graph:
    """Nodes, constants and inputs under construction.

    Operands of its methods are names of signals, float arrays (which become constants of the
    graph's format, and broadcast against a sample), or tuples of integers.

    Args:
        dtype: `"float32"` or `"float64"`, of every signal.
        opset: version of the standard operators.
    """

    def __init__(self, dtype, opset):
        self.dtype, self.opset = dtype, opset
        self.nodes, self.constants, self.inputs = [], {}, {}
        # View -> (signal beneath, axes): axis i of the view is axis axes[i] of that signal.
        self.views = {}
        self.scope = ""
        self._shapes, self._names, self._known = {}, set(), {}
        self._labels, self._kinds = {}, {}

    # Names ------------------------------------------------------------------------------------

    def fresh(self, hint):
        """A name that is not in use, like `hint`."""
        name, count = hint, 1
        while name in self._names:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name

    def _within(self, hint):
        return self.fresh(f"{self.scope}/{hint}" if self.scope else hint)

    def label(self, name, hint):
        """Names the node's result beneath a signal after a layer, unless it has such a name."""
        beneath = self.beneath(name)[0]
        if beneath not in self.inputs and beneath not in self._labels:
            self._labels[beneath] = self.fresh(hint)

    def labelled(self, name):
        """The name of a signal in the finished graph."""
        return self._labels.get(name, name)

    # Inputs and constants ---------------------------------------------------------------------

    def input(self, name, shape, dtype):
        """Adds an input of one sample's `shape`; integers keep their type and are cast at once."""
        name = self.fresh(name)
        kind = dtype if "int" in dtype else self.dtype
        self.inputs[name] = (kind, tuple(shape))
        found = name
        if kind != self.dtype:
            found = self.node("Cast", name, to=self.dtype)
        self._shapes[found] = (1, *shape)
        return found

    def constant(self, array, hint="constant"):
        """Name of a constant in the graph's format.

        Raises:
            ValueError: for a finite number that the format cannot hold.
        """
        exact = np.asarray(array, np.float64)
        with np.errstate(over="ignore"):
            held = exact.astype(self.dtype)
        if np.any(np.isinf(held) & np.isfinite(exact)):
            largest = float(np.max(np.abs(exact[np.isfinite(exact)])))
            raise ValueError(
                f"Constants must fit the format of the file. Received: {largest:.6g} in "
                f"{self.scope or 'the model'!r} for dtype={self.dtype!r}. Use dtype='float64'."
            )
        return self._held(held, hint)

    def integers(self, values, hint="sizes"):
        """Name of a constant of int64."""
        return self._held(np.asarray(values, np.int64), hint)

    def single(self, values):
        """Name of a constant of float32, whatever the graph's format, which some operands are."""
        return self._held(np.asarray(values, np.float32), "scales")

    def _held(self, array, hint):
        array = np.array(array, order="C")
        key = (array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._known:
            self._known[key] = self._within(hint)
            self.constants[self._known[key]] = array
        return self._known[key]

    def in_attribute(self, number):
        """Whether a node's attribute, a float32, holds a number as well as the graph's format."""
        return self.dtype == "float32" or float(np.float32(number)) == float(number)

    @property
    def is_double(self):
        """Whether it computes in float64, for which onnxruntime has fewer operators."""
        return self.dtype == "float64"

    # Nodes ------------------------------------------------------------------------------------

    def node(self, kind, *operands, count=1, **attributes):
        """Adds a node; returns the name of its output, or a list of several."""
        inputs = tuple(self._operand(o) for o in operands)
        hint = kind.lower()
        outputs = [self._within(hint) for _ in range(count)]
        attributes = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(Node(kind, inputs, tuple(outputs), attributes, self._within(kind)))
        return outputs[0] if count == 1 else outputs

    def _operand(self, operand):
        if isinstance(operand, str):
            return self.laid_out(operand)
        if isinstance(operand, tuple) or (
            isinstance(operand, np.ndarray) and operand.dtype.kind == "i"
        ):
            return self.integers(operand)
        return self.constant(operand)

    def laid_out(self, name):
        """Name of a signal that is no view."""
        if name not in self.views:
            return name
        beneath, axes = self.views[name]
        key = ("Transpose", beneath, axes)
        if key not in self._known:
            self._known[key] = self.node("Transpose", beneath, perm=axes)
            if name in self._shapes:
                self._shapes[self._known[key]] = self._shapes[name]
        return self._known[key]

    def beneath(self, name):
        """`(signal, axes)` of a view; of another signal itself and None."""
        return self.views.get(name, (name, None))

    def transposed(self, name, axes):
        """A view of a signal whose axis i is the signal's axis axes[i], batch axis included."""
        beneath, before = self.beneath(name)
        axes = tuple(axes) if before is None else tuple(before[a] for a in axes)
        return self._view(beneath, axes)

    def _view(self, beneath, axes):
        if axes is None or axes == tuple(range(len(axes))):
            return beneath
        key = ("view", beneath, axes)
        if key not in self._known:
            self._known[key] = self._within("view")
            self.views[self._known[key]] = (beneath, axes)
        return self._known[key]

    def below(self, name, axes):
        """The signal beneath a view, where its axes lie there, and a function that goes back.

        Args:
            name: of a signal.
            axes: tuple of axes of that signal.

        Returns:
            `(signal, axes, back)`; `back` makes a view of what has the same axes as the signal.
        """
        beneath, held = self.beneath(name)
        if held is None:
            return name, tuple(axes), lambda result: result
        return beneath, tuple(held[a] for a in axes), lambda result: self._view(result, held)

    def pointwise(self, kind, *operands, **attributes):
        """A node whose operands broadcast against one another, beneath a view that they share."""
        signals = [o for o in operands if isinstance(o, str)]
        held = {self.beneath(s)[1] for s in signals}
        axes = next(iter(held)) if len(held) == 1 else None
        if axes is None:
            return self.node(kind, *operands, **attributes)
        back = tuple(np.argsort(axes))

        def turned(operand):
            if isinstance(operand, str):
                return self.beneath(operand)[0]
            operand = np.asarray(operand, np.float64)
            if operand.ndim == 0:
                return operand
            full = operand.reshape((1,) * (len(axes) - operand.ndim) + operand.shape)
            full = np.transpose(full, back)
            return full.reshape(full.shape[1:])  # the batch axis

        return self._view(self.node(kind, *map(turned, operands), **attributes), axes)

    def reshape(self, name, shape):
        """The same entries with another shape of a sample."""
        return self.node("Reshape", name, (0, *shape))

    def join(self, names, axis):
        """Concatenation along an axis, batch axis 0."""
        held = {self.beneath(n)[1] for n in names}
        if len(held) > 1 or None in held:
            return self.node("Concat", *names, axis=axis)
        (axes,) = held
        below = [self.beneath(n)[0] for n in names]
        return self._view(self.node("Concat", *below, axis=axes[axis]), axes)

    def part(self, name, axis, start, stop, step=1):
        """Entries start, start + step, … before `stop` along an axis."""
        below, (axis,), back = self.below(name, (axis,))
        return back(self.node("Slice", below, (start,), (stop,), (axis,), (step,)))

    def halves(self, name, axis):
        """The two halves of an operation's input along an axis."""
        size = self.sizes(name)[axis - 1]
        return self.part(name, axis, 0, size // 2), self.part(name, axis, size // 2, size)

    def reduce(self, kind, name, axes, keepdims):
        """`"Sum"`, `"Mean"`, `"Max"`, `"Min"`, `"L1"` or `"L2"` over axes, batch axis 0."""
        below, places, back = self.below(name, axes)
        if not places:
            return name
        places = tuple(sorted(places))
        if kind == "Sum" or self.opset >= 18:
            result = self.node(f"Reduce{kind}", below, places, keepdims=int(keepdims))
        else:
            result = self.node(f"Reduce{kind}", below, axes=places, keepdims=int(keepdims))
        held = self.beneath(name)[1]
        if keepdims or held is None:
            return back(result)
        left = [a for a in held if a not in places]
        return self._view(result, tuple(int(i) for i in np.argsort(np.argsort(left))))

    # Operations -------------------------------------------------------------------------------

    def apply(self, operation, names):
        """Writes an operation of a program; returns the name of its output.

        Its shape is that of the operation's own result.
        """
        name = operation.write(self, list(names))
        with np.errstate(all="ignore"):
            signals = [Signal(np.zeros(self._shapes[n])) for n in names]
            self._shapes[name] = operation.forward(signals, EXACT).value.shape
        return name

    def sizes(self, name):
        """Shape of a sample of an operation's input."""
        return self._shapes[name][1:]

    def output(self, name):
        """The signal of the graph's output: no view and no input, under a name of its own."""
        found = self.laid_out(name)
        if found in self.inputs:
            found = self.node("Identity", found)
            self._shapes[found] = self._shapes[name]
        self.label(found, "output")
        return found

    def needed(self, outputs):
        """Nodes and constants that these signals depend on, in order.

        Returns:
            `(list of Node, dict of arrays)` with their names in the finished graph.
        """
        wanted, kept = set(outputs), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.outputs):
                wanted.update(node.inputs)
                kept.append(node)
        constants = {n: a for n, a in self.constants.items() if n in wanted}
        nodes = [
            dataclasses.replace(
                node,
                inputs=tuple(map(self.labelled, node.inputs)),
                outputs=tuple(map(self.labelled, node.outputs)),
            )
            for node in reversed(kept)
        ]
        return nodes, constants
