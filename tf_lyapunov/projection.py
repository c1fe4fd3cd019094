"""Attaches spectral budgets to built Keras models and enforces them on demand.

Keras applies constraints nowhere but at the end of `optimizer.apply`: not after building, loading,
`set_weights` or weight averaging. `project` enforces them at once.
"""

import dataclasses
import numbers
from collections.abc import Mapping

import keras
import numpy as np

from tf_lyapunov.bounds.stages import stages as read_stages
from tf_lyapunov.constraints import ConicBound, NormalizationBound, SpectralBound
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.interruption import Undo
from tf_lyapunov.layers.base import EffectiveLayer, LipschitzLayer, refresh
from tf_lyapunov.optimizers.marks import is_marked
from tf_lyapunov.program import rounding
from tf_lyapunov.program.restoring import note_caches, without_nodes
from tf_lyapunov.progress import reports_progress, steps
from tf_lyapunov.spectral.reading import is_linear
from tf_lyapunov.theory.costs import SMALLEST_SIDE, announce


@reports_progress
def constrain(model, design, layers=None, *, guarantee="step", every=100, progress=None):
    """Sets the budgets of a design as constraints of a built model, and projects it.

    A stage is a layer with a kernel and what follows it up to the next one. Its budget bounds the
    gain of all its linear parts: a kernel before a pooling of gain g gets budget / g, the two
    kernels of a separable convolution get the root each, and batch normalizations after the kernel,
    or before the first one, are held at gain 1 (which `project` and `LyapunovMonitor` enforce,
    since their gain depends on the moving variance). A layer that several stages share gets the
    least of their budgets.

    Layers of this library that are bounded by construction have no kernel to project: their
    `max_gain` is lowered to the budget, and never raised. `OrthogonalDense` is left as it is under
    a budget of 1 or more: its gain is 1 up to rounding. In a model of nothing but layers that are
    bounded as a whole, such as `ConvexPotentialDense`, one number is the budget of each of them.

    Args:
        model: built Keras model (functional, sequential, subclassed or nested), compiled or not.
        design: a `Design`, a sequence of budgets (one per stage), one number for every stage, or a
            mapping from layer names to budgets. `None` as a budget leaves a stage unconstrained.
        layers: names of the layers, in the order of the budgets; by default all stages in order.
        guarantee: `"step"` holds the guaranteed bound after every optimizer step; `"monitor"`
            steers by an estimate at each step, and only `LyapunovMonitor` and `project` guarantee.
        every: with `guarantee="monitor"`, steps between the monitor's guaranteed projections.
        progress: whether to show how far it is, after two seconds; `None`: in a terminal and a
            notebook.

    Returns:
        The same model, with constraints set, weights projected, and compiled functions reset.

    Raises:
        TypeError: if `design` is True or False.
        ValueError: if the number of budgets differs from the number of stages, a layer is not
            there, its activation leaves the sector that the design assumed, or its kernel is
            orthogonal and the budget below 1. The model is as before then, as it is after Ctrl-C.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    >>> model = constrain(model, [0.5, 0.25])
    >>> model.layers[0].kernel_constraint.max_gain
    0.5
    """
    if isinstance(design, bool):
        raise TypeError(
            "`design` must be a `Design`, budgets, or one number for every layer. "
            f"Received: design={design}. Write `constrain(model, 1.0)` for gain 1 in every layer."
        )
    given = {}
    with Undo() as undo, without_nodes(model):
        note_caches(model, undo)
        found = read_stages(model)
        budgets = _budgets_by_stage(found, design, layers)
        if not found and isinstance(design, numbers.Real):
            for layer in model._flatten_layers():
                if isinstance(layer, LipschitzLayer):
                    _lower_gain(layer, float(design), undo)
        for position, (stage, budget) in enumerate(budgets):
            if budget is None:
                continue
            _check_sector(stage, getattr(design, "sectors", None), position)
            ball = (getattr(design, "balls", None) or [None] * len(budgets))[position]
            options = {"guarantee": guarantee, "every": every}
            _constrain_stage(stage, float(budget), ball, given, undo, **options)
        if guarantee == "step":
            _announce_steps(given)
        _reset_compiled_functions(model, undo)
        _enforce(model, undo)
    return model


def _announce_steps(given):
    """Warns of dense kernels so large that a guarantee at every step makes training slow."""
    for kernel, _, _ in given.values():
        side = min(kernel.shape) if len(kernel.shape) == 2 else 0
        if side >= SMALLEST_SIDE:
            announce(
                f"A guarantee at every step for the kernel {kernel.path!r} of "
                f"{kernel.shape[0]}×{kernel.shape[1]}",
                (4 * max(kernel.shape) * side**2 + 6 * side**3) / 2,  # in float32
                4 * (2 * side**2 * 4 + 2 * max(kernel.shape) * side),
                "That is for every step. Pass guarantee='monitor' and use `LyapunovMonitor`.",
            )


@reports_progress
def project(model, *, progress=None):
    """Enforces every spectral constraint of a model on its present weights.

    It also refreshes the caches of the model's Lipschitz layers (`layers.base.refresh`).

    Args:
        model: built Keras model.
        progress: as for `constrain`.

    Returns:
        The same model; kernels already inside their bounds keep every bit.

    Raises:
        ValueError: if a constrained kernel holds NaN or infinity. No weight is changed then, nor
            by Ctrl-C.
        UnsupportedLayerError: if a kernel under `SpectralBound` has a map that it does not bound
            (`EinsumDense` and attention, kernels of rank 3 or more outside convolutions).

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.constraints import SpectralBound
    >>> layer = keras.layers.Dense(2, kernel_constraint=SpectralBound(1.0), use_bias=False)
    >>> model = keras.Sequential([keras.Input((2,)), layer])
    >>> layer.set_weights([3.0 * np.eye(2)])
    >>> _ = project(model)
    >>> bool(np.linalg.norm(layer.kernel, 2) <= 1.0)
    True
    """
    with Undo() as undo:
        note_caches(model, undo)
        _enforce(model, undo)
    return model


def _enforce(model, undo):
    """Projects all kernels, then assigns them, and says how that is undone."""
    projected = []
    for layer, variable in steps(list(constrained_variables(model)), "kernels"):
        _check_map(layer, variable)
        if not np.all(np.isfinite(keras.ops.convert_to_numpy(variable.value))):
            raise ValueError(
                f"A constrained kernel must be finite. Received: NaN or infinity in "
                f"{variable.path!r}. The model has diverged: restore an earlier checkpoint and "
                f"lower the learning rate."
            )
        constraint = variable.constraint
        if isinstance(constraint, NormalizationBound):
            value = constraint.project(variable, layer.moving_variance, layer.epsilon)
        else:
            value = constraint.project(keras.ops.stop_gradient(variable.value))
        projected.append((variable, value))
    for variable, value in projected:
        undo.assign(variable, value)
    refresh(model)


def constrained_variables(model):
    """`(layer, variable)` for every variable under one of this library's constraints, once each."""
    seen = set()
    for layer in model._flatten_layers(include_self=True):
        for variable in layer._trainable_variables + layer._non_trainable_variables:
            ours = isinstance(variable.constraint, (SpectralBound, ConicBound, NormalizationBound))
            if ours and id(variable) not in seen:
                seen.add(id(variable))
                yield layer, variable


def _check_map(layer, variable):
    """Refuses a bound on a kernel whose map in its layer is not the one that is bounded."""
    if not isinstance(variable.constraint, SpectralBound) or is_linear(layer):
        return
    einsum = isinstance(layer, keras.layers.EinsumDense)
    if einsum and _is_matrix_product(layer.equation, len(variable.shape)):
        return
    if einsum or len(variable.shape) > 2:
        raise UnsupportedLayerError(
            "`SpectralBound` bounds matrices and the kernels of convolutions. Received: kernel "
            f"{variable.path!r} of shape {tuple(variable.shape)} in a layer of type "
            f"{type(layer).__name__}, whose map is another. Use a Dense or convolution layer, or "
            "remove the constraint."
        )


def _is_matrix_product(equation, rank):
    """Whether an einsum multiplies one axis of its input by a matrix, at every place alike."""
    inputs, outputs = equation.replace(" ", "").replace("...", "").split("->")
    inputs, kernel = inputs.split(",")
    summed, free = set(kernel) - set(outputs), set(kernel) - set(inputs)
    repeated = set(inputs) & set(outputs)
    return (
        rank == len(kernel) == 2
        and len(summed) == len(free) == 1
        and summed == set(inputs) - repeated
        and free == set(outputs) - repeated
    )


def _budgets_by_stage(found, design, layers):
    """Pairs (stage, budget or None), in the order of the design."""
    names = {stage.name: stage for stage in found}
    if isinstance(design, Mapping):
        layers, budgets = list(design), list(design.values())
    elif isinstance(design, numbers.Real):
        budgets = [design] * (len(found) if layers is None else len(layers))
    else:
        budgets = list(getattr(design, "budgets", design))
    if layers is not None:
        layers = [getattr(layer, "name", layer) for layer in layers]
        missing = [name for name in layers if name not in names]
        if missing:
            raise ValueError(
                f"`layers` must name layers with a kernel. Received: {missing}. "
                f"The model has {list(names)}."
            )
        found = [names[name] for name in layers]
    if len(budgets) != len(found):
        raise ValueError(
            f"A design needs one budget per stage. Received: {len(budgets)} budgets for "
            f"{len(found)} stages {[stage.name for stage in found]}. Design for {len(found)} "
            f"sectors, or pass `layers=` to say which layers the budgets are for."
        )
    return list(zip(found, budgets, strict=True))


def _check_sector(stage, sectors, position):
    if sectors is None:
        return
    assumed, actual = sectors[position], stage.sector
    if actual.alpha < assumed.alpha or actual.beta > assumed.beta:
        raise ValueError(
            f"Layer {stage.name!r} has an activation of sector [{actual.alpha}, {actual.beta}], "
            f"which leaves the design's. Received: sector [{assumed.alpha}, {assumed.beta}] for "
            f"stage {position}. Design with `Sector.of` of the layer's own activation."
        )


def _constrain_stage(stage, budget, ball, given, undo, *, guarantee, every):
    """Sets a stage's constraints; `given` holds those of kernels that earlier stages share."""
    fixed_gain = stage.pre_gain * stage.post_gain
    norms = (*stage.pre_batch_norms, *stage.batch_norms, *stage.post_batch_norms)
    for normalization in norms:
        _constrain_normalization(normalization, undo)
    if ball is not None:
        _set_conic(stage, ball, given, undo)
        return
    # A stage whose other steps have gain 0 is within any budget: its kernels keep to it themselves.
    share = (budget / (fixed_gain or 1.0)) ** (1 / len(stage.maps))
    if isinstance(stage.layer, LipschitzLayer):
        _lower_gain(stage.layer, share, undo)
        return
    for kernel, linear_map in stage.maps:
        if _is_kept(stage.layer, kernel):
            if share < 1.0:
                _refuse_kept(stage.layer)
            continue
        _, least, known = given.get(id(kernel), (kernel, share, linear_map))
        if known != linear_map:  # called at several sizes: bounded at every one
            linear_map = dataclasses.replace(linear_map, input_shape=None)
        least = min(least, share)
        given[id(kernel)] = kernel, least, linear_map
        constraint = SpectralBound.for_map(linear_map, least, guarantee=guarantee, every=every)
        _attach(stage.layer, kernel, constraint, undo)


def _lower_gain(layer, budget, undo):
    """Has a layer that is bounded by construction keep to a budget, if it does not yet."""
    if not layer.guaranteed:
        raise UnsupportedLayerError(
            "A budget needs a layer whose gain is bounded while it is trained. Received: layer "
            f"{layer.name!r} of type {type(layer).__name__} with norm={layer.norm!r}. Use "
            "norm='bound' and a step of at most 1."
        )
    # Where weights of 16 bits cost more than `max_gain`, by how much depends on it a little.
    for _ in range(8):
        inflation = layer.rounding_inflation
        if rounding.product_up(layer.max_gain, inflation) <= budget:
            return
        gain = budget if inflation == 1.0 else budget / inflation * (1 - 2.0**-40)
        for name, value in layer.settings_of_gain(gain).items():
            undo.set(layer, name, value)
    raise ValueError(
        f"No `max_gain` of layer {layer.name!r} of type {type(layer).__name__} keeps its weights, "
        f"rounded to {layer.compute_dtype}, within a budget. Received: budget={budget}. Use a "
        "larger one, or another dtype policy."
    )


def _set_conic(stage, ball, given, undo):
    kernel, linear_map = stage.maps[0]
    square = linear_map.kind == "dense" and kernel.shape[0] == kernel.shape[1]
    if not (square and stage.is_bare) or isinstance(stage.layer, LipschitzLayer):
        raise ValueError(
            f"A conic design needs square dense layers with nothing but an activation after them. "
            f"Received: layer {stage.name!r} with kernel {tuple(kernel.shape)}. "
            f"Choose a claim with nu < 0 for other shapes."
        )
    center, radius = ball
    if given.setdefault(id(kernel), (kernel, center, radius))[1:] != (center, radius):
        raise ValueError(
            f"A shared layer can be in one ball only. Received: layer {stage.name!r} for "
            f"{given[id(kernel)][1:]} and {ball}."
        )
    _attach(stage.layer, kernel, ConicBound(center, radius), undo)


def _constrain_normalization(layer, undo):
    if not layer.scale:
        raise ValueError(
            f"A BatchNormalization under a budget must have a scale to be bounded by. Received: "
            f"layer {layer.name!r} with scale=False. Build it with `scale=True`."
        )
    _attach(layer, layer.gamma, NormalizationBound(1.0), undo)


# Where a layer's config saves the constraint of a variable.
_GUARDED = {
    "kernel_constraint": ("kernel",),
    "depthwise_constraint": ("depthwise_kernel", "kernel"),
    "pointwise_constraint": ("pointwise_kernel",),
    "gamma_constraint": ("gamma",),
}


def _is_kept(layer, kernel):
    """Whether an optimizer keeps the kernel orthogonal, or factors that it is computed from."""
    factors = layer.trainable_variables if isinstance(layer, EffectiveLayer) else ()
    return any(map(is_marked, (kernel, *factors)))


def _refuse_kept(layer):
    raise ValueError(
        "A kernel that the optimizer keeps orthogonal takes no constraint, which would move it "
        f"off again. Received: layer {layer.name!r} of type {type(layer).__name__} under a "
        "budget below 1. Its gain is 1 up to rounding: leave it out of `layers`, or put "
        "`keras.layers.Rescaling` behind it."
    )


def _attach(layer, variable, constraint, undo):
    """Sets the constraint on the variable and in the attribute that the layer's config saves."""
    if _is_kept(layer, variable):
        _refuse_kept(layer)
    for attribute, names in _GUARDED.items():
        guarded = any(getattr(layer, name, None) is variable for name in names)
        if guarded and hasattr(layer, attribute):
            undo.set(layer, attribute, constraint)
    undo.set(variable, "constraint", constraint)


def _reset_compiled_functions(model, undo):
    """A compiled training step has the old constraints traced into it."""
    for function in ("train_function", "test_function", "predict_function"):
        if getattr(model, function, None) is not None:
            undo.set(model, function, None)
