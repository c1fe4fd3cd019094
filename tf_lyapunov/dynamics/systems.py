"""Recurrent equilibrium networks as NumPy sees them, and the matrices of their step."""

import dataclasses

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.recurrent import RecurrentEquilibrium
from tf_lyapunov.layers.recurrent_cell import RecurrentEquilibriumCell
from tf_lyapunov.theory.sectors import Sector


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """x⁺ = Ax + B₁w + B₂u, v = C₁x + D₁₁w + D₁₂u, w = φ(v), y = C₂x + D₂₁w + D₂₂u, of differences.

    Attributes:
        name: of the layer.
        step: [A B₁ B₂], (states, states + neurons + inputs), as are the next two.
        neurons: [C₁ D₁₁ D₁₂].
        output: [C₂ D₂₁ D₂₂].
        sector: slopes of φ.
        storage: P of a storage xᵀPx to start from, or None.
        multipliers: Λ beside it, or None.
        supply: the supply rate that the layer was made for, or None.
        layer: the Keras layer, or None.

    Example:

    >>> lag = System.linear([[0.5]], [[1.0]], [[1.0]], [[0.0]])
    >>> lag.states, lag.inputs, lag.outputs
    (1, 1, 1)
    """

    name: str
    step: np.ndarray
    neurons: np.ndarray
    output: np.ndarray
    sector: Sector
    storage: np.ndarray | None = None
    multipliers: np.ndarray | None = None
    supply: object = None
    layer: object = None

    @property
    def states(self):
        return len(self.step)

    @property
    def units(self):
        return len(self.neurons)

    @property
    def inputs(self):
        return self.step.shape[1] - self.states - self.units

    @property
    def outputs(self):
        return len(self.output)

    @classmethod
    def linear(cls, a, b, c, d, name="system"):
        """x⁺ = Ax + Bu, y = Cx + Du: no neurons."""
        a, b, c, d = (np.atleast_2d(np.asarray(v, dtype=np.float64)) for v in (a, b, c, d))
        none = np.zeros((0, a.shape[1] + b.shape[1]))
        step, output = np.hstack([a, b]), np.hstack([c, d])
        return cls(name, step, none, output, Sector.linear())


def system_of(layer):
    """The `System` that a built recurrent layer applies at inference, its weights as float64.

    Raises:
        UnsupportedLayerError: if it is no recurrent equilibrium layer of this library.
        ValueError: if it is not built, or a weight is not finite.
    """
    cell = cell_of(layer)
    if cell is None:
        raise UnsupportedLayerError(
            f"{type(layer).__name__} {getattr(layer, 'name', '')!r} has no supply rate that is "
            "known. Supported: RecurrentEquilibrium, and keras.layers.RNN of a "
            "RecurrentEquilibriumCell; not LSTM, GRU, SimpleRNN, Bidirectional or subclasses."
        )
    if not cell.built:
        raise ValueError(
            "A recurrent layer must be built, or its sizes are unknown. Received: unbuilt layer "
            f"{layer.name!r}. Call the model on data first."
        )
    values = cell.effective_values()
    if not all(np.all(np.isfinite(v)) for v in values.values()):
        raise ValueError(
            f"Weights must be finite. Received: NaN or infinity in layer {layer.name!r}. The model "
            "has diverged; no bound on it exists."
        )
    return system_of_values(layer, cell, values)


def system_of_values(layer, cell, values):
    """`System` of effective weights: a dict of float64 arrays, as `cell.effective_values()` is."""
    n, q = cell.states, cell.neurons
    rows = np.vstack([values["recurrent_kernel"], values["neuron_kernel"], values["input_kernel"]])
    output = np.vstack([values["output_kernel"], values["feedthrough_kernel"]]).T
    # Kernels hold v before x⁺, and are transposed.
    neurons, step = rows[:, :q].T, rows[:, q : q + n].T
    e, p = values["implicit"], values["metric"]
    storage = e.T @ np.linalg.solve(p, e)
    return System(
        layer.name, step, neurons, output, cell.sector, (storage + storage.T) / 2,
        values["multipliers"], cell.current_supply, layer,
    )  # fmt: skip


def cell_of(layer):
    """The `RecurrentEquilibriumCell` of a layer of exactly the known kinds, or None."""
    if type(layer) is RecurrentEquilibriumCell:
        return layer
    if type(layer) in (RecurrentEquilibrium, keras.layers.RNN):
        return layer.cell if type(layer.cell) is RecurrentEquilibriumCell else None
    return None
