"""What a bound of a network cannot go below, beside what it takes, in one process.

The model is called twice, as its user calls it and layer by layer, to be compared with its reading.
Norms of convolutions by frequencies form Gram matrices and factorise sI - G at every frequency:
their products are counted, as `theory.gram_symbols` takes them, and timed as one product of
matrices of as many.
"""

import time

TITLE = "Bounds of networks: CPU seconds, and what they cannot go below"
SCALE = True
CASES = (("DepthwiseConv2D", 32), ("MobileNetV2", 32), ("VGG16", 32), ("ResNet50", 224))
_SIDE, _TRIES, _CALLS = 1024, 3, 3


def measure(quick):
    """One row per network; the norms alone are those that `project` of it needs too."""
    from benchmarks.timed_bounds import _network

    rows, rate = [], _rate()
    for name, side in CASES[: 2 if quick else None]:
        model = _network(name, side)
        norms = _norm_flops(model) / 1e9
        row = {"network": f"{name}, {side}", "norms, GFLOP": norms}
        row["norms at the rate of products, s"] = norms * 1e9 / rate
        if side < 224:
            row |= _of_calls(model)
        rows.append(row)
    return {"rows": rows, "GFLOP/s": rate / 1e9}


def _of_calls(model):
    import numpy as np

    import tf_lyapunov as tfl

    x = np.random.default_rng(0).normal(size=(4, *model.input_shape[1:])).astype("float32")
    calls = min(_seconds(lambda: model(x, training=False)) for _ in range(_CALLS + 1))
    bound = _seconds(lambda: tfl.lipschitz_upper_bound(model))
    return {"two calls of the model, s": 2 * calls, "bound, s": bound}


def _seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def _rate():
    """Floating-point operations a CPU second of float64 products with one thread."""
    import numpy as np

    from tf_lyapunov.theory.threads import one_thread

    a = np.random.default_rng(0).normal(size=(_SIDE, _SIDE))
    with one_thread():
        return 2 * _SIDE**3 / min(_seconds(lambda: a @ a) for _ in range(_TRIES))


def _norm_flops(model):
    """Real operations of the Gram matrices and Cholesky factors of a model's kernels."""
    from tf_lyapunov.program.graph import read_graph
    from tf_lyapunov.program.weights import is_linear, kernel_maps

    total, seen = 0.0, set()
    for call in read_graph(model).calls:
        layer = call.operation
        if is_linear(layer) and id(layer) not in seen:
            seen.add(id(layer))
            for variable, linear_map in kernel_maps(layer, call.inputs[0].shape):
                total += _map_flops(tuple(variable.shape), linear_map)
    return total


def _map_flops(shape, linear_map):
    import math

    import numpy as np

    from tf_lyapunov.theory.eigenvalues import SMALL_SIDE
    from tf_lyapunov.theory.gram_symbols import interpolates
    from tf_lyapunov.theory.operators import as_convolution
    from tf_lyapunov.theory.symbols import Symbol, circulant

    side = min(shape[-2:])
    if linear_map.kind == "dense" or math.prod(shape[:-2]) == 1:
        return max(shape[-2:]) * side**2 + side**3 / 3
    blocks, axes = as_convolution(np.ones(shape), linear_map)
    kept, periods, _ = circulant(axes)
    symbol = Symbol(blocks[:1], kept, periods)
    rows, side = symbol.shape
    count = len(symbol.frequencies)
    if side <= SMALL_SIDE:
        return len(blocks) * count * (4 * rows * side**2 + 4 / 3 * side**3)
    if interpolates(symbol):
        angles = math.prod(2 * a.taps - 1 for a in symbol.axes)
        formed = (angles // 2 + 1) * 4 * rows * side**2
        return formed + count * (4 * angles * side**2 + 4 / 3 * side**3)
    return count * (4 * rows * side**2 + 4 / 3 * side**3)
