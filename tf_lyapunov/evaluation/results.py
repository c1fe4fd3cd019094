"""One run's results as a data record of plain JSON types."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from tf_lyapunov.writing import write_text

SCHEMA = 2  # 1 had neither examples nor classes; it is read all the same


@dataclasses.dataclass
class Results:
    """Everything a report shows; every field but `title` may stay empty.

    All values are plain JSON types. Non-finite numbers are stored as null and read as "not
    available". The summaries of a design, certificate, history and layers are made by
    `tf_lyapunov.evaluation.summaries`.

    Args:
        title: name of the run.
        date: ISO date and time of the run.
        command: what to type to repeat it.
        config: the configuration as a nested dict.
        versions: package name -> version, also "python" and "platform".
        dataset: keys "name", "num_classes", "input_shape", "train", "validation", "test" (counts),
            "preprocessing", "source", "class_names" and "feature_names" (lists of text); any may be
            absent.
        model: keys "name", "parameters", "digest"; any may be absent.
        design: `summaries.design_summary(design, check)`.
        layers: one dict a layer: "name", "kind", "sigma_upper_bound", "budget",
            "gain_upper_bound", "delta", "nu", "method" (see `summaries.layer_rows`).
        history: one dict an epoch: "epoch", "loss", "accuracy", "val_accuracy",
            "sigma/<layer>", "budget/<layer>", "cascade_margin", "gain_upper_bound".
        certificate: `summaries.certificate_summary(certificate)`.
        rows: one dict a radius: "radius", "count", "clean", "certified" (or None), "attacked"
            ({attack: accuracy}), "output_change" ({attack: {"mean", "max"}}), "gain"
            ({attack: {"mean", "max"}}), "broken" ({attack: certificates broken}); see
            `accuracy.accuracy_under_attack`.
        gain: "upper_bound" (proved), "claimed", "measured_max", "measured_mean",
            "measured_by" (text); any may be absent.
        attacks: one dict an attack: "name" and any settings, e.g. "norm", "steps", "step".
        bracket: `Bracket.record(x)`: lower bounds beside the smallest perturbations found.
        examples: `examples.weakest_examples(...)`, the weakest input first.
        classes: `classes.class_summary(...)`.
        notes: sentences shown to the reader as they are.
        seconds: {"training": s, "certification": s, "attack": s}.

    Example:
        >>> results = Results(title="digits", rows=[{"radius": 0.0, "clean": 0.97}])
        >>> Results.from_json(results.to_json()) == results
        True
    """

    title: str
    date: str = ""
    command: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    dataset: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    design: dict[str, Any] | None = None
    layers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    certificate: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    gain: dict[str, Any] = dataclasses.field(default_factory=dict)
    attacks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    bracket: dict[str, Any] | None = None
    examples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    classes: dict[str, Any] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only; non-finite numbers become None."""
        return {"schema": SCHEMA, **plain(dataclasses.asdict(self))}

    def to_json(self) -> str:
        """The record as JSON text that any parser accepts."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Results:
        """Inverse of `to_dict`.

        Raises:
            ValueError: if the record is not one of ours.
        """
        if not isinstance(record, dict) or not isinstance(record.get("title"), str):
            raise ValueError(
                "`record` must be a dict with a string `title`, as written by `Results.to_json`. "
                f"Received: {type(record).__name__}. Pass the file that the run wrote."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(record) - known - {"schema"})
        if unknown or record.get("schema", SCHEMA) > SCHEMA:
            raise ValueError(
                f"`record` must follow schema {SCHEMA} of `Results`. Received: "
                f"schema={record.get('schema')}, unknown keys {unknown}. "
                "Read it with the version of tf_lyapunov that wrote it."
            )
        return cls(**{key: value for key, value in record.items() if key in known})

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Inverse of `to_json`.

        Raises:
            ValueError: if the text is not JSON or not one of our records.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`text` must be the JSON of a `Results`. Received: {error}. "
                "The file may be truncated: repeat the command that wrote it."
            ) from error
        return cls.from_dict(record)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON to `path` in one step, so that a kill leaves no half file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Results:
        """Reads what `save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def plain(value: Any) -> Any:
    """`value` in JSON types: NumPy scalars and arrays unpacked, non-finite floats None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy scalar or array
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
