"""What one training step computes and keeps, counted on the graph of a built model.

A multiply-add is two FLOPs. Maps (dense layers, convolutions of every kind) are counted exactly,
taps that read the zero padding included, as libraries compute them:

    forward 2·|K|·P + |b|·P',   backward 2·(2·|K|·P) + |b|·P',                              (1)

|K| entries of the kernel, each used at P positions. The backward pass is one such product for the
kernel and one for the input, which a model's first layer is spared. Everything else counts its
operations per entry, where a transcendental function is one operation.
"""

from __future__ import annotations

import dataclasses
import importlib
import math

import keras

from tf_lyapunov import layers as own
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.orthogonal_kernel import OrthogonalKernel
from tf_lyapunov.program.graph import read_graph
from tf_lyapunov.spectral.reading import is_linear, linear_maps

k = keras.layers

_VIEWS = (k.Flatten, k.Reshape, k.InputLayer, k.Identity)
# Rearrangements and regularizing layers without arithmetic at inference.
_COPIES = (
    k.Permute, k.ZeroPadding1D, k.ZeroPadding2D, k.ZeroPadding3D, k.Cropping1D, k.Cropping2D,
    k.Cropping3D, k.Concatenate, k.RepeatVector, k.UpSampling1D, k.UpSampling2D, k.UpSampling3D,
    own.ChannelPadding, own.Truncate, own.InvertibleDownSampling, own.InvertibleUpSampling,
    own.Padding2D, own.ShiftMixing,
)  # fmt: skip
_NORMALIZATIONS = (k.BatchNormalization, k.LayerNormalization, k.GroupNormalization)
_MERGES = (k.Add, k.Subtract, k.Average, k.Maximum, k.Minimum, own.ConvexCombination)
_MAX_POOLS = (k.MaxPooling1D, k.MaxPooling2D, k.MaxPooling3D)
_AVERAGE_POOLS = (k.AveragePooling1D, k.AveragePooling2D, k.AveragePooling3D)
_GLOBAL_POOLS = (
    k.GlobalAveragePooling1D, k.GlobalAveragePooling2D, k.GlobalAveragePooling3D,
    k.GlobalMaxPooling1D, k.GlobalMaxPooling2D, k.GlobalMaxPooling3D,
)  # fmt: skip
_ENTRYWISE = (
    k.Activation, k.ReLU, k.LeakyReLU, k.ELU, k.PReLU, k.Softmax, k.Rescaling, own.MaxMin,
    own.GroupSort, own.TwoSidedReLU, own.LipschitzPReLU, own.PositionBias,
)  # fmt: skip
# Operations per entry, forwards in training and backwards: mean 1, variance 3, normalization 4;
# backwards two sums over the batch, 5, and the input's gradient, 6.
_NORMALIZATION = (8, 11)
# (a, b) of a local response: squares, window sum (by a running sum or a product), power, quotient.
_RESPONSE = (6, 12)


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Cost of one call of a layer, per sample.

    Attributes:
        name: name of the call, with the nested models it is in.
        kind: class of the layer.
        parameters: entries of its variables.
        trainable: entries of its trainable variables.
        inputs, outputs: entries it reads and writes.
        forward, backward: FLOPs.
        kept: entries that the backward pass needs, those that other layers keep left out.
        is_map: whether its FLOPs are matrix products.
        how: "exact" (1), "per entry", or "traced" by the backend.
        maps: tuple of (kernel shape, `LinearMap`), for the cost of a guaranteed bound.
    """

    name: str
    kind: str
    parameters: int
    trainable: int
    inputs: int
    outputs: int
    forward: int
    backward: int
    kept: int
    is_map: bool
    how: str
    maps: tuple = ()


def layer_costs(model: keras.Model) -> list[LayerCost]:
    """Costs of every call in a built model's graph, in the order of the calls.

    Args:
        model: built Functional, Sequential or traceable model; nested models are opened.

    Returns:
        List of `LayerCost`; a layer that is called twice has its parameters counted once.

    Raises:
        UnsupportedLayerError: naming a layer whose operations cannot be counted.
        ValueError: if the model is not built, or leaves a size open.

    Example:

    >>> x = keras.Input((4, 4, 3))
    >>> cost = layer_costs(keras.Model(x, keras.layers.Conv2D(8, 3, padding="same")(x)))[0]
    >>> cost.forward == 2 * 27 * 8 * 16 + 8 * 16, cost.parameters, cost.how
    (True, 224, 'exact')
    """
    graph = read_graph(model)
    needs_gradient, aliases, kept_once, seen = set(), {}, set(), set()
    costs = []
    for call in graph.calls:
        sizes = [_size(t, call) for t in (*call.inputs, *call.outputs)]
        read, written = sum(sizes[: len(call.inputs)]), sum(sizes[len(call.inputs) :])
        layer = call.operation
        variables = _variables(layer, seen)
        trainable = sum(size for size, trains in variables if trains)
        passes = any(t.producer in needs_gradient for t in call.inputs)
        forward, backward, keeps, is_map, how, maps = _count(call, read, written, passes)
        if isinstance(layer, _VIEWS):
            source = call.inputs[0]
            aliases[_key(call.outputs[0])] = aliases.get(_key(source), _key(source))
        trains = passes or bool(getattr(layer, "trainable_variables", ()))
        if trains:
            needs_gradient.add(call.name)
        kept = 0
        for tensor in keeps if trains else ():
            key = tensor if isinstance(tensor, str) else aliases.get(_key(tensor), _key(tensor))
            # The batch itself is in memory anyway, but counts: it is on the device.
            if key not in kept_once:
                kept_once.add(key)
                kept += written if isinstance(tensor, str) else _size(tensor, call)
        costs.append(
            LayerCost(
                name=call.name,
                kind=type(layer).__name__,
                parameters=sum(size for size, _ in variables),
                trainable=trainable,
                inputs=read,
                outputs=written,
                forward=int(forward),
                backward=int(backward) if trains else 0,
                kept=kept,
                is_map=is_map,
                how=how,
                maps=maps,
            )
        )
    return costs


def _count(call, read, written, passes):
    """(forward, backward, tensors kept, is_map, how, maps) of one call."""
    layer, x, y = call.operation, call.inputs, call.outputs
    if is_linear(layer) and len(x) == 1:
        return _linear(call, written, passes)
    if isinstance(layer, (*_VIEWS, *_COPIES)):
        return 0, 0, (), False, "per entry", ()
    if isinstance(layer, _NORMALIZATIONS):
        up, down = _NORMALIZATION
        return up * read, down * read, x, False, "per entry", ()
    if isinstance(layer, own.LocalResponseNormalization):
        up, down = _RESPONSE
        return up * read, down * read, (*x, *y), False, "per entry", ()
    if isinstance(layer, k.Dropout):
        return 2 * read, read, (call.name + "/mask",), False, "per entry", ()
    if isinstance(layer, _MERGES):
        return max(len(x) - 1, 1) * written, read, (), False, "per entry", ()
    if isinstance(layer, k.Multiply):
        return (len(x) - 1) * written, read, x, False, "per entry", ()
    if isinstance(layer, (*_MAX_POOLS, *_AVERAGE_POOLS)):
        window = math.prod(_per_axis(layer.pool_size))
        keeps = (*x, *y) if isinstance(layer, _MAX_POOLS) else ()
        return window * written, window * written, keeps, False, "per entry", ()
    if isinstance(layer, _GLOBAL_POOLS):
        return read, read, (), False, "per entry", ()
    if isinstance(layer, _ENTRYWISE):
        # TensorFlow keeps one of the two, XLA both where the derivative reads the output.
        keeps = (*x, *y) if _reads_output(layer) else x
        return read, 2 * read, keeps, False, "per entry", ()
    forward = traced_flops(layer, [t.shape for t in x]) if isinstance(layer, k.Layer) else read
    is_map = isinstance(layer, (own.LipschitzLayer, OrthogonalKernel))
    keeps = (*x, *y, call.name + "/inside") if is_map else (*x, *y)
    how = "traced" if isinstance(layer, k.Layer) else "per entry"
    return forward, (1 + passes) * forward, keeps, is_map, how, ()


def _linear(call, written, passes):
    layer, shape = call.operation, call.inputs[0].shape
    macs, maps, positions_in = 0, [], math.prod(shape[1:-1])
    for kernel, linear_map in linear_maps(layer, shape):
        if linear_map.kind == "dense":
            positions = positions_in
        elif linear_map.kind == "conv_transpose":
            positions = math.prod(linear_map.input_shape[:-1])
        else:
            positions = math.prod(linear_map.output_shape(tuple(kernel.shape))[:-1])
        macs += math.prod(kernel.shape) * positions
        maps.append((tuple(int(n) for n in kernel.shape), linear_map))
    between = 0
    if len(maps) == 2:  # a separable convolution keeps what is between its kernels
        between = math.prod(maps[1][1].input_shape)
    bias = written if layer.use_bias else 0
    slope = 0 if layer.activation is keras.activations.linear else written
    keeps = [call.inputs[0]]
    if slope:
        keeps.append(call.outputs[0])
    if between:
        keeps.append(call.name + "/depthwise")
    trains = bool(layer.trainable_variables)
    products = int(trains) + int(passes or len(maps) == 2)
    backward = products * 2 * macs + bias + 2 * slope
    return 2 * macs + bias + slope, backward, keeps, True, "exact", tuple(maps)


def traced_flops(layer, shapes) -> int:
    """FLOPs of a layer's call on one sample, as the backend counts them in its graph.

    By XLA on JAX, by TensorFlow's profiler on TensorFlow (which counts products and sums of
    registered operations alone).

    Args:
        layer: built Keras layer.
        shapes: list of input shapes, batch axis first.

    Returns:
        Integer.

    Raises:
        UnsupportedLayerError: on other backends, or where the graph cannot be traced.
    """
    shapes = [(1, *shape[1:]) for shape in shapes]
    backend = keras.backend.backend()

    def call(*x):
        return layer(x[0] if len(x) == 1 else list(x))

    try:
        if backend == "jax":
            jax = importlib.import_module("jax")
            inputs = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
            return int(jax.jit(call).lower(*inputs).cost_analysis()["flops"])
        if backend == "tensorflow":
            return _tensorflow_flops(call, shapes)
    except Exception as error:
        raise _uncountable(layer, error) from error
    raise _uncountable(layer, f"backend {backend!r}")


def _tensorflow_flops(call, shapes):
    tf = importlib.import_module("tensorflow")
    specs = [tf.TensorSpec(shape, "float32") for shape in shapes]
    graph = tf.function(call).get_concrete_function(*specs).graph
    profiler = tf.compat.v1.profiler
    options = profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation())
    found = profiler.profile(graph, options=options.with_empty_output().build())
    return int(found.total_float_ops)


def _uncountable(layer, reason):
    return UnsupportedLayerError(
        "The operations of a layer must be known, or countable by JAX or TensorFlow. Received: "
        f"layer {layer.name!r} of type {type(layer).__name__} ({reason})."
    )


def _reads_output(layer):
    if isinstance(layer, k.Activation):
        names = ("relu", "sigmoid", "tanh", "softmax", "elu")
        return layer.activation in [getattr(keras.activations, name) for name in names]
    return type(layer) in (k.ReLU, k.Softmax, k.ELU)


def _per_axis(size):
    return size if isinstance(size, (tuple, list)) else (size,)


def _variables(layer, seen):
    """(entries, trainable) of the layer's variables that were not counted before."""
    found = []
    for variable in getattr(layer, "variables", ()):
        is_seed = keras.backend.standardize_dtype(variable.dtype).startswith(("uint", "int"))
        if id(variable) not in seen and not is_seed:
            seen.add(id(variable))
            found.append((math.prod(variable.shape), variable.trainable and layer.trainable))
    return found


def _key(tensor):
    return f"{tensor.producer}:{tensor.index}"


def _size(tensor, call):
    if tensor.size is None:
        raise ValueError(
            f"A plan needs every size. Received: shape {tensor.shape} at {call.name!r}. Build the "
            "model with a full input shape."
        )
    return tensor.size
