"""Experiment files that come with the library, found by name from any directory."""

from __future__ import annotations

import difflib
from pathlib import Path

from ..errors import ConfigError

# In a wheel a folder of the package; in a checkout a link to the folder at its top.
FOLDER = (Path(__file__).resolve().parents[1] / "configs").resolve()


def shipped_configs() -> dict[str, Path]:
    """Every experiment file of the library by its name.

    Returns:
        Paths of YAML files by names such as "lyapunov/digits", in the order of the names.

    Example:

    >>> shipped_configs()["lyapunov/digits"].name
    'digits.yaml'
    """
    found = {
        path.relative_to(FOLDER).with_suffix("").as_posix(): path
        for path in FOLDER.glob("*/*.yaml")
    }
    return dict(sorted(found.items()))


def shipped_config(name: str) -> Path:
    """The experiment file of that name.

    Args:
        name: as `shipped_configs` has it, with or without ".yaml" behind it or "configs/" before.

    Returns:
        The path of a YAML file.

    Raises:
        ConfigError: there is none; the message names the nearest ones.

    Example:

    >>> shipped_config("lyapunov/digit")
    Traceback (most recent call last):
    ...
    tf_lyapunov.errors.ConfigError: No experiment of that name comes with the library. \
Did you mean lyapunov/digits? Received: 'lyapunov/digit'. `tf-lyapunov configs list` shows them all.
    """
    found = shipped_configs()
    key = str(name).removeprefix("configs/").removesuffix(".yaml")
    if key in found:
        return found[key]
    near = difflib.get_close_matches(key, found, n=3, cutoff=0.8)
    guess = f"Did you mean {', '.join(near)}? " if near else ""
    raise ConfigError(
        f"No experiment of that name comes with the library. {guess}Received: {name!r}. "
        "`tf-lyapunov configs list` shows them all."
    )
