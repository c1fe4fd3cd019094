"""Convolutions computed frequency by frequency: Cayley convolutions, and their error models."""

import math

import numpy as np

from tf_lyapunov.layers.linear import space_to_depth_shape
from tf_lyapunov.layers.orthogonal import CayleyConv2D
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.effective import biased, effective_gain, fused_value
from tf_lyapunov.program.gain import Affine
from tf_lyapunov.program.weights import finite_values

UNIT = rounding.UNIT_ROUNDOFF["float64"]


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
    blocks = np.concatenate(
        [np.concatenate([real, imag], -1), np.concatenate([-imag, real], -1)], -2
    )
    sizes = space_to_depth_shape(tensor.shape[1:], layer.strides)[:2]

    def model():
        path = fourier_affine(norm, blocks, sizes, work)
        path = path.then(Affine(1.0, 0.0, rounding.unit_roundoff(layer.compute_dtype), 0.0))
        return biased(layer, path, output)

    method = f"operator norm, largest of {len(real)} frequencies"
    return effective_gain(call, fused_value(layer, output, norm), method, model)


READERS = {}
RULES = {CayleyConv2D: _cayley_rule}
