"""Geometry of convolutions and pools: pads, strides, dilations, sizes of results."""

import dataclasses
import math

import keras

from tf_lyapunov.onnx.foreign import BadGraph, NotRead

ZERO_PADDING = {
    1: keras.layers.ZeroPadding1D,
    2: keras.layers.ZeroPadding2D,
    3: keras.layers.ZeroPadding3D,
}
CROPPING = {
    1: keras.layers.Cropping1D,
    2: keras.layers.Cropping2D,
    3: keras.layers.Cropping3D,
}


@dataclasses.dataclass(frozen=True)
class Window:
    """A window over positions.

    Attributes:
        sizes: of the input, per axis.
        kernel, strides, dilations: per axis.
        before, after: cells that are added on both sides, per axis; behind no more than windows
            reach.
        behind: cells that the operator states behind, per axis.
        out: sizes of the result.
    """

    sizes: tuple
    kernel: tuple
    strides: tuple
    dilations: tuple
    before: tuple
    after: tuple
    behind: tuple
    out: tuple

    @property
    def reach(self):
        """Cells that a window spans."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def is_valid(self):
        """Whether nothing is padded."""
        return not any(self.before) and not any(self.after)

    @property
    def is_same(self):
        """Whether the pads are those of Keras's `padding="same"`."""
        for n, q, s, low, m in zip(
            self.sizes, self.reach, self.strides, self.before, self.out, strict=True
        ):
            if m != -(-n // s) or low != max((m - 1) * s + q - n, 0) // 2:
                return False
        return True


def _listed(node, name, rank, default):
    found = node.get(name)
    if found is None:
        return (default,) * rank
    if len(found) != rank:
        raise BadGraph(f"its {name} do not fit {rank} axes of positions")
    return tuple(int(n) for n in found)


def strides_and_dilations(node, rank):
    """`(strides, dilations)`, positive."""
    strides, dilations = _listed(node, "strides", rank, 1), _listed(node, "dilations", rank, 1)
    if min((*strides, *dilations)) < 1:
        raise BadGraph("its strides and dilations must be positive")
    return strides, dilations


def window(node, sizes, kernel, *, ceil=False):
    """The `Window` of a convolution or pool.

    Raises:
        NotRead: for negative pads.
        BadGraph: for attributes that do not fit.
    """
    rank = len(sizes)
    if len(kernel) != rank or min(kernel) < 1:
        raise BadGraph(f"its window {tuple(kernel)} does not fit {rank} axes of positions")
    strides, dilations = strides_and_dilations(node, rank)
    auto = node.get("auto_pad", "NOTSET")
    before, after, behind, out = [], [], [], []
    pads = node.get("pads") or [0] * (2 * rank)
    if len(pads) != 2 * rank:
        raise BadGraph("its pads do not fit its axes")
    for i, (n, k, s, d) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        q = (k - 1) * d + 1
        low, high = int(pads[i]), int(pads[rank + i])
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            total = max((-(-n // s) - 1) * s + q - n, 0)
            low = total // 2 if auto == "SAME_UPPER" else -(-total // 2)
            high = total - low
        elif auto == "VALID":
            low = high = 0
        elif auto not in ("NOTSET", ""):
            raise BadGraph(f"its auto_pad is {auto!r}")
        if low < 0 or high < 0:
            raise NotRead("its pads are negative")
        room = n + low + high - q
        if room < 0:
            raise BadGraph(f"its window of {q} cells is larger than {n} cells with their pads")
        m = math.ceil(room / s) + 1 if ceil else room // s + 1
        if ceil and (m - 1) * s >= n + low:
            m -= 1  # the last window would hold pads alone
        before.append(low)
        behind.append(high)
        after.append(max((m - 1) * s + q - n - low, 0))
        out.append(m)
    cells = (tuple(before), tuple(after), tuple(behind), tuple(out))
    return Window(tuple(sizes), tuple(kernel), strides, dilations, *cells)


def padded(build, node, signal, before, after, suffix="_pad"):
    """Zeros around the positions of a signal with its channels last."""
    return _framed(build, node, signal, (before, after), (ZERO_PADDING, "padding"), suffix)


def cropped(build, node, signal, before, after, suffix="_crop"):
    """Cells cut off around the positions of a signal with its channels last."""
    return _framed(build, node, signal, (before, after), (CROPPING, "cropping"), suffix)


def _framed(build, node, signal, cells, layer, suffix):
    if not any(map(any, cells)):
        return signal
    kinds, setting = layer
    widths = tuple(zip(*cells, strict=True))
    rank = len(widths)
    settings = {setting: widths[0]} if rank == 1 else {setting: widths}
    if rank > 1:
        settings["data_format"] = "channels_last"
    tensor = build.layer(node, kinds[rank], signal.tensor, suffix, **settings)
    return signal.like(tensor, nonnegative=signal.nonnegative)


def fitted(build, node, signal, found, pad):
    """The signal with the pads of a pool, cut where windows of a whole stride would follow.

    Args:
        build: `Builder`.
        node: `OnnxNode`.
        signal: `Signal` with its channels last.
        found: `Window`.
        pad: function of the signal, the cells before and those behind.
    """
    signal = pad(signal, found.before, found.after)
    excess = [
        n + low + high - ((m - 1) * s + q)
        for n, low, high, m, s, q in zip(
            found.sizes, found.before, found.after, found.out, found.strides, found.reach,
            strict=True,
        )
    ]  # fmt: skip
    cut = [e if e >= s else 0 for e, s in zip(excess, found.strides, strict=True)]
    return cropped(build, node, signal, [0] * len(cut), cut)


def positions(signal):
    """Sizes of the positions of a logical `(batch, channels, …)`."""
    return signal.sample[1:]
