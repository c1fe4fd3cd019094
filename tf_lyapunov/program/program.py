"""A model as a program: steps in topological order, every constant an explicit value."""

import dataclasses
import hashlib

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.declared import Declared
from tf_lyapunov.program.operation import EXACT, Operation, Precision, Signal
from tf_lyapunov.program.vocabulary import operations_of


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of the model.

    Attributes:
        name: of the call.
        inputs: names of the calls (or inputs) that it reads.
        operations: tuple of `Operation`, the first of which takes all inputs; empty for the
            identity; None where nothing here evaluates the call apart from the model.
        dtype: that it computes in.
        why: why it is not evaluated, or None.
    """

    name: str
    inputs: tuple
    operations: tuple | None
    dtype: str
    why: str | None = None

    @property
    def is_declared(self):
        """Whether Keras evaluates it: a user's own layer, whose gain is declared."""
        return any(isinstance(o, Declared) for o in self.operations or ())


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps in topological order.

    Attributes:
        inputs: names of the inputs.
        steps: tuple of `Step`.
        output: name of the step that makes the output.
        decision: name of a final step whose last operation (softmax, sigmoid) keeps the order of
            the classes and is left out of the logits, or None.
    """

    inputs: tuple
    steps: tuple
    output: str
    decision: str | None = None

    @property
    def declared(self):
        """Names of steps of users' own layers, which Keras evaluates in their own precision."""
        return tuple(step.name for step in self.steps if step.is_declared)

    @property
    def unread(self):
        """Steps that are not evaluated apart from the model."""
        return tuple(step for step in self.steps if step.operations is None)

    def check_read(self):
        """Refuses programs with a step that is not evaluated apart from the model.

        Raises:
            UnsupportedLayerError: naming the step.
        """
        if self.unread:
            step = self.unread[0]
            raise UnsupportedLayerError(
                f"A step is evaluated by the model alone: {step.why} Received: step {step.name!r}."
            )

    def digest(self):
        """SHA-256 of its operations and how they are joined, independent of names and of Keras."""
        state = hashlib.sha256()
        made = {name: i for i, name in enumerate(self.inputs)}
        count = len(made)
        for step in self.steps:
            read = [made[name] for name in step.inputs]
            for operation in step.operations or ():
                state.update(repr(read).encode())
                operation.enter(state)
                read, count = [count], count + 1
            made[step.name] = read[0]
        state.update(repr(made[self.output]).encode())
        return "sha256:" + state.hexdigest()

    def logits(self, x):
        """Logits in float64, apart from any backend but for `declared` steps; see `evaluate`."""
        return self.evaluate(x)[0]

    def evaluate(self, x, kept=()):
        """Logits in float64, and the values of some steps.

        Args:
            x: array (n, …) of the program's one input, or a list with one for each.
            kept: names of steps or inputs.

        Returns:
            `(logits, values)`: float64 (n, classes), and a dict of float64 arrays by name.

        Raises:
            UnsupportedLayerError: naming a step that is not evaluated here.
        """
        self.check_read()
        kept = set(kept)
        given = x if isinstance(x, list) else [x]
        signals = {
            name: Signal(np.asarray(a, np.float64))
            for name, a in zip(self.inputs, given, strict=True)
        }
        values = {name: signals[name].value for name in kept if name in signals}
        last = {name: i for i, step in enumerate(self.steps) for name in step.inputs}
        for i, step in enumerate(self.steps):
            signals[step.name] = run(
                step, [signals[n] for n in step.inputs], EXACT, self._without_end(step)
            )
            if step.name in kept:
                values[step.name] = signals[step.name].value
            if step.name in (self.output, self.decision):
                break
            for name in step.inputs:
                if last[name] == i:
                    signals.pop(name, None)  # large networks hold large signals
        value = signals[step.name if self.steps else self.output].value
        return value.reshape(len(value), -1) if value.ndim == 1 else value, values

    def _without_end(self, step):
        return 1 if step.name == self.decision else 0


def run(step, signals, precision, leave=0):
    """`Signal` of a step, without its last `leave` operations."""
    operations = step.operations[: len(step.operations) - leave]
    for operation in operations:
        signals = [operation.forward(signals, precision)]
    return signals[0]


def read_program(network):
    """The program of a network that `read_network` flattened.

    Args:
        network: `network.Network`.

    Returns:
        `Program`. Steps without an evaluation here say why.
    """
    steps = []
    for call in network.graph.calls:
        operations, why = None, None
        dtype = call.outputs[0].dtype
        if isinstance(call.operation, keras.Layer):
            dtype = call.operation.compute_dtype
        try:
            operations = operations_of(call)
        except UnsupportedLayerError as error:
            why = str(error)
        inputs = tuple(t.producer for t in call.inputs)
        steps.append(Step(call.name, inputs, operations, dtype, why))
    decision = None
    if network.decision_node is not None:
        decision = network[network.decision_node].call
    inputs = tuple(t.producer for t in network.graph.inputs)
    return Program(inputs, tuple(steps), network.graph.output.producer, decision)


def precision_of(step):
    """`Precision` of a step's dtype; integers are exact."""
    known = step.dtype in rounding.UNIT_ROUNDOFF
    return Precision.of(step.dtype) if known else EXACT


__all__ = ["Operation", "Program", "Step", "precision_of", "read_program", "run"]
