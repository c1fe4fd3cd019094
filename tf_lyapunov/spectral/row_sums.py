"""Upper bounds of operator norms by absolute row sums, cheap and differentiable."""

from keras import ops

from tf_lyapunov.spectral.arguments import count
from tf_lyapunov.spectral.precision import work_dtype


def row_sum_bound(kernel, groups=1):
    """Upper bound of the squared norm of a kernel's map by row sums.

        b(W) = min(r(WᵀW), r(WWᵀ)),   r(M) = max_i Σ_j |M_ij|,   σ(W)² ≤ b(W)             (1)

    since the largest eigenvalue of a symmetric matrix is at most its largest absolute row sum. W
    is the matrix of a dense layer, or the whole map of a convolution on the infinite lattice,
    whose products are the correlations of the kernel with itself; the map with zero or circular
    padding, any stride and any dilation is a part of it or has the same symbol, so that (1) holds
    for it too, and for the transposed convolution. In exact arithmetic; differentiable.

    Args:
        kernel: tensor (inputs, outputs), or (*spatial, inputs / groups, outputs), 1 to 3 spatial
            axes. A depthwise kernel (*spatial, channels, m) must be reshaped to
            (*spatial, 1, channels·m), with groups = channels.
        groups: of a grouped convolution.

    Returns:
        Scalar tensor, float32 or better.

    Raises:
        ValueError: for a vector, or outputs that the groups do not divide.

    Example:

    >>> import numpy as np
    >>> float(row_sum_bound(np.array([[1.0, 1.0], [0.0, 0.0]], "float32")))
    2.0

    Reference: Qian and Wegman, "L2-nonexpansive neural networks" (ICLR 2019), eq. (2), as
    published for dense layers; convolutions in sound form (the paper bounds them by the reshaped
    kernel and the number of overlapping windows).
    """
    kernel = ops.convert_to_tensor(kernel)
    kernel = ops.cast(kernel, work_dtype(kernel))
    shape = tuple(kernel.shape)
    if not 2 <= len(shape) <= 5:
        raise ValueError(
            "A row-sum bound needs a dense kernel, or one with 1 to 3 spatial axes. Received: "
            f"shape {shape}."
        )
    groups = count("groups", groups)
    if shape[-1] % groups:
        raise ValueError(
            f"`groups` must divide the outputs. Received: groups={groups} for shape {shape}."
        )
    parts = ops.split(kernel, groups, axis=-1) if groups > 1 else [kernel]
    bounds = [ops.minimum(_row_sum(w), _row_sum(ops.swapaxes(w, -1, -2))) for w in parts]
    return bounds[0] if groups == 1 else ops.max(ops.stack(bounds))


def _row_sum(w):
    """r(WᵀW) over the input channels of W (*spatial, inputs, outputs)."""
    if len(w.shape) == 2:
        return ops.max(ops.sum(ops.abs(ops.matmul(w, ops.transpose(w))), axis=1))
    spatial = len(w.shape) - 2
    # Samples are the input channels c', features the outputs; every shift of the kernel is met.
    images = ops.moveaxis(w, -2, 0)
    images = ops.pad(images, [(0, 0), *[(k - 1, k - 1) for k in w.shape[:spatial]], (0, 0)])
    shifts = ops.conv(images, ops.swapaxes(w, -1, -2), 1, "valid", data_format="channels_last")
    return ops.max(ops.sum(ops.abs(shifts), axis=tuple(range(spatial + 1))))
