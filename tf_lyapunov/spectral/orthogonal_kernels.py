"""Explicit kernels of orthogonal convolutions, put together from small orthogonal matrices."""

from keras import ops

from tf_lyapunov.spectral.precision import full_precision


def orthogonal_kernel(mixing, projectors, size, base):
    """Kernel of a convolution with orthonormal rows or columns, as a product of two-tap factors.

        x ↦ R(A_F ∗ … A_1 ∗ x),   A_i = (U_iU_iᵀ, I - U_iU_iᵀ) along one axis of the image      (1)

    With UᵀU = I a factor is unitary at every frequency, P + (I - P)exp(iθ) for P = UUᵀ, and so is
    their product (P is computed as U(2I - UᵀU)Uᵀ, so that P² = P up to the square of what UᵀU
    lacks); R multiplies patches of `base` pixels, moved into channels, by a matrix with
    orthonormal rows or columns. In training the product costs 4·C·r·o flops a tap and factor, no
    matter how large images are.

    Args:
        mixing: R, `(groups, b₁·b₂·C, o)` tensor.
        projectors: U, `(groups, F, C, r)` with F = Σ (size - base), or None for F = 0.
        size: `(k₁, k₂)` of the kernel.
        base: `(b₁, b₂)` of the patches, at most `size`: the strides, as a rule.

    Returns:
        Tensor `(groups, k₁, k₂, C, o)`; y[i] = Σ_t x[i·stride + t]K[t].

    Example: with P = 1 a factor leaves one channel where it is.

    >>> import numpy as np
    >>> one = np.ones((1, 1, 1), "float32")
    >>> kernel = orthogonal_kernel(one, one[:, None], (2, 1), (1, 1))
    >>> np.asarray(kernel).ravel().tolist()
    [1.0, 0.0]

    Reference: Li et al., "Preventing gradient attenuation in Lipschitz constrained convolutional
    networks" (2019), for the factors; Boissin et al., "An adaptive orthogonal convolution scheme"
    (2025, arXiv 2501.07930), for their product with strided patches.
    """
    mixing = ops.convert_to_tensor(mixing)
    groups, rows, width = mixing.shape
    channels = rows // (base[0] * base[1])
    kernel = ops.reshape(mixing, (groups, *base, channels, width))
    with full_precision():
        for i, axis in enumerate(factor_axes(size, base)):
            u = ops.convert_to_tensor(projectors)[:, i]
            # A projector to second order in UᵀU - I: factors would add four times of it each.
            gram = ops.matmul(ops.swapaxes(u, -1, -2), u)
            twice = (2 * u - ops.matmul(u, gram))[:, None, None]
            u = u[:, None, None]
            here, moved = (_padded(kernel, axis, ends) for ends in ([0, 1], [1, 0]))
            # P·here + (I - P)·moved
            inner = ops.matmul(ops.swapaxes(u, -1, -2), here - moved)
            kernel = moved + ops.matmul(twice, inner)
    return kernel


def factor_axes(size, base):
    """Axis (0 or 1) of every factor, in turn."""
    left = [k - b for k, b in zip(size, base, strict=True)]
    axes = []
    while any(left):
        for axis in (0, 1):
            if left[axis]:
                left[axis] -= 1
                axes.append(axis)
    return axes


def _padded(kernel, axis, ends):
    pads = [[0, 0] for _ in kernel.shape]
    pads[axis + 1] = ends
    return ops.pad(kernel, pads)
