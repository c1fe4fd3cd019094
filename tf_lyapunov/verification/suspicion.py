"""Whether layers, models and activations are Keras's own: by identity, never by a name.

Keras's methods and functions are remembered when this module is imported, and must come from
Keras's own files. A class, object or function that has changed since, a subclass that replaces
what computes, and an instance with a method of its own are refused.
"""

import inspect
import types
from pathlib import Path

import keras
from keras.src.models.functional import Functional

from tf_lyapunov.errors import UnsupportedLayerError

_HOME = str(Path(keras.__file__).parent)
# Keras itself puts these two on every instance.
_WRAPPED = {"build", "quantize"}
# What a subclass of a model may replace: it trains, loads or describes, and computes nothing.
_HARMLESS = {
    "__init__", "__new__", "__doc__", "__module__", "__dict__", "__weakref__", "__annotations__",
    "__firstlineno__", "__static_attributes__", "__qualname__", "__repr__", "train_step",
    "test_step", "compile", "fit", "evaluate", "get_config", "from_config", "compute_loss",
    "compute_metrics", "metrics", "summary", "save", "get_compile_config", "compile_from_config",
}  # fmt: skip
_LOOKUPS = ("__getattribute__", "__getattr__", "__setattr__", "__class__")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_WIDTHS = {"float16": 1, "bfloat16": 1, "float32": 2, "float64": 3}
_NAMES = (
    "linear", "relu", "relu6", "leaky_relu", "elu", "selu", "tanh", "sigmoid", "log_sigmoid",
    "hard_sigmoid", "softplus", "softsign", "silu", "gelu", "mish", "softmax", "log_softmax",
)  # fmt: skip


def _functions(value):
    if isinstance(value, property):
        return [f for f in (value.fget, value.fset) if f is not None]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    return [value] if isinstance(value, types.FunctionType) else []


def _fingerprint(value):
    """What a function, method or property computes with, compared by identity."""
    found = [value]
    for function in _functions(value):
        while function is not None:
            found += [function.__code__, function.__defaults__]
            defaults = function.__kwdefaults__
            found.append(None if defaults is None else tuple(sorted(defaults.items())))
            function = vars(function).get("__wrapped__")
    return found


def _same(first, second):
    return len(first) == len(second) and all(
        a is b or (isinstance(a, tuple) and a == b) for a, b in zip(first, second, strict=True)
    )


def _is_home(value):
    """Whether a function and all that it wraps are written in Keras's own files."""
    for function in _functions(value):
        while function is not None:
            code = getattr(function, "__code__", None)
            if code is None or not code.co_filename.startswith(_HOME):
                return False
            function = vars(function).get("__wrapped__")
    return True


def _keras_classes(cls):
    return [c for c in inspect.getmro(cls) if c.__module__.startswith("keras.src.")]


def _snapshot(cls):
    return {name: _fingerprint(v) for name, v in vars(cls).items() if _functions(v)}


_LAYERS = [
    cls for _, cls in inspect.getmembers(keras.layers, inspect.isclass)
    if issubclass(cls, keras.Layer)
]  # fmt: skip
_CLASSES = {
    cls: _snapshot(cls)
    for leaf in (*_LAYERS, Functional, keras.Sequential, keras.dtype_policies.DTypePolicy)
    for cls in _keras_classes(leaf)
}
_ACTIVATIONS = {
    name: (getattr(keras.activations, name), _fingerprint(getattr(keras.activations, name)))
    for name in _NAMES
}


def _refuse(what, name, reason):
    raise UnsupportedLayerError(
        f"The verifier believes Keras's own {what} alone: {reason}. Received: {name!r}. "
        "Build the model of unchanged Keras objects."
    )


def check_class(cls, name):
    """Refuses a Keras class whose methods have been replaced.

    Raises:
        UnsupportedLayerError: naming the method.
    """
    for owner in _keras_classes(cls):
        present, known = _snapshot(owner), _CLASSES.get(owner)
        if known is None:
            _refuse("classes", name, f"the class {owner.__name__} is not one of them")
        for method in set(present) | set(known):
            now = present.get(method, ())
            # A backend's base classes hold functions of the backend itself.
            is_home = owner.__module__.startswith("keras.src.backend.") or not now
            if not _same(now, known.get(method, ())) or not (is_home or _is_home(now[0])):
                _refuse("classes", name, f"{owner.__name__}.{method} has been replaced")


def check_instance(thing, what="layers"):
    """Refuses an object that carries a method of its own in the place of its class's.

    Raises:
        UnsupportedLayerError: naming the method.
    """
    for name in vars(thing):
        held = inspect.getattr_static(type(thing), name, None)
        if name not in _WRAPPED and _functions(held) and not isinstance(held, property):
            # Keras sets `loss` and the like on compiled models, where the class has a method.
            if isinstance(thing, keras.Model) and name in ("loss", "metrics", "optimizer"):
                continue
            _refuse(what, getattr(thing, "name", type(thing).__name__),
                    f"its `{name}` is not its class's own")  # fmt: skip


def check_layer(layer):
    """Refuses a layer that is not, exactly, an unchanged layer of Keras.

    Args:
        layer: an operation of a graph, or a layer used as an activation.

    Raises:
        UnsupportedLayerError: with what differs.
    """
    if type(layer) not in _LAYERS:
        _refuse("layers", layer.name, f"{type(layer).__name__} is not one of them")
    check_class(type(layer), layer.name)
    check_instance(layer)
    check_policy(layer)
    if layer.compute_dtype not in _FLOATS:
        _refuse("layers of floats", layer.name, f"it computes in {layer.compute_dtype}")


def check_policy(layer):
    """Refuses dtype policies that could do more than name a dtype."""
    policy = layer.dtype_policy
    if type(policy) is not keras.dtype_policies.DTypePolicy:
        _refuse("dtype policies", layer.name, f"{type(policy).__name__} is not a plain one")
    check_class(type(policy), layer.name)
    check_instance(policy, "dtype policies")


def check_model(model):
    """Refuses a model that may compute something else than its graph.

    Raises:
        UnsupportedLayerError: for a subclass that replaces what computes.
    """
    kind = next((c for c in (Functional, keras.Sequential) if isinstance(model, c)), None)
    if kind is None:
        raise UnsupportedLayerError(
            "A proof can be verified for Functional and Sequential models. Received: model "
            f"{model.name!r} of type {type(model).__name__}, with a `call` of its own."
        )
    for cls in inspect.getmro(type(model)):
        if cls in _CLASSES:
            break
        for name in vars(cls):
            if (name not in _HARMLESS and hasattr(kind, name)) or name in _LOOKUPS:
                _refuse("models", model.name, f"{cls.__name__} has a `call` or `{name}` of its own")
    check_class(kind, model.name)
    check_instance(model, "models")
    check_policy(model)
    inner = vars(model).get("_functional")
    if kind is keras.Sequential and inner is not None:
        if type(inner) is not Functional:
            _refuse("models", model.name, "its graph is of another type")
        check_instance(inner, "models")


def check_call(node, plural):
    """Refuses calls with anything beside their tensors: constants, masks, keywords.

    Args:
        node: of a graph.
        plural: whether the operation takes a list of tensors.
    """
    name, args, kwargs = node.operation.name, node.arguments.args, node.arguments.kwargs
    for key, value in kwargs.items():
        if not (value is None or (key == "training" and value is False)):
            _refuse("calls on tensors", name,
                    f"it is called with more than tensors, such as `training=True`, a mask or a "
                    f"keyword (`{key}`)")  # fmt: skip
    first = args[0] if len(args) == 1 else None
    tensors = list(first) if plural and isinstance(first, (list, tuple)) else [first]
    rest = len(args) != 1 or not all(isinstance(t, keras.KerasTensor) for t in tensors)
    if rest or [id(t) for t in tensors] != [id(t) for t in node.input_tensors]:
        _refuse("calls on tensors", name,
                "it is called on several tensors (a mask or a state), or on a constant "
                "with more than tensors")  # fmt: skip
    if len(node.outputs) != 1:
        _refuse("calls on tensors", name, "it returns several tensors")


def activation_key(function):
    """Name of a Keras activation, or None: only the very functions of `keras.activations`."""
    for name, (held, known) in _ACTIVATIONS.items():
        if function is held:
            same = _same(_fingerprint(held), known) and _is_home(held)
            return name if same else None
    return None


def cast_of(model, tensor, arriving):
    """Dtype that a nested model gives what arrives at its input, where that rounds it.

    A Sequential model casts to its own dtype first, then to that of its `Input`.

    Returns:
        None where nothing is rounded, or the narrower float dtype.

    Raises:
        UnsupportedLayerError: where an inner `Input` would truncate or round.
    """
    found = []
    if arriving not in _FLOATS:
        _refuse("nested models of floats", model.name, f"it reads {arriving}")
    if model._convert_input_args and model.autocast and model.compute_dtype in _FLOATS:
        if _WIDTHS[model.compute_dtype] < _WIDTHS[arriving]:
            found.append(model.compute_dtype)
            arriving = model.compute_dtype
    inner = keras.backend.standardize_dtype(tensor.dtype)
    fits = inner == arriving or _WIDTHS.get(inner, 0) > _WIDTHS[arriving]
    if not fits:
        _refuse("nested models without casts", model.name,
                f"its inner `Input` of dtype {inner} casts what arrives in {arriving}")  # fmt: skip
    return found[0] if found else None


def is_float(dtype):
    """Whether a dtype's name is one of the float types known here."""
    return dtype in _FLOATS
