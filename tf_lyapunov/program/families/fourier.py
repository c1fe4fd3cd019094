"""Convolutions computed frequency by frequency (Cayley, block reflections), and their errors."""

import dataclasses
import math

import numpy as np

from tf_lyapunov.layers.linear import space_to_depth_shape
from tf_lyapunov.layers.orthogonal import CayleyConv2D
from tf_lyapunov.layers.reflector import BlockReflectorConv2D
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.effective import biased, effective_gain, end_of, fused_value
from tf_lyapunov.program.families.moving import Moved, space_to_depth_index
from tf_lyapunov.program.gain import Affine
from tf_lyapunov.program.operation import Operation, Signal, frozen
from tf_lyapunov.program.weights import finite_values
from tf_lyapunov.spectral.orthogonal import fourier_bases

UNIT = rounding.UNIT_ROUNDOFF["float64"]
# Entries of the bases in float64, relative to their largest.
_BASES = 16 * UNIT


@dataclasses.dataclass(frozen=True)
class Fourier(Operation):
    """y = T*·diag(Q)·T x: one matrix per frequency of images with channels last.

    Attributes:
        blocks: float64 (H·(⌊W/2⌋+1), 2a, 2b), `[[R, J], [-J, R]]` for Q = R + iJ.
        sizes: `(H, W)`.
    """

    blocks: np.ndarray
    sizes: tuple

    def forward(self, signals, precision):
        (signal,) = signals
        (high, wide), half = self.sizes, self.sizes[1] // 2 + 1
        across, down, blocks = self._stages()
        n, inputs = len(signal.value), signal.value.shape[-1]
        outputs = self.blocks.shape[-1] // 2
        # The order of `spectral.orthogonal.block_fourier`: images are the columns.
        path = _each(signal, lambda x: x.transpose(2, 1, 0, 3).reshape(wide, -1))
        path = _product(across, path, precision, _BASES)
        path = _each(path, lambda x: x.reshape(half, 2 * high, -1))
        path = _product(down, path, precision, _BASES)
        path = _each(path, lambda x: x.reshape(half, high, 2, n, inputs))
        path = _each(path, lambda x: x.transpose(0, 1, 3, 2, 4).reshape(half * high, n, -1))
        path = _each(path, lambda x: x.swapaxes(-1, -2))
        path = _product(blocks.swapaxes(-1, -2), path, precision, 0.0)
        path = _each(path, lambda x: x.swapaxes(-1, -2).reshape(half, high, n, 2, outputs))
        path = _each(path, lambda x: x.transpose(0, 1, 3, 2, 4).reshape(half, 2 * high, -1))
        path = _product(down.T, path, precision, _BASES)
        path = _each(path, lambda x: x.reshape(2 * half, -1))
        path = _product(across.T, path, precision, _BASES)
        path = _each(path, lambda x: x.reshape(wide, high, n, outputs).transpose(2, 1, 0, 3))
        if path.error is None:
            return path
        # Half formats compute in float32 and round at the end.
        last = precision.unit * (np.abs(path.value) + path.error) + precision.tiny
        return Signal(path.value, path.error + last)

    def _stages(self):
        """Matrices of both axes, and one block per frequency."""
        (high, wide), half = self.sizes, self.sizes[1] // 2 + 1
        wide_cos, wide_sin, tall_cos, tall_sin = fourier_bases(self.sizes)
        across = np.stack([wide_cos.T, wide_sin.T], 1).reshape(-1, wide)
        # (real + i·imag)(cos - i·sin) along the other axis; the rows are pairs (g, part).
        down = np.stack(
            [
                np.concatenate([tall_cos.T, tall_sin.T], axis=1),
                np.concatenate([-tall_sin.T, tall_cos.T], axis=1),
            ],
            axis=1,
        ).reshape(2 * high, 2 * high)
        blocks = self.blocks.reshape(high, half, *self.blocks.shape[1:]).swapaxes(0, 1)
        return across, down, blocks.reshape(half * high, *self.blocks.shape[1:])

    def write(self, graph, names):
        """The same stages, samples first but where every frequency has a matrix of its own."""
        high, half = self.sizes[0], self.sizes[1] // 2 + 1
        across, down, blocks = self._stages()
        inputs, outputs = (n // 2 for n in self.blocks.shape[1:])
        x = graph.transposed(*names, (0, 3, 1, 2))
        x = graph.node("MatMul", x, graph.constant(across.T, "bases"))
        x = graph.reshape(x, (inputs, high, half, 2))
        x = graph.reshape(graph.transposed(x, (0, 1, 3, 4, 2)), (inputs, half, 2 * high))
        x = graph.node("MatMul", x, graph.constant(down.T, "bases"))
        x = graph.reshape(x, (inputs, half, high, 2))
        x = graph.transposed(x, (2, 3, 0, 4, 1))
        x = graph.node("Reshape", x, (half * high, -1, 2 * inputs))
        x = graph.node("MatMul", x, graph.constant(blocks, "blocks"))
        x = graph.node("Reshape", x, (half, high, -1, 2, outputs))
        x = graph.transposed(x, (2, 4, 0, 1, 3))
        x = graph.reshape(x, (outputs, half, 2 * high))
        x = graph.node("MatMul", x, graph.constant(down, "bases"))
        x = graph.reshape(x, (outputs, half, 2, high))
        x = graph.reshape(graph.transposed(x, (0, 1, 4, 2, 3)), (outputs, high, 2 * half))
        x = graph.node("MatMul", x, graph.constant(across, "bases"))
        return graph.transposed(x, (0, 2, 3, 1))


def _each(signal, move):
    return Signal(move(signal.value), None if signal.error is None else move(signal.error))


def _product(matrix, signal, precision, basis):
    """A matrix times the columns of a signal; its entries are rounded to the format."""
    value = matrix @ signal.value
    if signal.error is None:
        return Signal(value)
    wide, size, terms = precision.wide, np.abs(matrix), matrix.shape[-1]
    largest = np.abs(signal.value) + signal.error
    error = size @ signal.error + wide.sum(terms + 2) * (size @ largest)
    error = error + basis * size.max() * largest.sum(axis=-2, keepdims=True)
    flushed = wide.tiny * terms * (1 + size.max() + largest.max(initial=0.0))
    return Signal(value, (error + flushed) * (1 + 1e-9))


def moved_blocks(tensor, strides):
    """`Moved` of the space-to-depth rearrangement before the layer; none without strides."""
    if tuple(strides) == (1, 1):
        return []
    return [Moved(space_to_depth_index(tensor.shape[1:], strides))]


def as_blocks(real, imag):
    """R + iJ as [[R, J], [-J, R]]."""
    return np.concatenate([np.concatenate([real, imag], -1), np.concatenate([-imag, real], -1)], -2)


def _read(call):
    layer, tensor = call.operation, call.inputs[0]
    values = finite_values(layer)
    blocks = frozen(as_blocks(values["real"], values["imag"]))
    found = [*moved_blocks(tensor, layer.strides), Fourier(blocks, tuple(layer.sizes))]
    return found + end_of(call)


def stack_norm_upper_bound(blocks):
    """Largest norm in a stack of matrices (…, n, m), real or complex, from their Gram matrices."""
    if blocks.shape[-2] < blocks.shape[-1]:
        blocks = np.swapaxes(blocks, -1, -2)
    adjoint = np.conj(np.swapaxes(blocks, -1, -2))
    gram = adjoint @ blocks
    n, side = blocks.shape[-2:]
    top = np.maximum(np.linalg.eigvalsh(gram)[..., -1], 0.0)
    trace = np.trace(gram, axis1=-2, axis2=-1).real
    # Forming the Gram matrix (four real products a term), then LAPACK.
    error = 1.01 * UNIT * ((4 * n + 8) * trace + 8 * side * top)
    return float(np.max(np.sqrt(top + error))) * (1 + 4 * UNIT)


def fourier_affine(gain, blocks, sizes, dtype):
    """Error model of `spectral.orthogonal.block_fourier` with these real blocks (F, 2a, 2b).

    Five unitary or block stages, each with the error γ·‖|M|‖ ≤ γ·max|M_ij|·√entries; entries of
    the bases are computed to 16 roundoffs of their largest.
    """
    (high, wide), unit = sizes, rounding.unit_roundoff(dtype)
    operands = rounding.operand_roundoff() if dtype == "float32" else 0.0
    products = 2 * operands + operands**2

    def stage(terms, size):
        e = rounding.gamma(terms + 28, unit)
        return (e * (1 + products) + products) * size

    rows = stage(wide + 2, math.sqrt(2 * (wide + 2)))
    columns = stage(2 * high, 2 * math.sqrt(high))
    frobenius = float(np.max(np.linalg.norm(blocks, axis=(-2, -1)))) * (1 + blocks.size * UNIT)
    middle = stage(blocks.shape[-2], frobenius)
    around = math.expm1(2 * math.log1p(rows) + 2 * math.log1p(columns))
    return Affine(gain, 0.0, (around * (gain + middle) + middle) * (1 + 1e-12), 0.0)


def _cayley_rule(call):
    """‖T*·diag(Q)·T‖ ≤ max ‖Q(θ)‖, because the transform T keeps norms."""
    layer, tensor, output = call.operation, call.inputs[0], call.outputs[0]
    values, work = finite_values(layer), layer.work_dtype
    real, imag = values["real"], values["imag"]
    norm = stack_norm_upper_bound(real + 1j * imag)
    # Real blocks [[R, J], [-J, R]] have twice the squared entries.
    blocks = as_blocks(real, imag)
    sizes = space_to_depth_shape(tensor.shape[1:], layer.strides)[:2]

    def model():
        path = fourier_affine(norm, blocks, sizes, work)
        path = path.then(Affine(1.0, 0.0, rounding.unit_roundoff(layer.compute_dtype), 0.0))
        return biased(layer, path, output)

    method = f"operator norm, largest of {len(real)} frequencies"
    return effective_gain(call, fused_value(layer, output, norm), method, model)


_LAYERS = (CayleyConv2D, BlockReflectorConv2D)
READERS = dict.fromkeys(_LAYERS, _read)
RULES = dict.fromkeys(_LAYERS, _cayley_rule)
