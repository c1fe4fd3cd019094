"""Time and memory of one training step, from counts and a device's rates."""

from __future__ import annotations

import dataclasses

from tf_lyapunov.planning.bounds import BoundCost
from tf_lyapunov.planning.devices import Cluster, Device

# Entries of a map's activations are read or written once forwards and twice backwards (for each
# of its two products); other layers read and write each entry once per pass.
_FORWARD, _MAP_BACKWARD, _OTHER_BACKWARD = 1, 2, 1.5
# Slots of an optimizer beside the gradient, per parameter, and passes over memory of its update.
SLOTS = {"adam": 2, "adamw": 2, "rmsprop": 1, "sgd": 0}
# Share of a device's memory that a program can use: the rest is the driver's and fragmentation's.
USABLE = 0.9
# Buffers of the size of a layer's input and output while its gradient passes.
_PASSING = 3
# Launches of a power step, each of a layer call's cost.
_POWER_CALLS = 4
# Runs that the amortised mode spreads the cost of one enforcement over; `every` of `constrain`.
EVERY = (1, 2, 4, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: float32 variables, and their casts under mixed precision.
        gradients: one float32 entry per trainable parameter.
        optimizer: its slots.
        activations: what the backward pass needs of one batch, and the largest gradients that pass.
        constraints: intermediates of the largest guaranteed bound.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    constraints: float

    @property
    def total(self) -> float:
        """Sum; the largest bound is taken while gradients are alive, but activations are not."""
        return (
            self.weights + self.gradients + self.optimizer + max(self.activations, self.constraints)
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of one step of one replica.

    Attributes:
        compute: forwards, backwards and the optimizer.
        constraints: guaranteed bounds and, if amortised, power steps, on average over steps.
        all_reduce: communication, as if nothing overlapped it.
    """

    compute: float
    constraints: float
    all_reduce: float

    @property
    def total(self) -> float:
        """Sum."""
        return self.compute + self.constraints + self.all_reduce

    @property
    def overhead(self) -> float:
        """Step over the same step without constraints."""
        return self.total / (self.compute + self.all_reduce)


def width(precision: str) -> int:
    """Bytes of an activation."""
    return 2 if precision.startswith("mixed") else 4


def memory(costs, bounds, optimizer: str, momentum: bool, batch: int, precision: str) -> Memory:
    """Memory of a replica that holds `batch` samples.

    Args:
        costs: list of `LayerCost`.
        bounds: list of `BoundCost` of the constrained kernels.
        optimizer: "adam", "adamw", "sgd" or "rmsprop".
        momentum: whether it has a momentum slot of its own (sgd, rmsprop).
        batch: samples on the replica.
        precision: "float32", "mixed_bfloat16" or "mixed_float16".

    Returns:
        `Memory`, an estimate: libraries' workspaces are not in it.
    """
    parameters = sum(c.parameters for c in costs)
    trainable = sum(c.trainable for c in costs)
    kept = sum(c.kept for c in costs)
    # The gradients of a layer's output and input are alive together, with a copy of one of them.
    passing = _PASSING * max((c.inputs + c.outputs for c in costs), default=0)
    casts = width(precision) * parameters if precision.startswith("mixed") else 0
    return Memory(
        weights=4.0 * parameters + casts,
        gradients=4.0 * trainable,
        optimizer=4.0 * trainable * (SLOTS[optimizer] + momentum),
        activations=float(batch * width(precision) * (kept + passing)),
        constraints=float(max((b.workspace for b in bounds), default=0)),
    )


def layer_seconds(cost, device: Device, batch: int, precision: str) -> float:
    """Forward and backward pass of a layer.

    The larger of arithmetic and memory traffic of a product, their sum for a convolution, whose
    library rearranges its entries before and after; memory traffic alone for the others.
    """
    shares, flops = device.efficiency, batch * (cost.forward + cost.backward)
    is_conv = bool(cost.maps) and len(cost.maps[0][0]) > 2
    # Accelerators take float32 layers in TensorFloat-32 unless they are told otherwise.
    kind = "tensor_float32" if precision == "float32" else precision
    rate = device.peak(kind) * (shares.convolution if is_conv else shares.product)
    arithmetic = flops / rate if cost.is_map else 0.0
    traffic = moved_bytes(cost, batch, precision) / (device.bandwidth * _share(cost, shares))
    calls = 2 * shares.call if cost.forward or cost.parameters else 0.0
    return (arithmetic + traffic if is_conv else max(arithmetic, traffic)) + calls


def moved_bytes(cost, batch: int, precision: str) -> float:
    """Bytes that a layer reads and writes forwards and backwards; none if it is a view."""
    if not (cost.forward or cost.parameters):
        return 0.0
    backward = 0 if not cost.backward else _MAP_BACKWARD if cost.is_map else _OTHER_BACKWARD
    entries = batch * (cost.inputs + cost.outputs) * (_FORWARD + backward)
    return width(precision) * (entries + 3 * cost.parameters)


def _share(cost, shares):
    """Share of the bandwidth that passes of this kind of layer reach."""
    if cost.maps and len(cost.maps[0][0]) > 2:
        return shares.layout
    normalizes = cost.kind in ("BatchNormalization", "LayerNormalization", "GroupNormalization")
    return shares.normalization if normalizes else shares.bandwidth


def compute_seconds(costs, device: Device, batch: int, precision: str, passes: int = 5) -> float:
    """A step without constraints: input, layers, the optimizer's `passes` over the parameters."""
    shares = device.efficiency
    feed = 4 * batch * costs[0].inputs * shares.feed if costs else 0.0
    update = 4 * passes * sum(c.trainable for c in costs) / (device.bandwidth * shares.bandwidth)
    layers = sum(layer_seconds(c, device, batch, precision) for c in costs)
    return (layers + update) * shares.factor + feed + shares.step


def bound_seconds(bound: BoundCost, device: Device, dtype: str = "float32") -> float:
    """One guaranteed bound of a kernel: products at full precision, then passes over memory."""
    shares, double = device.efficiency, 2 if dtype == "float64" else 1
    arithmetic = bound.flops / (device.peak(dtype) * shares.product)
    moved = double * bound.bytes / (device.bandwidth * shares.bandwidth)
    return arithmetic + moved + shares.bound


def steering_seconds(bound: BoundCost, device: Device) -> float:
    """One power step: a map and its adjoint on one sample, bound by its launches on a GPU."""
    shares = device.efficiency
    return (
        bound.steering / (device.peak("float32") * shares.convolution) + _POWER_CALLS * shares.call
    )


def constraint_seconds(bounds, device: Device, every: int, dtype: str = "float32") -> float:
    """Average per step of all constraints: every step (`every=1`), or amortised."""
    enforced = sum(bound_seconds(b, device, dtype) for b in bounds)
    if every == 1:
        return enforced
    return enforced / every + sum(steering_seconds(b, device) for b in bounds)


def step(costs, bounds, cluster: Cluster, batch, precision, every, dtype="float32", passes=5):
    """`Step` of a replica with `batch` samples, its constraints enforced every `every` steps."""
    trainable = sum(c.trainable for c in costs)
    return Step(
        compute_seconds(costs, cluster.device, batch, precision, passes),
        constraint_seconds(bounds, cluster.device, every, dtype),
        cluster.all_reduce_seconds(4.0 * trainable),
    )


def least_every(costs, bounds, cluster, batch, precision, overhead, dtype="float32") -> int | None:
    """Smallest `every` of `EVERY` whose overhead is at most `overhead`, or None."""
    for every in EVERY:
        found = step(costs, bounds, cluster, batch, precision, every, dtype)
        if found.overhead <= overhead:
            return every
    return None
