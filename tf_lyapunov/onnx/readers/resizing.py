"""Resize and Upsample: a selection of entries, or one matrix per axis."""

import math

import keras
import numpy as np

from tf_lyapunov.onnx.foreign import BadGraph, NotRead
from tf_lyapunov.onnx.readers.placing import taken

_UPSAMPLING = {
    1: keras.layers.UpSampling1D,
    2: keras.layers.UpSampling2D,
    3: keras.layers.UpSampling3D,
}
_LARGEST = 2**20


def sources(n, m, scale, transformation):
    """Where the m cells of a result lie among the n of its input.

    Args:
        n, m: sizes.
        scale: of the axis; m/n where sizes are stated.
        transformation: ONNX's name.
    """
    x = np.arange(m, dtype=np.float64)
    if transformation == "asymmetric":
        return x / scale
    if transformation == "align_corners":
        return x * (n - 1) / (m - 1) if m > 1 else np.zeros(m)
    if transformation == "pytorch_half_pixel" and m <= 1:
        return np.zeros(m)
    if transformation in ("half_pixel", "pytorch_half_pixel"):
        return (x + 0.5) / scale - 0.5
    if transformation == "half_pixel_symmetric":
        centre = n / 2
        offset = centre * (1 - m / (n * scale))
        return offset + (x + 0.5) / scale - 0.5
    raise NotRead(f"its coordinates are transformed by {transformation!r}")


def nearest(places, n, rounding):
    """The nearest cells by one of ONNX's four ways to round."""
    pick = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda x: np.ceil(x - 0.5),
        "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    }.get(rounding)
    if pick is None:
        raise BadGraph(f"it rounds by {rounding!r}")
    return np.clip(pick(places), 0, n - 1).astype(int)


def weights(places, n, coefficient=None, exclude=False):
    """Matrix (m, n) of linear interpolation, or of cubic with a coefficient."""
    first = np.floor(places).astype(int)
    share = places - first
    if coefficient is None:
        taps, factors = (0, 1), (1 - share, share)
    else:
        a = coefficient
        taps = (-1, 0, 1, 2)

        def near(t):
            return ((a + 2) * t - (a + 3)) * t * t + 1

        def far(t):
            return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

        factors = (far(share + 1), near(share), near(1 - share), far(2 - share))
    matrix = np.zeros((len(places), n))
    rows = np.arange(len(places))
    for tap, factor in zip(taps, factors, strict=True):
        cells = first + tap
        inside = (cells >= 0) & (cells < n)
        factor = np.where(inside | (not exclude), factor, 0.0)
        np.add.at(matrix, (rows, np.clip(cells, 0, n - 1)), factor)
    if exclude:
        matrix /= matrix.sum(axis=1, keepdims=True)
    return matrix


def _constant(value, what):
    if value is None or (isinstance(value, np.ndarray) and value.size == 0):
        return None
    if not isinstance(value, np.ndarray):
        raise NotRead(f"its {what} are computed from inputs")
    return value.ravel()


def _sizes(build, node, signal, scales, sizes, axes):
    """`{axis: (size, scale)}` of the logical axes that change, or whose scale is not one."""
    found = {}
    given = scales if scales is not None else sizes
    if given is None or len(given) != len(axes):
        raise BadGraph("its scales or sizes do not fit its axes")
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch" and sizes is not None:
        raise NotRead("it keeps the ratio of sizes")
    for i, axis in enumerate(axes):
        place = signal.place(axis)
        if place is None:
            if given[i] not in (1, build.batch):
                raise NotRead("it mixes samples along the batch axis")
            continue
        n = signal.sample[place]
        if scales is not None:
            scale = float(scales[i])
            if not (scale > 0 and math.isfinite(scale)):
                raise BadGraph(f"its scale is {scale}")
            m = math.floor(n * scale)
        else:
            m = int(sizes[i])
            scale = m / n
        if not 0 < m <= _LARGEST:
            raise BadGraph(f"it makes {m} cells of {n}")
        if m != n or scale != 1:
            found[axis] = (m, scale)
    return found


def _resized(build, node, signal, found, mode, settings):
    rank = signal.rank
    selected = {}
    if mode == "nearest":
        for axis, (m, scale) in found.items():
            n = signal.sample[signal.place(axis)]
            places = sources(n, m, scale, settings["transformation"])
            selected[axis] = nearest(places, n, settings["rounding"])
        return _selected(build, node, signal, selected)
    coefficient = settings["coefficient"] if mode == "cubic" else None
    if mode not in ("linear", "cubic"):
        raise BadGraph(f"its mode is {mode!r}")
    letters = "abcdefgh"[:rank]
    for count, (axis, (m, scale)) in enumerate(found.items()):
        n = signal.sample[signal.place(axis)]
        build.check_bytes(8 * m * n)
        places = sources(n, m, scale, settings["transformation"])
        matrix = weights(places, n, coefficient, settings["exclude"])
        place = signal.keras_axis(axis)
        own = letters[: len(signal.tensor.shape)]
        equation = f"{own},{own[place]}z->{own.replace(own[place], 'z')}"
        tensor = keras.ops.einsum(equation, signal.tensor, np.asarray(matrix.T, signal.dtype))
        suffix = f"_{count}" if len(found) > 1 else ""
        positive = signal.nonnegative and bool(np.all(matrix >= 0))
        signal = signal.like(build.operation(node, tensor, suffix), nonnegative=positive)
    return signal


def _selected(build, node, signal, selected):
    """Selections along axes; whole repetitions of images become a layer of their own."""
    inner = len(signal.tensor.shape) - 2
    times = {}
    for axis, cells in selected.items():
        n = signal.sample[signal.place(axis)]
        if len(cells) % n == 0 and np.array_equal(cells, np.repeat(np.arange(n), len(cells) // n)):
            times[signal.keras_axis(axis)] = len(cells) // n
    if inner in _UPSAMPLING and len(times) == len(selected) and all(
        1 <= a <= inner for a in times
    ):  # fmt: skip
        sizes = tuple(times.get(a, 1) for a in range(1, 1 + inner))
        settings = {} if inner == 1 else {"data_format": "channels_last"}
        if inner == 2:
            settings["interpolation"] = "nearest"
        tensor = build.layer(
            node,
            _UPSAMPLING[inner],
            signal.tensor,
            size=sizes[0] if inner == 1 else sizes,
            **settings,
        )
        return signal.like(tensor, nonnegative=signal.nonnegative)
    for count, (axis, cells) in enumerate(selected.items()):
        suffix = f"_{count}" if len(selected) > 1 else ""
        signal = taken(build, node, signal, signal.keras_axis(axis), cells, suffix)
    return signal


def _resize(build, node, values):
    signal = values[0]
    if node.since is not None and node.since < 11:
        found = _sizes(
            build, node, signal, _constant(values[1], "scales"), None, range(signal.rank)
        )
        return _old(build, node, signal, found)
    given = [*values[1:], *[None] * 3][:3]
    scales, sizes = _constant(given[1], "scales"), _constant(given[2], "sizes")
    if (scales is None) == (sizes is None):
        raise BadGraph("it states both scales and sizes, or neither")
    if node.get("antialias", 0):
        raise NotRead("it smooths before it makes smaller")
    transformation = node.get("coordinate_transformation_mode", "half_pixel")
    if transformation == "tf_crop_and_resize":
        raise NotRead("it crops a region")
    axes = node.get("axes") or range(signal.rank)
    settings = {
        "transformation": transformation,
        "rounding": node.get("nearest_mode", "round_prefer_floor"),
        "coefficient": node.get("cubic_coeff_a", -0.75),
        "exclude": bool(node.get("exclude_outside", 0)) and node.get("mode") == "cubic",
    }
    found = _sizes(build, node, signal, scales, sizes, axes)
    return _resized(build, node, signal, found, node.get("mode", "nearest"), settings)


def _old(build, node, signal, found):
    """Operator sets before 11: places are x/scale, nearest ones rounded down."""
    settings = {
        "transformation": "asymmetric",
        "rounding": "floor",
        "coefficient": -0.75,
        "exclude": False,
    }
    mode = node.get("mode", "nearest")
    return _resized(build, node, signal, found, "linear" if mode == "bilinear" else mode, settings)


def _upsample(build, node, values):
    signal = values[0]
    scales = node.get("scales")
    scales = _constant(values[1], "scales") if scales is None else np.asarray(scales)
    found = _sizes(build, node, signal, scales, None, range(signal.rank))
    if any(scale < 1 for _, scale in found.values()):
        raise BadGraph("its scales are below one")
    return _old(build, node, signal, found)


READERS = {"Resize": (19, _resize), "Upsample": (10, _upsample)}
