"""Reading experiment files: YAML in, `ExperimentConfig` out, with errors that point to the line."""

from __future__ import annotations

import difflib
import math
import os
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import ConfigError
from .config import ExperimentConfig
from .shipped import shipped_config, shipped_configs
from .yamlsize import MAX_BYTES, check_size


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"keys must be text, not {key!r}", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key}' is given twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _lines(node: yaml.Node | None, path: tuple = ()) -> dict[tuple, int]:
    """Line number of every field, keyed by its path."""
    lines: dict[tuple, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*path, key.value)] = key.start_mark.line + 1
            lines.update(_lines(value, (*path, key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            lines.update(_lines(value, (*path, index)))
    return lines


def load_config(path: str | os.PathLike, overrides: typing.Sequence[str] = ()) -> ExperimentConfig:
    """Read and validate an experiment file.

    Args:
        path: YAML file, or the name of one that comes with the library ("lyapunov/digits").
        overrides: texts "key.subkey=value" that replace fields; values are read as YAML.

    Returns:
        An `ExperimentConfig`; its name is the file's name unless the file gives one.

    Raises:
        ConfigError: the file is unreadable or not YAML, a key is unknown, or a value is wrong.
            The message names the line, the field, the value, and the nearest known key.
    """
    path = Path(path)
    if not path.exists() and path.as_posix() in shipped_configs():
        path = shipped_config(path.as_posix())
    try:
        if path.exists() and not path.is_file():
            kind = "directory" if path.is_dir() else "pipe or device"
            raise ConfigError(
                f"A configuration is a regular file. Received: {path}, a {kind}. Write it to a "
                "file first."
            )
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(
                f"A configuration has at most {MAX_BYTES} bytes. Received: {path} with "
                f"{path.stat().st_size}. Is it an experiment file?"
            )
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"The configuration file cannot be read: {reason}. Received: {path}. "
            "`tf-lyapunov configs list` shows those that come with the library."
        ) from error
    return parse_config(text, source=str(path), default_name=path.stem, overrides=overrides)


def parse_config(
    text: str,
    source: str = "configuration",
    default_name: str | None = None,
    overrides: typing.Sequence[str] = (),
) -> ExperimentConfig:
    """Validate an experiment given as YAML text.

    Args:
        text: YAML.
        source: what to call the text in messages.
        default_name: the experiment's name if the text gives none.
        overrides: as in `load_config`.

    Returns:
        An `ExperimentConfig`.

    Raises:
        ConfigError: as in `load_config`.

    Example:

    >>> text = "{dataset: {name: digits}, model: {name: mlp}, training: {epoch: 3}}"
    >>> parse_config(text)
    Traceback (most recent call last):
    ...
    tf_lyapunov.errors.ConfigError: configuration, line 1: `training.epoch` is not a known key. \
Did you mean `epochs`? Received: training.epoch=3.
    """
    try:
        check_size(text)
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader
        lines = _lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{source}{where}: not valid YAML: {problem}.") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: not valid YAML: nested too deeply.") from error
    except ValueError as error:  # a date or number that is none
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: not valid YAML: {error}.") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{source}: a configuration is a mapping of keys to values. Received: "
            f"{type(data).__name__}."
        )
    for override in overrides:
        _override(data, override)
    if default_name is not None:
        data.setdefault("name", default_name)
    try:
        return ExperimentConfig.model_validate(data)
    except ValidationError as error:
        messages = [_message(source, data, lines, item) for item in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(messages))) from None


def _override(data: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(
            "An override is written key=value, for example training.epochs=3. Received: "
            f"{override!r}."
        )
    try:
        check_size(text)
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        shown = override if len(override) <= 200 else override[:200] + "…"
        raise ConfigError(f"The value of an override must be YAML. Received: {shown!r}.") from error
    *parents, last = key.strip().split(".")
    target: Any = data
    for part in parents:
        if isinstance(target, list) and part.isdigit() and int(part) < len(target):
            target = target[int(part)]
        elif isinstance(target, dict):
            if not isinstance(target.get(part), dict | list):
                target[part] = {}
            target = target[part]
        else:
            raise ConfigError(f"The override does not lead to a field. Received: {override!r}.")
    if isinstance(target, list):
        if not last.isdigit() or int(last) >= len(target):
            raise ConfigError(f"The override does not lead to a field. Received: {override!r}.")
        target[int(last)] = value
    else:
        target[last] = value


# ----------------------------------------------------------------------------------- messages


def _union_members(annotation: Any) -> list[Any]:
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for arg in typing.get_args(annotation) for m in _union_members(arg)]
    return [annotation]


def _tag(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("name")
    values = typing.get_args(field.annotation) if field else ()
    return values[0] if len(values) == 1 else None


def _walk(location: tuple) -> tuple[tuple, type[BaseModel] | None]:
    """Path in the YAML file of a pydantic location, and the section that holds its last key.

    Pydantic inserts the tag of a discriminated union into the location; the file has none.
    """
    path: list = []
    section: type[BaseModel] | None = None
    members: list[Any] = [ExperimentConfig]
    for step in location:
        sections = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
        tagged = [m for m in sections if len(sections) > 1 and _tag(m) == step]
        if tagged:
            members = tagged
            continue
        if isinstance(step, int):
            path.append(step)
            members = [
                m
                for member in members
                for arg in typing.get_args(member)
                for m in _union_members(arg)
            ]
            continue
        if not sections:  # a type name that pydantic appends for unions of plain types
            continue
        path.append(step)
        section = sections[0]
        field = section.model_fields.get(step)
        members = _union_members(field.annotation) if field else []
    return tuple(path), section


def _message(source: str, data: dict, lines: dict[tuple, int], item: dict) -> str:
    path, section = _walk(item["loc"])
    value: Any = data
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            value = None
            break
    known = [path[:end] for end in range(len(path), 0, -1) if path[:end] in lines]
    where = f"{source}, line {lines[known[0]]}" if known else source
    field = ".".join(str(step) for step in path) or "the configuration"
    received = repr(value)
    if len(received) > 200:
        received = received[:200] + "…"
    kind = item["type"]
    if kind == "extra_forbidden" and section is not None:
        names = list(section.model_fields)
        near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.5)
        hint = f"Did you mean `{near[0]}`?" if near else f"Known keys: {', '.join(names)}."
        return f"{where}: `{field}` is not a known key. {hint} Received: {field}={received}."
    if kind == "missing":
        return f"{where}: `{field}` is missing."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        if kind == "union_tag_not_found":
            members = _union_members(section.model_fields[path[-1]].annotation) if section else []
            names = ", ".join(filter(None, map(_tag, members)))
            return f"{where}: `{field}.name` is missing. Choose one of {names}."
        expected = str(item.get("ctx", {}).get("expected_tags", "")).replace("'", "")
        tag = item.get("ctx", {}).get("tag", "")
        near = difflib.get_close_matches(str(tag), expected.split(", "), n=1, cutoff=0.5)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        return f"{where}: `{field}.name` must be one of {expected}. {hint}Received: {tag!r}."
    if kind == "literal_error":
        expected = str(item.get("ctx", {}).get("expected", "")).replace("'", "")
        options = expected.replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.5)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        return f"{where}: `{field}` must be {expected}.{hint} Received: {field}={received}."
    if kind in ("model_type", "model_attributes_type"):
        return f"{where}: `{field}` must be a mapping of keys to values. Received: {received}."
    problem = item["msg"].removeprefix("Value error, ")
    if isinstance(value, float) and not math.isfinite(value):
        problem = "must be finite"
    problem = problem[0].lower() + problem[1:]
    if kind == "value_error" and isinstance(value, dict):
        return f"{where}: {field}: {problem}."
    return f"{where}: `{field}`: {problem}. Received: {field}={received}."
