"""Operators that select, repeat, pad or rearrange entries, and that leave them as they are."""

import keras
import numpy as np

from tf_lyapunov.onnx.foreign import BadGraph, NotRead
from tf_lyapunov.onnx.readers.linear import transposed, without_axis
from tf_lyapunov.onnx.readers.windows import ZERO_PADDING
from tf_lyapunov.onnx.signals import BATCH, Signal, size_of

_MIXES = "it mixes samples along the batch axis"
_LARGEST = 2**31


def taken(build, node, signal, axis, cells, suffix=""):
    """Entries of an axis of the tensor, by their positions."""
    cells = np.asarray(cells, np.int32)
    shape = list(signal.tensor.shape)
    shape[axis] = len(cells)
    if size_of(shape[1:]) > _LARGEST:
        raise BadGraph(f"it makes {size_of(shape[1:])} entries of one sample")
    size = signal.tensor.shape[axis]
    steps = np.unique(np.diff(cells))
    if len(cells) and np.array_equal(cells, np.arange(size)):
        return signal
    if len(cells) and len(steps) <= 1 and (len(steps) == 0 or steps[0] > 0):
        step = int(steps[0]) if len(steps) else 1
        key = [slice(None)] * len(shape)
        key[axis] = slice(int(cells[0]), int(cells[-1]) + 1, step)
        tensor = signal.tensor[tuple(key)]
    else:
        tensor = keras.ops.take(signal.tensor, cells, axis=axis)
    tensor = build.operation(node, tensor, suffix)
    return signal.like(tensor, nonnegative=signal.nonnegative)


def _numbers(value, what):
    if not isinstance(value, np.ndarray):
        raise NotRead(f"its {what} are computed from inputs")
    return [int(n) for n in value.ravel()]


# Slices and selections --------------------------------------------------------------------------


def _slice(build, node, values):
    signal = values[0]
    if "starts" in node.attributes:
        starts, ends = node.get("starts"), node.get("ends")
        axes, steps = node.get("axes"), None
    else:
        given = [*values[1:], *[None] * 4][:4]
        starts, ends = (_numbers(v, "limits") for v in given[:2])
        axes = None if given[2] is None else _numbers(given[2], "axes")
        steps = None if given[3] is None else _numbers(given[3], "steps")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step == 0:
            raise BadGraph("its step is zero")
        place = signal.place(axis)
        if place is None:
            if start != 0 or step != 1 or end < build.batch:
                raise NotRead(_MIXES)
            continue
        size = signal.sample[place]
        cells = np.arange(size)[slice(*_limits(start, end, step, size))]
        if not len(cells):
            raise BadGraph("it leaves nothing")
        signal = taken(build, node, signal, signal.keras_axis(axis), cells)
    return signal


def _limits(start, end, step, size):
    """ONNX's limits as Python's: an end of -1 with a negative step is a position, not the start."""
    start += size if start < 0 else 0
    end += size if end < 0 else 0
    if step > 0:
        return max(start, 0), min(max(end, 0), size), step
    end = min(end, size - 1)
    return min(start, size - 1), None if end < 0 else end, step


def _gather(build, node, values):
    signal, index = values
    if not isinstance(signal, Signal):
        raise NotRead("it selects entries of a constant by its input")
    if not isinstance(index, np.ndarray):
        raise NotRead("what it selects is computed from inputs")
    axis = node.get("axis", 0)
    place = signal.place(axis)
    if place is None:
        if build.batch != 1 or np.any((index != 0) & (index != -1)) or index.size != 1:
            raise NotRead(_MIXES)
        shape = list(signal.sample)
        shape[signal.batch : signal.batch] = [1] * (index.ndim - 1)
        batch = signal.batch if index.ndim else None
        if index.ndim == 0:
            return build.reshaped(node, signal, signal.sample, None)
        return build.reshaped(node, signal, shape, batch)
    size = signal.sample[place]
    if np.any((index < -size) | (index >= size)):
        raise BadGraph(f"it selects {index.ravel()[:5]} of {size} entries")
    cells = np.where(index < 0, index + size, index).ravel()
    signal = taken(build, node, signal, signal.keras_axis(axis), cells)
    if index.ndim == 0:
        return without_axis(build, node, signal, place)
    if index.ndim == 1:
        return signal
    shape, batch = list(signal.sample), signal.batch
    shape[place : place + 1] = index.shape
    if batch is not None and place < batch:
        batch += index.ndim - 1
    return build.reshaped(node, signal, shape, batch, "_shape")


def _gather_nd(build, node, values):
    """Entries at positions along the first axes together."""
    signal, index = values
    if not isinstance(signal, Signal):
        raise NotRead("it selects entries of a constant by its input")
    if not isinstance(index, np.ndarray):
        raise NotRead("what it selects is computed from inputs")
    count = index.shape[-1] if index.ndim else 0
    if node.get("batch_dims", 0) or (signal.batch is not None and signal.batch < count):
        raise NotRead(_MIXES)
    if not 1 <= count <= len(signal.sample):
        raise BadGraph(f"its positions have {count} axes")
    signal = build.plain(node, signal)
    sizes, rest = signal.sample[:count], signal.sample[count:]
    if np.any((index < np.negative(sizes)) | (index >= np.array(sizes))):
        raise BadGraph(f"it selects positions outside of {sizes}")
    index = np.where(index < 0, index + np.array(sizes), index)
    cells = np.ravel_multi_index(tuple(index.reshape(-1, count).T), sizes)
    batch = None if signal.batch is None else signal.batch - count + 1
    signal = build.reshaped(node, signal, (size_of(sizes), *rest), batch, "_cells")
    signal = taken(build, node, signal, 1, cells)
    batch = None if batch is None else batch + index.ndim - 2
    return build.reshaped(node, signal, (*index.shape[:-1], *rest), batch, "_shape")


def _split(build, node, values):
    signal, axis = values[0], node.get("axis", 0)
    place, count = signal.sample_axis(axis), len(node.outputs)
    size = signal.sample[place]
    if len(values) > 1 and values[1] is not None:
        sizes = _numbers(values[1], "sizes")
    elif node.get("split") is not None:
        sizes = [int(n) for n in node.get("split")]
    elif node.get("num_outputs") is not None:
        if node.get("num_outputs") != count:
            raise BadGraph("its num_outputs are not the number of its outputs")
        width = -(-size // count)
        sizes = [width] * (count - 1) + [size - width * (count - 1)]
    else:
        if size % count:
            raise BadGraph(f"{size} entries are not split into {count} equal parts")
        sizes = [size // count] * count
    if len(sizes) != count or sum(sizes) != size or min(sizes) < 1:
        raise BadGraph(f"it splits {size} entries into {sizes}")
    parts, start = [], 0
    for i, width in enumerate(sizes):
        cells = np.arange(start, start + width)
        parts.append(taken(build, node, signal, signal.keras_axis(axis), cells, f"_{i}"))
        start += width
    return parts


# Pads and repetitions ---------------------------------------------------------------------------


def _pad(build, node, values):
    signal, mode = values[0], node.get("mode", "constant")
    given = [*values[1:], *[None] * 3][:3]
    pads = node.get("pads") if given[0] is None else _numbers(given[0], "pads")
    if pads is None:
        raise BadGraph("it states no pads")
    fill = node.get("value", 0.0)
    if given[1] is not None:
        if not isinstance(given[1], np.ndarray) or given[1].size != 1:
            raise NotRead("its constant is computed from inputs, or no number")
        fill = float(given[1].reshape(()))
    axes = list(range(signal.rank)) if given[2] is None else _numbers(given[2], "axes")
    if len(pads) != 2 * len(axes):
        raise BadGraph("its pads do not fit its axes")
    widths = {}
    for i, axis in enumerate(axes):
        pair = (int(pads[i]), int(pads[len(axes) + i]))
        if pair == (0, 0):
            continue
        widths[1 + signal.order.index(signal.sample_axis(axis))] = pair
    for axis, (low, high) in widths.items():
        if low < 0 or high < 0:  # cells are cut off
            size = signal.tensor.shape[axis]
            cells = np.arange(max(-low, 0), size - max(-high, 0))
            if not len(cells):
                raise BadGraph("it cuts all off")
            signal = taken(build, node, signal, axis, cells, "_cut")
            widths[axis] = (max(low, 0), max(high, 0))
        if max(widths[axis]) > _LARGEST:
            raise BadGraph(f"it pads by {max(widths[axis])} cells")
    widths = {axis: pair for axis, pair in widths.items() if pair != (0, 0)}
    if not widths:
        return signal
    if mode != "constant":
        return _mirrored(build, node, signal, mode, widths)
    rank = len(signal.tensor.shape) - 2
    inner = range(1, 1 + rank)
    if fill == 0 and rank in ZERO_PADDING and set(widths) <= set(inner):
        pairs = tuple(widths.get(axis, (0, 0)) for axis in inner)
        settings = {} if rank == 1 else {"data_format": "channels_last"}
        tensor = build.layer(
            node,
            ZERO_PADDING[rank],
            signal.tensor,
            padding=pairs[0] if rank == 1 else pairs,
            **settings,
        )
        return signal.like(tensor, nonnegative=signal.nonnegative)
    if not np.isfinite(fill):
        raise NotRead("it pads by what is no finite number")
    pairs = [widths.get(axis, (0, 0)) for axis in range(len(signal.tensor.shape))]
    tensor = keras.ops.pad(signal.tensor, pairs, constant_values=fill if fill else None)
    tensor = build.operation(node, tensor)
    return signal.like(tensor, nonnegative=signal.nonnegative and fill >= 0)


def _mirrored(build, node, signal, mode, widths):
    if mode not in ("reflect", "edge", "wrap"):
        raise BadGraph(f"it pads by {mode!r}")
    for axis, pair in widths.items():
        size = signal.tensor.shape[axis]
        if (mode == "reflect" and max(pair) >= size) or (mode == "wrap" and max(pair) > size):
            raise BadGraph(f"it pads {size} cells by {pair}, mode {mode}")
        build.check_bytes(8 * (size + sum(pair)))
        cells = np.pad(np.arange(size), pair, mode=mode)
        signal = taken(build, node, signal, axis, cells, "_" * (len(widths) > 1))
    return signal


def _expand(build, node, values):
    signal, asked = values
    if not isinstance(signal, Signal):
        raise NotRead("the size it expands to is computed from inputs")
    shape = _numbers(asked, "sizes")
    signal = build.lifted(node, signal, len(shape))
    shape = [1] * (signal.rank - len(shape)) + shape
    if signal.batch is not None:
        if shape[signal.batch] not in (1, build.batch):
            raise NotRead(_MIXES)
        del shape[signal.batch]
    elif BATCH in shape:
        raise NotRead("it repeats one sample as many times as there are")
    return build.repeated(node, signal, np.broadcast_shapes(signal.sample, tuple(shape)))


def _tile(build, node, values):
    signal, times = values[0], _numbers(values[1], "repetitions")
    if len(times) != signal.rank or min(times) < 1:
        raise BadGraph(f"it repeats {signal.rank} axes {times} times")
    if signal.batch is not None:
        if times[signal.batch] != 1:
            raise NotRead(_MIXES)
        del times[signal.batch]
    if size_of(times) * size_of(signal.sample) > _LARGEST:
        raise BadGraph(f"it makes {size_of(times) * size_of(signal.sample)} entries of one sample")
    if size_of(times) == 1:
        return signal
    tensor = keras.ops.tile(signal.tensor, [1, *(times[a] for a in signal.order)])
    return signal.like(build.operation(node, tensor), nonnegative=signal.nonnegative)


# Blocks of pixels -------------------------------------------------------------------------------


def _image(node, signal):
    if signal.rank != 4 or signal.batch != 0:
        raise NotRead("its input must have the axes batch, channels, rows and columns")
    size = node.get("blocksize", 0)
    if size < 1:
        raise BadGraph("its blocks have no size")
    return size, signal.sample


def _depth_to_space(build, node, values):
    (signal,) = values
    b, (channels, rows, columns) = _image(node, signal)
    if channels % (b * b):
        raise BadGraph(f"{channels} channels are no blocks of {b}×{b}")
    depth, mode = channels // (b * b), node.get("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise BadGraph(f"its mode is {mode!r}")
    blocks = [b, b, depth] if mode == "DCR" else [depth, b, b]
    axes = [0, 3, 4, 1, 5, 2] if mode == "DCR" else [0, 1, 4, 2, 5, 3]
    signal = build.reshaped(node, signal, [*blocks, rows, columns], 0, "_blocks")
    signal = transposed(signal, axes)
    return build.reshaped(node, signal, [depth, rows * b, columns * b], 0)


def _space_to_depth(build, node, values):
    (signal,) = values
    b, (channels, rows, columns) = _image(node, signal)
    if rows % b or columns % b:
        raise BadGraph(f"{rows}×{columns} pixels are no blocks of {b}×{b}")
    shape = [channels, rows // b, b, columns // b, b]
    signal = build.reshaped(node, signal, shape, 0, "_blocks")
    signal = transposed(signal, [0, 3, 5, 1, 2, 4])
    return build.reshaped(node, signal, [channels * b * b, rows // b, columns // b], 0)


# What leaves entries as they are ----------------------------------------------------------------


def _same(build, node, values):
    return values[0]


def _dropout(build, node, values):
    mode = values[2] if len(values) > 2 else None
    if isinstance(mode, Signal) or (mode is not None and np.any(mode)):
        raise NotRead("it computes as in training; export the network for inference")
    return values[0]


_TYPES = {1: "float32", 11: "float64", 10: "float16", 16: "bfloat16"}
_WIDTH = {"float32": 32, "float64": 64}


def _cast_to(build, node, signal, dtype):
    if dtype == signal.dtype:
        return signal
    if dtype not in _WIDTH:
        raise NotRead(f"a cast to {dtype or 'integers'} is discontinuous")
    if _WIDTH.get(signal.dtype, 0) > _WIDTH[dtype]:
        raise NotRead(f"a cast of {signal.dtype} to {dtype} is discontinuous")
    return signal.like(build.operation(node, keras.ops.cast(signal.tensor, dtype)),
                       nonnegative=signal.nonnegative)  # fmt: skip


def _cast(build, node, values):
    return _cast_to(build, node, values[0], _TYPES.get(node.get("to")))


def _cast_like(build, node, values):
    signal, like = values
    if not isinstance(signal, Signal):
        raise NotRead("it casts a constant as its input")
    dtype = like.dtype if isinstance(like, Signal) else like.dtype.name
    return _cast_to(build, node, signal, dtype)


READERS = {
    "Slice": (13, _slice),
    "Gather": (13, _gather),
    "GatherND": (13, _gather_nd),
    "Split": (18, _split),
    "Pad": (25, _pad),
    "Expand": (13, _expand),
    "Tile": (13, _tile),
    "DepthToSpace": (28, _depth_to_space),
    "SpaceToDepth": (28, _space_to_depth),
    "Identity": (25, _same),
    "Dropout": (22, _dropout),
    "Cast": (28, _cast),
    "CastLike": (25, _cast_like),
}
