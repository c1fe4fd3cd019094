"""Compositions of operators that `export_onnx` writes for functions which ONNX has no operator for.

Sorted groups, reflections, both halves of a signal, scaled norms, response normalization, softmax
over several axes, and a few activations. Read operator by operator they would have the product of
their parts' gains, or none; the whole has its own. Other tools write some of them too.
"""

import math

import numpy as np

from tf_lyapunov.onnx import responses

# Ends of slices that stand for "to the end".
_END = 2**31 - 1
# How far rounding to single precision, and a function's own, moves the length of a unit vector.
_ROUNDED = 2.0**-23


def found(finder, node):
    """The node that stands for a composition which ends at a node, or None.

    Args:
        finder: `patterns.Finder`.
        node: `OnnxNode`.
    """
    if node.domain:
        return None
    for pattern in _PATTERNS.get(node.kind, ()):
        made = pattern(finder, node)
        if made is not None:
            kind, x, attributes = made
            return finder.made(node, f"tf_lyapunov.{kind}", x, attributes, None)
    return None


def close(value, exact):
    """Whether a function's constant in a file is another's single precision, up to some roundings.

    For constants on which no gain depends.
    """
    return abs(value - exact) <= 2.0**-21 * abs(exact)


def is_rounded(value, exact):
    """Whether a factor is another, or what single precision makes of it: larger ones gain more."""
    return value in (exact, float(np.float32(exact)))


# Halves and groups along an axis ----------------------------------------------------------------


def _slice(finder, name):
    """`(x, axis, start, stop, step)` of a slice along one axis, or None."""
    node = finder.giver(name, "Slice")
    if node is None or len(node.inputs) < 4:
        return None
    given = [finder.integers(n) for n in node.inputs[1:4]]
    steps = finder.integers(node.inputs[4]) if len(node.inputs) > 4 else (1,)
    if any(v is None or len(v) != 1 for v in (*given, steps)):
        return None
    (start,), (stop,), (axis,) = given
    return node.inputs[0], axis, start, stop, steps[0]


def _split(finder, a, b):
    """`(x, axis, size)` of a value that a node splits into equal halves; `size` may be None."""
    node = finder.giver(a, "Split")
    if node is None or node.outputs != (a, b):
        return None
    sizes = node.get("split")
    if len(node.inputs) > 1 and node.inputs[1]:
        sizes = finder.integers(node.inputs[1])
    if sizes is not None and len(set(sizes)) != 1:
        return None
    return node.inputs[0], node.get("axis", 0), None if sizes is None else sum(sizes)


def _halves(finder, a, b):
    """`(x, axis, size)` of the value that two others are the halves of, or None."""
    first, second = _slice(finder, a), _slice(finder, b)
    if not first or not second:
        return _split(finder, a, b)
    x, axis, start, half, step = first
    same = second[:3] == (x, axis, half) and (step, second[4], start) == (1, 1, 0)
    if not same or half < 1 or not (second[3] == 2 * half or second[3] >= _END):
        return None
    return x, axis, 2 * half


def _two(finder, node):
    return node.inputs if len(node.inputs) == 2 and all(node.inputs) else None


def _two_sided(finder, node):
    """[max(x, 0), max(-x, 0)]."""
    if not _two(finder, node):
        return None
    parts = [finder.giver(name, "Relu") for name in node.inputs]
    if None in parts:
        return None
    negative = finder.giver(parts[1].inputs[0], "Neg")
    if negative is None or negative.inputs[0] != parts[0].inputs[0]:
        return None
    return "TwoSided", negative.inputs[0], {"axis": node.get("axis")}


def _largest_first(finder, node):
    """[max(a, b), min(a, b)] of the halves of x."""
    if not _two(finder, node):
        return None
    largest, smallest = (
        finder.giver(n, k) for n, k in zip(node.inputs, ("Max", "Min"), strict=True)
    )
    if not largest or not smallest or not _two(finder, largest):
        return None
    if set(largest.inputs) != set(smallest.inputs):
        return None
    for a, b in (largest.inputs, largest.inputs[::-1]):
        halves = _halves(finder, a, b)
        if halves and halves[1] == node.get("axis"):
            return "MaxMin", halves[0], {"axis": halves[1], "size": halves[2]}
    return None


def _groups(finder, node):
    """A reshape of sorted groups that a reshape made: neighbours along an axis."""
    after = finder.integers(node.inputs[1])
    top = finder.giver(node.inputs[0], "TopK")
    if top is not None:
        size, before = finder.integers(top.inputs[1]), finder.giver(top.inputs[0], "Reshape")
        if node.inputs[0] != top.outputs[0] or top.get("largest", 1) or not top.get("sorted", 1):
            return None
        axis = top.get("axis", -1)
        x = before and before.inputs[0]
        split = before and finder.integers(before.inputs[1])
    else:
        found_ = _neighbours(finder, node.inputs[0])
        x, axis, split = found_ or (None, None, None)
        size = (2,)
    if not split or not after or not size or len(size) != 1:
        return None
    axis += len(split) if axis < 0 else 0
    whole = (*split[: axis - 1], split[axis - 1] * split[axis], *split[axis + 1 :])
    if axis < 2 or split[axis] != size[0] or min(split[1:]) < 1 or whole != after:
        return None
    return "Sorted", x, {"axis": axis - 1, "size": size[0], "shape": after[1:]}


def _neighbours(finder, name):
    """`(x, axis, split)` of minima and maxima of neighbours, side by side along `axis`."""
    node = finder.giver(name, "Concat")
    if node is None or not _two(finder, node):
        return None
    ends = [finder.giver(n, "Reshape") for n in node.inputs]
    shapes = [e and finder.integers(e.inputs[1]) for e in ends]
    if not all(shapes) or shapes[0] != shapes[1]:
        return None
    extremes = [finder.giver(e.inputs[0], k) for e, k in zip(ends, ("Min", "Max"), strict=True)]
    if None in extremes or set(extremes[0].inputs) != set(extremes[1].inputs):
        return None
    parts = [_slice(finder, n) for n in extremes[0].inputs]
    if len(parts) != 2 or not all(parts):
        return None
    (x, place, start, stop, step), other = sorted(parts, key=lambda p: p[2])
    axis, shape = node.get("axis"), shapes[0]
    if (start, step) != (0, 2) or other != (x, place, 1, stop, 2) or axis != place + 1:
        return None
    if not 1 <= axis < len(shape) or shape[axis] != 1 or stop != 2 * shape[axis - 1]:
        return None
    return x, axis, (*shape[:axis], 2, *shape[axis + 1 :])


def _reflected(finder, node):
    """[a - 2s·e, b + 2c·e], e = max(s·a - c·b, 0), of the halves of x."""
    ends = _two(finder, node) and [
        finder.giver(n, k) for n, k in zip(node.inputs, ("Sub", "Add"), strict=True)
    ]
    if not ends or None in ends:
        return None
    (a, turned), (b, other) = ends[0].inputs, ends[1].inputs
    halves = _halves(finder, a, b)
    products = [_by_array(finder, n) for n in (turned, other)]
    if not halves or halves[1] != node.get("axis") or None in products:
        return None
    (excess, twice_sine), (same, twice_cosine) = products
    positive = finder.giver(excess, "Relu")
    difference = positive and finder.giver(positive.inputs[0], "Sub")
    inner = difference and [_by_array(finder, n) for n in difference.inputs]
    if same != excess or not inner or None in inner or [inner[0][0], inner[1][0]] != [a, b]:
        return None
    sine, cosine = inner[0][1], inner[1][1]
    if len({v.shape for v in (sine, cosine, twice_sine, twice_cosine)}) > 1:
        return None
    exact = np.array_equal(2 * sine, twice_sine) and np.array_equal(2 * cosine, twice_cosine)
    # A sine and a cosine, each as single precision rounds it: longer vectors have a larger gain.
    if not exact or np.any(np.abs(np.hypot(sine, cosine) - 1) > _ROUNDED):
        return None
    long = [i - sine.ndim for i, n in enumerate(sine.shape) if n > 1]
    if len(long) > 1:
        return None
    settings = {"axis": halves[1], "size": halves[2], "place": long[0] if long else None}
    return "Reflected", halves[0], {**settings, "sine": sine.ravel(), "cosine": cosine.ravel()}


def _by_array(finder, name):
    """`(signal, float64 array)` of a product with a constant, or None."""
    node = finder.giver(name, "Mul")
    for signal, other in (node.inputs, node.inputs[::-1]) if node else ():
        array = finder.constants.get(other)
        if array is not None and finder.constants.get(signal) is None:
            return signal, np.asarray(array, np.float64)
    return None


# Norms ------------------------------------------------------------------------------------------


def _norm_pooled(finder, node):
    """A 2-norm of windows over the root of how many share a cell."""
    parts = finder.operands(node)
    pool = parts and finder.giver(parts[0], "LpPool")
    if not pool or pool.get("p", 2) != 2 or not pool.get("kernel_shape"):
        return None
    sizes = pool.get("kernel_shape")
    strides = pool.get("strides") or [1] * len(sizes)
    shared = math.prod(-(-q // s) for q, s in zip(sizes, strides, strict=True))
    if shared < 2 or not is_rounded(parts[1], 1 / math.sqrt(shared)):
        return None
    return "NormPool", pool.inputs[0], dict(pool.attributes)


def _power_pooled(finder, node):
    """(Σ |x|^p)^(1/p) over windows, by a mean of powers times how many there are."""
    root = 0.5 if node.kind == "Sqrt" else finder.number(node.inputs[1])
    scaled, back = _turned(finder, node.inputs[0])
    total = finder.giver(scaled, "Mul")
    parts = total and finder.operands(total)
    pool = parts and finder.giver(_positive(finder, parts[0]), "AveragePool")
    sizes = pool and pool.get("kernel_shape")
    if not root or not sizes or parts[1] != math.prod(sizes):
        return None
    if pool.get("ceil_mode", 0) or (any(pool.get("pads") or []) and not
                                    pool.get("count_include_pad", 0)):  # fmt: skip
        return None
    if pool.get("auto_pad", "NOTSET") not in ("NOTSET", "", "VALID"):
        return None
    powers, perm = _turned(finder, pool.inputs[0])
    power = finder.giver(powers, "Pow", "Mul")
    square = power and finder.squared(power)
    x, exponent = (square, 2.0) if square else (None, None)
    if power and not square and power.kind == "Pow":
        x, exponent = power.inputs[0], finder.number(power.inputs[1])
    if exponent is None or exponent < 1 or not is_rounded(root, 1 / exponent):
        return None
    size = finder.giver(x, "Abs")
    if size is None and exponent % 2:
        return None
    kept = {n: v for n, v in pool.attributes.items() if n not in ("count_include_pad", "ceil_mode")}
    kept |= {"p": exponent, "before": perm, "behind": back}
    return "PowerPool", x if size is None else size.inputs[0], kept


def _turned(finder, name):
    """`(value, axes)` of what a value is a transpose of; the value itself and None for none."""
    node = finder.giver(name, "Transpose")
    perm = node and node.get("perm")
    return (node.inputs[0], list(perm)) if perm else (name, None)


def _positive(finder, name):
    """The s of sign(s)·max(|s|, 0), as PyTorch writes a sum of powers; else the value itself."""
    node = finder.giver(name, "Mul")
    for first, second in (node.inputs, node.inputs[::-1]) if node and _two(finder, node) else ():
        sign, relu = finder.giver(first, "Sign"), finder.giver(second, "Relu", "Abs")
        size = finder.giver(relu.inputs[0], "Abs") if relu and relu.kind == "Relu" else relu
        if sign and size and sign.inputs[0] == size.inputs[0]:
            return sign.inputs[0]
    return name


# Functions --------------------------------------------------------------------------------------


def _softmax(finder, node):
    """exp(z)/Σ exp(z) over axes, z = x or x - max x."""
    powers = _two(finder, node) and finder.giver(node.inputs[0], "Exp")
    total = powers and finder.giver(node.inputs[1], "ReduceSum")
    if not total or total.inputs[0] != node.inputs[0] or not total.get("keepdims", 1):
        return None
    axes = finder.axes(total)
    if not axes:
        return None
    x = powers.inputs[0]
    difference = finder.giver(x, "Sub")
    largest = difference and finder.giver(difference.inputs[1], "ReduceMax")
    if largest and largest.inputs[0] == difference.inputs[0] and finder.axes(largest) == axes:
        x = largest.inputs[0] if largest.get("keepdims", 1) else x
    return "Softmax", x, {"axes": axes}


def _log_sigmoid(finder, node):
    """-softplus(-x), or log σ(x)."""
    inner = finder.giver(node.inputs[0], "Softplus" if node.kind == "Neg" else "Sigmoid")
    if inner is None or node.kind == "Log":
        return inner and ("LogSigmoid", inner.inputs[0], {"of_sigmoid": True})
    negative = finder.giver(inner.inputs[0], "Neg")
    return negative and ("LogSigmoid", negative.inputs[0], {})


def _tanh_shrink(finder, node):
    """x - tanh x."""
    inner = _two(finder, node) and finder.giver(node.inputs[1], "Tanh")
    same = inner and inner.inputs[0] == node.inputs[0]
    return ("TanhShrink", node.inputs[0], {}) if same else None


def _square_plus(finder, node):
    """½(x + √(x² + b))."""
    parts = finder.operands(node)
    total = parts and parts[1] == 0.5 and finder.giver(parts[0], "Add")
    for x, other in (total.inputs, total.inputs[::-1]) if total else ():
        root = finder.giver(other, "Sqrt")
        inner = root and finder.giver(root.inputs[0], "Add")
        held = inner and finder.operands(inner)
        square = held and finder.giver(held[0], "Mul", "Pow")
        if square and held[1] > 0 and finder.squared(square) == x:
            return "SquarePlus", x, {"b": held[1]}
    return None


def _sparse_plus(finder, node):
    """¼(1 + clip(x, -1, 1))² + max(x - 1, 0)."""
    if not _two(finder, node):
        return None
    quarter, above = finder.giver(node.inputs[0], "Mul"), finder.giver(node.inputs[1], "Relu")
    parts = quarter and finder.operands(quarter)
    square = parts and parts[1] == 0.25 and finder.giver(parts[0], "Mul", "Pow")
    base = square and finder.squared(square)
    clip = base and finder.giver(finder.plus_one(base) or "", "Clip")
    less = above and finder.giver(above.inputs[0], "Sub")
    if not clip or not less or finder.number(less.inputs[1]) != 1:
        return None
    limits = [finder.number(n) for n in clip.inputs[1:]]
    same = clip.inputs[0] == less.inputs[0] and limits == [-1.0, 1.0]
    return ("SparsePlus", less.inputs[0], {}) if same else None


def _rectified(finder, node):
    """x where x > 0, and s·x elsewhere, s ≥ 0."""
    condition, first, second = node.inputs
    test = finder.giver(condition, "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    if test is None or finder.number(test.inputs[1]) != 0:
        return None
    x = test.inputs[0]
    above, below = (first, second) if test.kind.startswith("Greater") else (second, first)
    signal, slope = (x, 0.0) if finder.number(below) == 0 else finder.linear(below, x)
    fits = above == x == signal and slope >= 0
    return ("Rectified", x, {"alpha": slope}) if fits else None


def _soft_shrink(finder, node):
    """x - t where x > t, plus x + t where x < -t."""
    for first, second in (node.inputs, node.inputs[::-1]) if _two(finder, node) else ():
        above, below = _beyond(finder, first, "Greater"), _beyond(finder, second, "Less")
        if above and below and above[0] == below[0] and above[1] == -below[1] >= 0:
            return "SoftShrink", above[0], {"lambd": above[1], "bias": above[1]}
    return None


def _signed_shrink(finder, node):
    """x - t·sign x where |x| > t, and 0 or 0·x elsewhere."""
    test = finder.giver(node.inputs[0], "Greater")
    size = test and finder.giver(test.inputs[0], "Abs")
    limit = test and finder.number(test.inputs[1])
    shifted = size and finder.giver(node.inputs[1], "Sub")
    if not shifted or limit is None or limit < 0:
        return None
    x = size.inputs[0]
    step, nothing = (finder.giver(n, "Mul") for n in (shifted.inputs[1], node.inputs[2]))
    step, nothing = step and finder.operands(step), nothing and finder.operands(nothing)
    sign = step and finder.giver(step[0], "Sign")
    is_zero = finder.number(node.inputs[2]) == 0 or (nothing and nothing[:2] == (x, 0))
    fits = sign and sign.inputs[0] == x == shifted.inputs[0] and step[1] == limit and is_zero
    return ("SoftShrink", x, {"lambd": limit, "bias": limit}) if fits else None


def _beyond(finder, name, kind):
    """`(x, t)` of the value that is x - t where x is beyond t, and 0 elsewhere."""
    node = finder.giver(name, "Where")
    test = node and finder.giver(node.inputs[0], kind)
    shifted = test and finder.giver(node.inputs[1], "Sub", "Add")
    parts = shifted and finder.operands(shifted)
    if not parts or parts[0] != test.inputs[0] or finder.number(node.inputs[2]) != 0:
        return None
    if shifted.kind == "Sub" and not parts[2]:
        return None
    moved = parts[1] if shifted.kind == "Sub" else -parts[1]
    return (parts[0], moved) if moved == finder.number(test.inputs[1]) else None


def _bent(finder, node):
    """clip(x, 0, m) + s·min(x, 0)."""
    above = _two(finder, node) and finder.giver(node.inputs[0], "Clip")
    below = above and finder.giver(node.inputs[1], "Mul")
    parts = below and finder.operands(below)
    least = parts and finder.giver(parts[0], "Min")
    other = least and finder.operands(least)
    limits = above and [finder.number(n) for n in above.inputs[1:]]
    if not other or other[1] != 0 or len(limits) != 2 or other[0] != above.inputs[0]:
        return None
    fits = limits[0] == 0 and (limits[1] or 0) > 0 and parts[1] >= 0
    settings = {"max_value": limits[1], "negative_slope": parts[1]}
    return ("Bent", other[0], settings) if fits else None


_PATTERNS = {
    "Concat": (_two_sided, _largest_first, _reflected),
    "Reshape": (_groups,),
    "Mul": (_norm_pooled, responses.response, _square_plus),
    "Div": (_softmax, responses.channel_response),
    "Neg": (_log_sigmoid,),
    "Log": (_log_sigmoid,),
    "Sub": (_tanh_shrink,),
    "Add": (_sparse_plus, _bent, _soft_shrink),
    "Where": (_rectified, _signed_shrink),
    "Pow": (_power_pooled,),
    "Sqrt": (_power_pooled,),
}
