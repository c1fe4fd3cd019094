"""A graph as an ONNX file states it, in plain values."""

import dataclasses

import numpy as np


class NotRead(Exception):
    """An operator, or what it is asked to do, has no place in a program. Holds the reason."""


class BadGraph(ValueError):
    """A file that contradicts itself, or that asks for more than it holds."""


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        name: str.
        shape: as the file states it: integers, None for the axis that counts samples.
        dtype: NumPy name.
        batch: position of the axis that counts samples, or None where the graph takes one sample.
    """

    name: str
    shape: tuple
    dtype: str
    batch: int | None = 0

    @property
    def sample_shape(self):
        """Shape of one sample."""
        if self.batch is None:
            return self.shape
        return self.shape[: self.batch] + self.shape[self.batch + 1 :]


@dataclasses.dataclass(frozen=True)
class Declared:
    """A value with the shape that the file declares: integers, names or None; or None for none."""

    name: str
    shape: tuple | None
    dtype: str


@dataclasses.dataclass(frozen=True)
class OnnxNode:
    """One node.

    Attributes:
        name: as in the file, or made of its operator and first output.
        kind: operator.
        domain: `""` for ONNX's own.
        inputs, outputs: names; `""` for what is left out.
        attributes: dict of plain values and arrays.
        since: version of the operator set that its meaning is from, None where it is unknown.
    """

    name: str
    kind: str
    domain: str
    inputs: tuple
    outputs: tuple
    attributes: dict = dataclasses.field(repr=False)
    since: int | None = None

    def get(self, name, default=None):
        """An attribute or its default."""
        return self.attributes.get(name, default)

    @property
    def what(self):
        """For messages."""
        domain = f" of domain {self.domain!r}" if self.domain else ""
        kind = self.kind if self.kind.isidentifier() else repr(self.kind)
        return f"node {self.name!r}, operator {kind}{domain}"


@dataclasses.dataclass(frozen=True)
class OnnxGraph:
    """A checked graph.

    Attributes:
        nodes: tuple of `OnnxNode`, each behind those it reads.
        constants: dict from names to arrays.
        inputs, outputs: tuples of `Declared`, constants left out.
        declared: dict from names of values within to their declared shapes.
        opset: version of ONNX's own operator set.
        producer: name of the tool that wrote it.
        model: the `onnx.ModelProto`, with all of its data inside.
    """

    nodes: tuple
    constants: dict[str, np.ndarray]
    inputs: tuple
    outputs: tuple
    declared: dict
    opset: int
    producer: str
    model: object = dataclasses.field(repr=False)


def needed(nodes, targets):
    """The nodes that some values depend on, in their order.

    Args:
        nodes: `OnnxNode` or `NodeProto`, each behind those it reads.
        targets: names of the values.
    """
    wanted, found = set(targets), []
    for node in reversed(nodes):
        given = node.outputs if isinstance(node, OnnxNode) else node.output
        if wanted.intersection(given):
            wanted.update(node.inputs if isinstance(node, OnnxNode) else node.input)
            found.append(node)
    return found[::-1]


def first_line(error, width=300):
    """The first line of an error's text, in printable characters: files put their words into it."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:width].rstrip(".")
    return "".join(c if c.isprintable() else "?" for c in text)
