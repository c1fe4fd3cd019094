"""Flows to search on: the same functions in float32, and a dense first layer by its R factor.

What is found on them proves nothing; positions are those of the flow itself, so that multipliers
carry over.
"""

import dataclasses

import numpy as np

from tf_lyapunov.local.flow import Flow, Link, Trace
from tf_lyapunov.local.regions import Region
from tf_lyapunov.program.families.einsum import Contracted
from tf_lyapunov.program.families.linear import Linear
from tf_lyapunov.program.families.moving import Moved
from tf_lyapunov.program.families.scaling import Scaled
from tf_lyapunov.theory.operators import LinearMap


class SearchFlow:
    """A flow to search on, and its traces and regions.

    With W = QR for the transposed matrix W of a dense first layer with more inputs than outputs,
    ‖Wc‖ = ‖Rc‖: balls around Qᵀx⁰ under R give the same bounds as balls around x⁰ under W.

    Args:
        flow: `Flow`.
        is_ball: whether regions are l2 balls without bounds, for which alone this holds.
    """

    def __init__(self, flow, is_ball):
        links = [_single(link) for link in flow.links]
        self.basis = None
        first = _first_dense(flow) if is_ball else None
        if first is not None:
            link = flow.links[first]
            kernel = link.operation.kernel
            basis, factor = np.linalg.qr(kernel)
            self.basis = basis.astype(np.float32)
            width = factor.shape[0]
            index = np.arange(1, width + 1)
            for i in range(first):
                links[i] = Link(links[i].name, Moved(index), links[i].inputs)
            operation = dataclasses.replace(
                links[first].operation,
                kernel=factor.astype(np.float32),
                linear_map=LinearMap("dense", (width,)),
            )
            links[first] = Link(link.name, operation, link.inputs)
        self.first = first
        self.flow = Flow(tuple(links), flow.name)

    def trace(self, traced):
        """The `Trace` of this flow from that of the flow itself."""
        values = [v.astype(np.float32) for v in traced.values]
        noise = list(traced.noise)
        if self.basis is not None:
            reduced = values[0].reshape(1, -1) @ self.basis
            for i in range(self.first + 1):
                values[i], noise[i] = reduced, 0.0
        return Trace(values, noise)

    def region(self, region):
        """The region of this flow."""
        if self.basis is None:
            return region
        return Region.ball(region.center.reshape(-1) @ self.basis, region.radius)


def _first_dense(flow):
    """Number of the first link, if it is a tall dense layer behind flattenings alone."""
    reads = flow.consumers()
    for i, link in enumerate(flow.links):
        if link.inputs != (i,) or reads[i] != 1:
            return None
        operation = link.operation
        if isinstance(operation, Linear):
            kernel = operation.kernel
            is_tall = operation.linear_map.kind == "dense" and kernel.shape[0] > kernel.shape[1]
            return i if is_tall and _rank(flow, i) == 1 else None
        if not isinstance(operation, Moved) or not _keeps_all(operation):
            return None
    return None


def _rank(flow, i):
    """Rank of the samples that link i reads."""
    if i == 0:
        return flow.rank
    return flow.links[i - 1].operation.index.ndim


def _keeps_all(operation):
    index = np.sort(operation.index.ravel())
    return bool(np.array_equal(index, np.arange(1, len(index) + 1)))


def _single(link):
    operation = link.operation
    if isinstance(operation, (Linear, Contracted)):
        bias = operation.bias
        operation = dataclasses.replace(
            operation,
            kernel=operation.kernel.astype(np.float32),
            bias=None if bias is None else bias.astype(np.float32),
        )
    elif isinstance(operation, Scaled):
        operation = dataclasses.replace(
            operation,
            scale=operation.scale.astype(np.float32),
            shift=operation.shift.astype(np.float32),
        )
    return Link(link.name, operation, link.inputs)
