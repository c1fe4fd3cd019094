"""Accelerators: data-sheet peaks, the share of them that training reaches, and where it is from.

Peaks are dense (no structured sparsity) figures of the makers' data sheets. No figure of this
table is measured except those of "cpu"; `tf-lyapunov plan --measure` replaces them by the machine's
own.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

GIGA, TERA = 1e9, 1e12
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
WITHOUT_BFLOAT16 = ("V100", "T4")


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks, and what a step costs beside them.

    Attributes:
        product: share of the peak FLOP/s that large matrix products reach.
        convolution: the same of convolutions.
        bandwidth: share of the memory's bandwidth that entrywise passes reach.
        layout: the same of a convolution's passes over its entries, which add to its products.
        normalization: the same of batch normalization.
        step: seconds per step whatever the model (launches, Python).
        call: seconds per layer call.
        bound: seconds per guaranteed bound of a kernel beside its products and passes.
        feed: seconds per byte of input that a step waits for; 0 if a pipeline keeps up.
        factor: measured step of a small network over the sum of its parts.
        source: where the figures are from: "assumed", or "measured …".
    """

    product: float = 0.6
    convolution: float = 0.4
    bandwidth: float = 0.75
    layout: float = 0.75
    normalization: float = 0.75
    step: float = 2e-3
    call: float = 2e-5
    bound: float = 2.4e-4
    feed: float = 0.0
    factor: float = 1.15
    source: str = "assumed, not measured"


@dataclasses.dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: as in `--devices`.
        memory: bytes.
        bandwidth: bytes per second of its memory.
        peaks: FLOP/s of products by type: "float32" (full precision), "tensor_float32" (of
            TensorFlow and PyTorch where available), "float16" (and bfloat16), "float64".
        link: bytes per second, one way, to the other devices of its host.
        efficiency: `Efficiency`.
        source: of peaks, memory and link.
    """

    name: str
    memory: float
    bandwidth: float
    peaks: dict
    link: float
    efficiency: Efficiency = Efficiency()
    source: str = "data sheet"

    def peak(self, precision: str) -> float:
        """Peak FLOP/s of a precision policy; float32 where the type has no units of its own."""
        kind = "float16" if precision.startswith("mixed") else precision
        return self.peaks.get(kind, self.peaks["float32"])


def _gpu(name, memory, bandwidth, float32, tensor32, float16, float64, link):
    names = ("float32", "tensor_float32", "float16", "float64")
    values = (float32, tensor32, float16, float64)
    peaks = {n: v * TERA for n, v in zip(names, values, strict=True) if v}
    return Device(name, memory * GIGA, bandwidth * GIGA, peaks, link * GIGA)


# name: GB, GB/s, TFLOP/s (float32, TF32, float16 or bfloat16, float64), GB/s to its neighbours.
DEVICES = {
    device.name: device
    for device in (
        _gpu("H200", 141, 4800, 67, 495, 989, 34, 450),
        _gpu("H100", 80, 3350, 67, 495, 989, 34, 450),
        _gpu("A100-80GB", 80, 2039, 19.5, 156, 312, 9.7, 300),
        _gpu("A100", 40, 1555, 19.5, 156, 312, 9.7, 300),
        _gpu("V100", 16, 900, 15.7, None, 125, 7.8, 150),
        _gpu("L40S", 48, 864, 91.6, 183, 362, 1.4, 32),
        _gpu("L4", 24, 300, 30.3, 60, 121, 0.5, 32),
        _gpu("T4", 16, 320, 8.1, None, 65, 0.25, 16),
        _gpu("RTX4090", 24, 1008, 82.6, 82.6, 165, 1.3, 32),
        _gpu("RTX3090", 24, 936, 35.6, 35.6, 71, 0.56, 32),
        _gpu("TPUv4", 32, 1228, 69, None, 275, None, 50),
        _gpu("TPUv5e", 16, 819, 49, None, 197, None, 50),
    )
}
# Two cores of a server CPU under TensorFlow, from the topic "planning" of `scripts/benchmark.py`
# --scale, whose rates are per CPU second; `--measure` gives the reader's own.
_CPU = "rates measured once on two busy cores of an AMD EPYC (CPU seconds); memory and link assumed"
DEVICES["cpu"] = Device(
    "cpu",
    16 * GIGA,
    2 * 11.1 * GIGA,
    {"float32": 2 * 150 * GIGA},
    10 * GIGA,
    Efficiency(0.73, 1.0, 1.0, 0.5, 0.3, 1.0e-3, 1e-5, 1.5e-4, factor=1.35, source=_CPU),
    _CPU,
)
# Between hosts, bytes per second one way: 400 Gbit/s.
NETWORK = 50 * GIGA
# Seconds that one hop of an all-reduce waits, within a host and between hosts.
LATENCY, NETWORK_LATENCY = 5e-6, 2e-5


@dataclasses.dataclass(frozen=True)
class Cluster:
    """`hosts` machines with `per_host` devices each."""

    device: Device
    per_host: int = 1
    hosts: int = 1
    network: float = NETWORK

    @property
    def replicas(self) -> int:
        """Devices in all."""
        return self.hosts * self.per_host

    def __str__(self):
        hosts = "" if self.hosts == 1 else f"{self.hosts}x"
        return f"{hosts}{self.per_host}x{self.device.name}"

    def all_reduce_seconds(self, size: float) -> float:
        """Time of a ring all-reduce of `size` bytes, 2(n-1)/n·size over the slowest link.

        Between hosts, each device sends its own share of the host's sum.
        """
        seconds = _ring(size, self.per_host, self.device.link, LATENCY)
        share = size / self.per_host
        return seconds + _ring(share, self.hosts, self.network / self.per_host, NETWORK_LATENCY)


def _ring(size, count, link, latency):
    return 0.0 if count == 1 else 2 * (count - 1) * (size / count / link + latency)


def parse_devices(text: str, network: float = NETWORK) -> Cluster:
    """Devices from text: `H100`, `8xH100`, or `4x8xH100` for four hosts of eight.

    Args:
        text: as above, upper or lower case.
        network: bytes per second between hosts, one way.

    Returns:
        `Cluster`.

    Raises:
        ValueError: if the device is unknown or a count is not a positive integer.

    Example:

    >>> str(parse_devices("4x8xh100")), parse_devices("cpu").replicas
    ('4x8xH100', 1)
    """
    match = re.fullmatch(r"(?:(-?\d+)x)?(?:(-?\d+)x)?([a-z][\w-]*)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(
            f"Devices are written [HOSTSx][COUNTx]NAME, for example 8xH100. Received: {text!r}."
        )
    first, second, name = match.groups()
    hosts, per_host = (1, first) if second is None else (first, second)
    hosts, per_host = int(hosts), 1 if per_host is None else int(per_host)
    if hosts < 1 or per_host < 1:
        raise ValueError(f"Counts of devices must be positive. Received: {text!r}.")
    known = {key.lower(): device for key, device in DEVICES.items()}
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"Did you mean {known[near[0]].name}? " if near else ""
        raise ValueError(f"Unknown device. {hint}Known: {', '.join(DEVICES)}. Received: {name!r}.")
    if network <= 0:
        raise ValueError(f"`network` must be positive. Received: network={network}.")
    return Cluster(known[name.lower()], per_host, hosts, network)
