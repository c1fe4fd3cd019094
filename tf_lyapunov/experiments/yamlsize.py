"""Limits of a YAML text, checked on its events before anything is built from it."""

from __future__ import annotations

import yaml

from ..errors import ConfigError

MAX_BYTES = 2**18
MAX_SCALAR = 10_000
MAX_DEPTH = 32
MAX_NODES = 20_000


def check_size(text: str) -> None:
    """Refuse a text that is large, deep, or grows when its aliases are followed.

    An alias counts as many nodes as what it stands for, so that a few lines of aliases of aliases
    are as large as what they expand to. One pass over the parser's events, which builds nothing.

    Args:
        text: YAML.

    Raises:
        ConfigError: a limit is exceeded, or an alias lies within what it stands for.
        yaml.YAMLError: the text is not YAML.

    Example:

    >>> check_size("{a: &a [1, 2], b: *a}")
    >>> check_size("a: &a [*a]")
    Traceback (most recent call last):
    ...
    tf_lyapunov.errors.ConfigError: An alias must not lie within what it stands for. Received: \
*a in line 1. Write its value.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(
            f"A configuration has at most {MAX_BYTES} bytes. Received: more. Is it an experiment "
            "file?"
        )
    sizes: dict[str, int | None] = {}  # by anchor; None while it is open
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and nodes counted before it
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 0)  # the loader refuses an unknown one
            if size is None:
                raise ConfigError(
                    "An alias must not lie within what it stands for. Received: "
                    f"*{event.anchor} in line {line}. Write its value."
                )
            count += size
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if len(event.value) > MAX_SCALAR:
                raise ConfigError(
                    f"A value has at most {MAX_SCALAR} characters. Received: {len(event.value)} in "
                    f"line {line}. Shorten it."
                )
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            count += 1
            if event.anchor:
                sizes[event.anchor] = None
            if len(open_nodes) > MAX_DEPTH:
                raise ConfigError(
                    f"A configuration is nested at most {MAX_DEPTH} deep. Received: more in line "
                    f"{line}. Flatten it."
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - before
        if count > MAX_NODES:
            raise ConfigError(
                f"A configuration has at most {MAX_NODES} values, aliases followed. Received: more "
                f"by line {line}. Shorten it."
            )
