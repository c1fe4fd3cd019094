"""Max pools without overlaps as maxima of two: max(a, b) = (a + b)/2 + |a - b|/2.

A window of 2^p cells along each axis, next to the one before, is a chain of

    z ↦ ((a + b)/2, (a - b)/2),   (u, v) ↦ (u, |v|),   (u, v) ↦ u + v

axis by axis: a convolution, an activation of slope -1 below zero on half of the channels, and a
dense layer on the channels, all of which `Surroundings` knows.
"""

import dataclasses

import numpy as np

from tf_lyapunov.verification.network import Step
from tf_lyapunov.verification.operations import Activation, Axis, Convolution, Linear, MaxPooling


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
    found, own = [], dict(own)
    for step in network.steps:
        chain = [step]
        if isinstance(step.operation, MaxPooling) and _is_paired(step.operation):
            chain = _chain(step, shapes[step.inputs[0]])
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


def _chain(step, shape):
    channels, sizes = shape[-1], list(shape[:-1])
    one, chain, before = np.eye(channels), [], step.inputs

    def add(kind, operation, width):
        nonlocal before
        name = f"{step.name}/{kind} {len(chain)}"
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
            add("halves", Convolution(kernel, axes, np.zeros(2 * channels)), 2 * channels)
            slopes = np.concatenate([np.ones(channels), -np.ones(channels)])
            shaped = np.broadcast_to(slopes, (*sizes, 2 * channels))
            add("sizes", Activation("prelu", {}, shaped), 2 * channels)
            add("sum", Linear(np.hstack([one, one]), np.zeros(channels)), channels)
    chain[-1] = dataclasses.replace(chain[-1], name=step.name)
    return chain
