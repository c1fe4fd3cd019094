"""Max pools without overlaps as maxima of two: max(a, b) = (a + b)/2 + |a - b|/2.

A window of 2^p cells along each axis, next to the one before, is a chain of

    z ↦ ((a + b)/2, (a - b)/2),   (u, v) ↦ (u, |v|),   (u, v) ↦ u + v

axis by axis: a convolution, an activation of slope -1 below zero on half of the channels, and a
dense layer on the channels, all of which `Surroundings` knows. Neighbours of one convolution see
almost the same, so that their differences move less than they do: v = (a - b)/2 is a convolution
too, of the half difference of the kernel with itself, moved by its stride.
"""

import dataclasses

import numpy as np

from tf_lyapunov.verification.arithmetic import SLACK, UNIT
from tf_lyapunov.verification.network import Step
from tf_lyapunov.verification.operations import Activation, Axis, Convolution, Linear, MaxPooling


@dataclasses.dataclass(frozen=True, eq=False)
class Halves(Convolution):
    """z ↦ (u, v) of neighbours along one spatial axis, v in the second half of the channels."""

    axis: int = 0


def difference(before, halves):
    """The convolution of `before`'s input that gives v of `halves` behind it, or None.

    With y_i = Σ_t K_t x_{is+t}, (y_{2i} - y_{2i+1})/2 = Σ_t (K_t - K_{t-s})/2 x_{2is+t}.
    """
    if not isinstance(halves, Halves) or not isinstance(before, Convolution):
        return None
    axis, number = before.axes[halves.axis], halves.axis + 1
    if len(before.kernels) > 1 or axis.dilation != 1:
        return None

    def moved(kernels, first):
        room = [(0, 0)] * kernels.ndim
        room[number] = (axis.stride - first, first)
        return np.pad(kernels, room)

    kernels, stride = before.kernels, axis.stride
    found = (moved(kernels, stride) - moved(kernels, 0)) / 2
    error = 2 * UNIT * np.abs(found)
    if np.ndim(before.kernel_error):
        lost = before.kernel_error
        error = error + (moved(lost, stride) + moved(lost, 0)) / 2
    axes = tuple(
        Axis(a.taps + stride, 2 * stride, 1, a.size, a.left, a.output // 2)
        if k == halves.axis
        else a
        for k, a in enumerate(before.axes)
    )
    return Convolution(found, axes, np.zeros(found.shape[-1]), error * SLACK)


def expanded(network, own):
    """The same network with such pools as chains, and the gains of its steps.

    The last step of a chain has the pool's name. Steps keep the dtype that the model computes in:
    what its underflow may change is counted in each.

    Args:
        network: `network.Network`.
        own: dict of the gain of every step alone, as `Network.gains` gives them.

    Returns:
        `(network, own)`.
    """
    shapes = {step.name: step.shape for step in network.steps}
    found, own, taken = [], dict(own), set(shapes)
    for step in network.steps:
        chain = [step]
        if isinstance(step.operation, MaxPooling) and _is_paired(step.operation):
            chain = _chain(step, shapes[step.inputs[0]], taken)
            own |= {part.name: part.operation.gain() for part in chain}
        found += chain
    return dataclasses.replace(network, steps=tuple(found)), own


def _is_paired(operation):
    axes = operation.axes
    return max(a.taps for a in axes) > 1 and all(
        a.taps == a.stride
        and a.dilation == 1
        and a.left == 0
        and a.taps & (a.taps - 1) == 0
        and a.output * a.taps <= a.size
        for a in axes
    )


def _chain(step, shape, taken):
    channels, sizes = shape[-1], list(shape[:-1])
    one, chain, before = np.eye(channels), [], step.inputs

    def add(kind, operation, width):
        nonlocal before
        name = f"{step.name}/{kind} {len(chain)}"
        while name in taken:  # layers may be called anything
            name += "'"
        taken.add(name)
        chain.append(Step(name, before, (*sizes, width), operation, step.dtype))
        before = (name,)

    for number, axis in enumerate(step.operation.axes):
        for _ in range(axis.taps.bit_length() - 1):
            taps = [1] * len(sizes)
            taps[number] = 2
            kernel = np.stack([np.hstack([one, one]), np.hstack([one, -one])]) / 2
            axes = tuple(Axis.of(n, n, 1, s, "valid") for n, s in zip(taps, sizes, strict=True))
            sizes = [a.output for a in axes]
            kernel = kernel.reshape(1, *taps, channels, 2 * channels)
            halves = Halves(kernel, axes, np.zeros(2 * channels), axis=number)
            add("halves", halves, 2 * channels)
            slopes = np.concatenate([np.ones(channels), -np.ones(channels)])
            shaped = np.broadcast_to(slopes, (*sizes, 2 * channels))
            add("sizes", Activation("prelu", {}, shaped), 2 * channels)
            add("sum", Linear(np.hstack([one, one]), np.zeros(channels)), channels)
    chain[-1] = dataclasses.replace(chain[-1], name=step.name)
    return chain
