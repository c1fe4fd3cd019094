"""Block reflections: orthogonal matrices that turn a subspace around."""

from keras import ops

from tf_lyapunov.spectral.orthogonal import accretive_inverse, contraction_factor
from tf_lyapunov.spectral.precision import full_precision, unit_roundoff

# VᴴV is inverted after so many roundoffs of its mean eigenvalue were added.
RIDGE = 64


def block_reflection(real, imag=None):
    """Contraction with nearly orthonormal columns that turns the span of V around.

        W = s·(I - 2V(VᴴV)⁻¹Vᴴ),   ‖W‖ ≤ 1 exactly as stored                                  (1)

    The exact matrix is Hermitian and its own inverse: -1 on the span of V, 1 on what is orthogonal
    to it. (VᴴV)⁻¹ is found from (VᴴV + ρI)⁻¹, ρ a few roundoffs, by one Newton step, which leaves
    eigenvalues -1 + 2(ρ/(σ² + ρ))²: no ridge pulls a V of full rank away from orthogonal, and one
    of lower rank gives a contraction. s is that of `contraction_factor`.

    Args:
        real: real parts of V, `(..., n, r)`, r ≤ n, float32 or float64.
        imag: imaginary parts, or None.

    Returns:
        W, `(..., n, n)`, or `(real, imag)` of it; NaN if V is not finite.

    Example:

    >>> import numpy as np
    >>> w = np.asarray(block_reflection(np.array([[3.0], [0.0]], "float32")))
    >>> bool(np.allclose(w, [[-1.0, 0.0], [0.0, 1.0]], atol=1e-5))
    True

    Reference: Lai et al., "Enhancing certified robustness via block reflector orthogonal layers
    and logit annealing loss" (2025); sound form (division by the excess).
    """
    real = ops.convert_to_tensor(real)
    u, rank = unit_roundoff(real.dtype), real.shape[-1]
    parts = [real] if imag is None else [real, ops.convert_to_tensor(imag)]
    # W does not depend on the scale of V: no gradient is lost.
    largest = sum(ops.max(ops.abs(ops.stop_gradient(p)), (-2, -1), keepdims=True) for p in parts)
    largest = ops.where(largest > 0, largest, ops.ones_like(largest))
    # A maximum may pass over NaN.
    finite = sum(ops.sum(ops.stop_gradient(p) / largest, (-2, -1), keepdims=True) for p in parts)
    finite = ops.isfinite(finite)
    parts = [ops.where(finite, p / largest, ops.zeros_like(p)) for p in parts]
    with full_precision():
        if imag is None:
            stacked = parts[0]
        else:
            # V as [[R, -J], [J, R]], which all backends and compilers can invert.
            r, j = parts
            stacked = _blocks(r, j)
        gram = ops.matmul(_turned(stacked), stacked)
        eye = ops.eye(gram.shape[-1], dtype=gram.dtype)
        frozen = ops.stop_gradient(gram)
        trace = ops.sum(frozen * eye, (-2, -1), keepdims=True)
        ridge = RIDGE * u * trace / gram.shape[-1]
        ridge = ops.where(ridge > 0, ridge, ops.ones_like(ridge))
        inverse = accretive_inverse(gram + ridge * eye)
        inverse = ops.matmul(inverse, 2 * eye - ops.matmul(gram, inverse))
        side = ops.eye(real.shape[-2], dtype=real.dtype)
        if imag is None:
            w = side - 2 * ops.matmul(ops.matmul(stacked, inverse), _turned(stacked))
            return w * _marked(contraction_factor(w), finite)
        left = ops.matmul(stacked, inverse)[..., :rank]
        (left_r, left_j) = ops.split(left, 2, axis=-2)
        w_real = side - 2 * (ops.matmul(left_r, _turned(r)) + ops.matmul(left_j, _turned(j)))
        w_imag = -2 * (ops.matmul(left_j, _turned(r)) - ops.matmul(left_r, _turned(j)))
        factor = _marked(contraction_factor(w_real, w_imag), finite)
    return w_real * factor, w_imag * factor


def _marked(factor, finite):
    return ops.where(finite, factor, float("nan") * ops.ones_like(factor))


def _blocks(real, imag):
    upper = ops.concatenate([real, -imag], axis=-1)
    return ops.concatenate([upper, ops.concatenate([imag, real], axis=-1)], axis=-2)


def _turned(matrix):
    return ops.swapaxes(matrix, -1, -2)
