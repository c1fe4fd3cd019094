"""What a model's configuration names: classes and functions that run no code of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Classes that run code or read other files when they are loaded.
_FORBIDDEN = {
    "Lambda": "holds Python code, which could do anything",
    "TFSMLayer": "runs a TensorFlow program from another path",
    "TorchModuleWrapper": "runs pickled Python code",
    "JaxLayer": "runs stored code",
    "FlaxLayer": "runs stored code",
}
_PACKAGES = ("keras", "tf_lyapunov", "builtins")
# Keras' getters of these settings accept any public callable, and call it.
_SETTINGS = ("activation", "initializer", "regularizer", "constraint")
_GETTERS = ("get", "serialize", "deserialize")


def objections(config: dict) -> Iterator[str]:
    """Reasons against loading a configuration, as parts of sentences."""
    for item in objects(config):
        yield from _class_objections(item)
        for key, value in item.items():
            for setting in _SETTINGS:
                if isinstance(key, str) and key.endswith(setting):
                    yield from _setting_objections(key, setting, value)


def objects(node: Any) -> Iterator[dict]:
    """Every mapping in a configuration, without recursion (it may be nested without end)."""
    stack = [node]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _class_objections(item):
    name, module = item.get("class_name"), item.get("module")
    if not isinstance(name, str):
        return
    held = item.get("config")
    is_code = name == "function" and "code" in str(held)[:200]
    if name == "__lambda__" or is_code:
        yield "it holds Python code (a lambda function)"
    elif name in _FORBIDDEN:
        layer = held.get("name") if isinstance(held, dict) else None
        yield f"the layer {layer or name!r} is a {name}, which {_FORBIDDEN[name]}"
    elif isinstance(module, str) and module.split(".")[0] not in _PACKAGES:
        yield f"the class {module}.{name} belongs neither to Keras nor to tf_lyapunov"
    elif name == "function" and not _is_activation(item):
        yield f"the function {_shown(held)} is no activation"


def _setting_objections(key, setting, value):
    if isinstance(value, str):
        if value not in _names(setting):
            yield f"{key}={_shown(value)} names no {setting} of Keras"
    elif isinstance(value, dict) and isinstance(value.get("class_name"), str):
        if value["class_name"] == "__lambda__":
            return  # said of the object itself
        if value["class_name"] == "function":
            if setting != "activation":
                yield f"{key} is a function, which no {setting} of a saved model is"
            return  # the function itself is looked at as an object
        module, registered = str(value.get("module")), str(value.get("registered_name"))
        ours = registered.startswith("tf_lyapunov>") or module.startswith("tf_lyapunov.")
        rooms = ("layers", "activations") if setting == "activation" else (f"{setting}s",)
        theirs = module in [f"keras.{room}" for room in rooms]
        # Older files name a built-in by its class alone.
        plain = value.get("module") is None and value["class_name"] in _names(setting)
        if not (ours or theirs or plain):
            yield f"{key}={module}.{value['class_name']} is no {setting}"


def _is_activation(item):
    name, module = item.get("config"), item.get("module")
    registered = item.get("registered_name")
    if isinstance(registered, str) and registered.startswith("tf_lyapunov>"):
        return True
    known = isinstance(name, str) and name in _names("activation")
    return known and module in (None, "builtins", "keras.activations")


def _names(setting):
    import keras

    room = getattr(keras, f"{setting}s")
    return [n for n in dir(room) if callable(getattr(room, n)) and n not in _GETTERS]


def _shown(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
