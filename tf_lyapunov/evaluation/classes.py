"""Counts by class: decided right, certified, right under attack, and mistaken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# A table of more classes, or a matrix of more, is read by nobody.
MOST_ROWS, MOST_COLUMNS, MOST_MISTAKES = 40, 20, 12


def class_summary(
    labels,
    predictions,
    by_radius: Sequence[Mapping[str, Any]] = (),
    *,
    num_classes: int | None = None,
    attacks: Sequence[str] = (),
) -> dict[str, Any]:
    """What the report shows by class: counts only, JSON-ready and of bounded size.

    Args:
        labels: int (n,), true classes.
        predictions: int (n,), the model's decisions.
        by_radius: dicts with "radius", and counts by class "certified" and "attacked" or None:
            `by_class` of `accuracy.accuracy_under_attack`.
        num_classes: K; default one more than the largest number seen.
        attacks: names of the attacks behind "attacked".

    Returns:
        A dict with keys "classes" (K), "present" (those with inputs), "radii", "attacks", "rows"
        (dicts "class", "count", "clean", "certified" and "attacked", counts by radius or None):
        all classes, or of more than `MOST_ROWS` those with the smallest shares certified at the
        first radius, under attack and clean; "confusion" (K, K), row true and column decided, None
        for more than `MOST_COLUMNS` classes; "mistakes" (dicts "label", "prediction", "count"),
        the most frequent.

    Raises:
        ValueError: if labels and predictions are not of one length.

    Example:

    >>> found = class_summary([0, 0, 1], [0, 1, 1])
    >>> found["confusion"], found["mistakes"]
    ([[1, 1], [0, 1]], [{'label': 0, 'prediction': 1, 'count': 1}])
    """
    labels, predictions = np.asarray(labels, np.int64), np.asarray(predictions, np.int64)
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise ValueError(
            "`labels` and `predictions` must be class numbers of the same inputs. Received: shapes "
            f"{labels.shape} and {predictions.shape}."
        )
    top = int(max(labels.max(initial=-1), predictions.max(initial=-1))) + 1
    classes = max(top, num_classes or 0)
    pairs, counts = np.unique(np.stack([labels, predictions], 1), axis=0, return_counts=True)
    wrong = pairs[:, 0] != pairs[:, 1]
    pairs, counts, diagonal = pairs[wrong], counts[wrong], (pairs[~wrong, 0], counts[~wrong])
    total = np.bincount(labels, minlength=classes)
    clean = np.zeros(classes, np.int64)
    clean[diagonal[0]] = diagonal[1]
    radii = [float(row["radius"]) for row in by_radius]
    tables = {}
    for key in ("certified", "attacked"):
        known = radii and all(row.get(key) is not None for row in by_radius)
        tables[key] = np.stack([row[key] for row in by_radius]) if known else None
    shown = np.flatnonzero(total)
    present = len(shown)
    if len(shown) > MOST_ROWS:
        orders = [clean[shown] / total[shown]]
        orders += [
            tables[key][0][shown] / total[shown]
            for key in ("attacked", "certified")
            if tables[key] is not None
        ]
        shown = shown[np.lexsort(orders)][:MOST_ROWS]
    most = np.argsort(-counts, kind="stable")[:MOST_MISTAKES]
    confusion = None
    if classes <= MOST_COLUMNS:
        confusion = np.diag(clean)
        confusion[pairs[:, 0], pairs[:, 1]] = counts
        confusion = confusion.tolist()
    return {
        "classes": classes,
        "present": present,
        "radii": radii,
        "attacks": list(attacks),
        "rows": [
            {
                "class": int(c),
                "count": int(total[c]),
                "clean": int(clean[c]),
                **{k: None if t is None else t[:, c].tolist() for k, t in tables.items()},
            }
            for c in shown
        ],
        "confusion": confusion,
        "mistakes": [
            {"label": int(a), "prediction": int(b), "count": int(n)}
            for (a, b), n in zip(pairs[most], counts[most], strict=True)
        ],
    }
