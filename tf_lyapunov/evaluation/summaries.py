"""From the library's objects to the plain dicts that `results.Results` holds."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from tf_lyapunov.evaluation.results import plain

from .accuracy import check_is_l2

_CURVE_POINTS = 101
_HISTOGRAM_BINS = 40


def design_summary(design, check=None) -> dict[str, Any]:
    """What the report shows of a design.

    Args:
        design: a `Design`.
        check: the `DesignCheck` of the trained layers, or None.

    Returns:
        A dict with keys "rule", "claim" ({"delta", "nu"} or {"gain"}), "verdict", "gain",
        "gain_as_published", "gain_upper_bound", "budgets", "indices" ({"delta", "nu"} a layer),
        "cascade_matrix", "cascade_margin", "scaling", "scaled_margin", "quasi_dominant",
        "layer_proofs", "explanation", "check"; unavailable ones are None.
    """
    # A plain gain is held as a claim (delta, nu) too, but was promised as a gain.
    target = getattr(design, "target_gain", None)
    claim = getattr(design, "claim", None) if target is None else target
    dominance = getattr(design, "quasi_dominance", None)
    explain = getattr(design, "explain", None)
    summary = {
        "rule": getattr(design, "rule", None),
        "claim": None if claim is None else _indices(claim),
        "indices": [_indices(item) for item in getattr(design, "indices", None) or ()],
        "quasi_dominant": getattr(dominance, "holds", dominance),
        "explanation": explain() if callable(explain) else "",
        "check": None,
    }
    for key in (
        "verdict",
        "gain",
        "gain_as_published",
        "gain_upper_bound",
        "budgets",
        "cascade_matrix",
        "cascade_margin",
        "scaling",
        "scaled_margin",
        "layer_proofs",
    ):
        summary[key] = getattr(design, key, None)
    if check is not None:
        summary["check"] = {
            key: getattr(check, key, None) for key in ("holds", "margin", "gain_upper_bound")
        }
    return plain(summary)


def _indices(item) -> dict[str, Any]:
    if isinstance(item, (int, float)):
        return {"gain": float(item)}
    return {"delta": getattr(item, "delta", None), "nu": getattr(item, "nu", None)}


def certificate_summary(certificate) -> dict[str, Any]:
    """What the report shows of a certificate: totals and curves, no per-input arrays.

    Args:
        certificate: a `Certificate`.

    Returns:
        A dict with keys "verdict", "method", "gain_upper_bound", "float_allowance", "count",
        "median_radius", "curve" ({"radius", "certified"}), "histogram" ({"edges", "counts"}),
        "contributions" (dicts "name", "kind", "gain_upper_bound", "method", "assumption"),
        "assumptions", "digest".
    """
    check_is_l2(certificate)  # reports and figures say so
    radius = np.asarray(certificate.radius, np.float64).reshape(-1)
    summary: dict[str, Any] = {
        "verdict": getattr(certificate, "verdict", None),
        "method": getattr(certificate, "method", None),
        "gain_upper_bound": getattr(certificate, "gain_upper_bound", None),
        "digest": getattr(certificate, "digest", getattr(certificate, "model_digest", None)),
        "assumptions": [str(text) for text in getattr(certificate, "assumptions", ()) or ()],
        "contributions": [
            {
                key: getattr(item, key, None)
                for key in ("name", "kind", "gain_upper_bound", "method", "assumption")
            }
            for item in getattr(certificate, "contributions", ()) or ()
        ],
        "count": len(radius),
    }
    allowance = getattr(certificate, "float_allowance", None)
    summary["float_allowance"] = None if allowance is None else float(np.max(allowance, initial=0))
    finite = radius[np.isfinite(radius)]
    if len(finite):
        top = float(finite.max()) or 1.0
        grid = np.linspace(0.0, top, _CURVE_POINTS)
        counts, edges = np.histogram(finite, bins=_HISTOGRAM_BINS, range=(0.0, top))
        accuracy = [float(certificate.certified_accuracy(float(r))) for r in grid]
        summary["median_radius"] = float(np.median(radius))
        summary["curve"] = {"radius": grid, "certified": accuracy}
        summary["histogram"] = {"edges": edges, "counts": counts}
    return plain(summary)


def layer_rows(
    names: Sequence[str],
    sigmas: Sequence[float],
    budgets: Sequence[float] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    gains: Sequence[float] | None = None,
    indices: Sequence[Any] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the layer table.

    Args:
        names: the layers' names, from the input on.
        sigmas: proved upper bounds of their spectral norms.
        budgets: what the design allows them.
        kinds: e.g. "dense".
        gains: proved upper bounds of the stages' gains, activation and pooling included.
        indices: the design's `Indices` of the layers.

    Returns:
        One dict a layer.

    Raises:
        ValueError: if the sequences differ in length.
    """
    columns = {
        "sigma_upper_bound": sigmas,
        "budget": budgets,
        "kind": kinds,
        "gain_upper_bound": gains,
        "delta": None if indices is None else [item.delta for item in indices],
        "nu": None if indices is None else [item.nu for item in indices],
    }
    columns = {key: list(values) for key, values in columns.items() if values is not None}
    wrong = {key: len(values) for key, values in columns.items() if len(values) != len(names)}
    if wrong:
        raise ValueError(
            f"All columns must have one entry a layer, {len(names)}. Received: {wrong}. "
            "Pass `None` for a column that is not known."
        )
    rows = [{"name": str(name)} for name in names]
    for key, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[key] = value
    return plain(rows)


def history_rows(history) -> list[dict[str, Any]]:
    """One dict an epoch, from a Keras `History`, its dict of lists, or rows.

    Example:
        >>> history_rows({"loss": [0.5, 0.25]})
        [{'epoch': 1, 'loss': 0.5}, {'epoch': 2, 'loss': 0.25}]
    """
    history = getattr(history, "history", history) or []
    if not isinstance(history, Mapping):
        return plain([dict(row) for row in history])
    epochs = max((len(values) for values in history.values()), default=0)
    rows = [
        {"epoch": i + 1, **{key: v[i] for key, v in history.items() if i < len(v)}}
        for i in range(epochs)
    ]
    return plain(rows)


def installed_versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that decide a run's numbers."""
    versions = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in ("tf_lyapunov", "keras", "tensorflow", "jax", "torch", "numpy", "scipy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
