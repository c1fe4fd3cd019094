"""Certificates: for every input, a radius within which the model's decision provably stays."""

import dataclasses
import json

import numpy as np

from tf_lyapunov.bounds.composition import Contribution, encode, numbered, table
from tf_lyapunov.certification.proofs import claimed_fields, incomplete, save_proof
from tf_lyapunov.digits import at_least, at_most
from tf_lyapunov.local.regions import NORMS
from tf_lyapunov.sealing import seal, unseal
from tf_lyapunov.showing import MOST_ROWS, Page, Shown, Table, share
from tf_lyapunov.writing import write_text

FORMAT = "tf_lyapunov.certificate/1"
_WORDS = {"l2": "l2", "linf": "l∞", "l1": "l1"}


@dataclasses.dataclass(frozen=True, repr=False)
class Certificate(Shown):
    """For every input x_i, a proven radius: no change e with ‖e‖ ≤ radius_i alters the decision.

    The decision is the class with the largest logit (of a single logit: whether it is positive),
    and the radius is 0 where the model does not choose `labels_i`, or nothing could be proved.

    Attributes:
        radius: float64 (n,), in `norm`, in units of the model's input; rounded down. Of several
            inputs
            the norm is that of their concatenation, or of those in `perturbed`.
        predictions: int64 (n,), the model's own decisions.
        labels: int64 (n,), the classes that the radii refer to.
        margins: float64 (n,), logit of the label minus the largest other logit, as computed.
        gain_upper_bound: float, bound on the l2 gain from the input to the logits.
        contributions: tuple of `Contribution`, every layer's part.
        assumptions: tuple of sentences under which the radii are proved.
        method: `"composition"`.
        verdict: `"PROVED"` if some radius is positive, else `"NOT_PROVED"`.
        float_allowance: float, largest bound over the inputs on the l2 distance between computed
            and exact logits; √2 times each input's own bound is subtracted from its margins.
        model_digest: SHA-256 of the model's layers and weights, and of what is perturbed if that
            is not everything.
        perturbed: names of the inputs that the radii are about, all others being held fixed at
            the values given; None for all inputs.
        norm: `"l2"`, `"linf"` or `"l1"`.
        within: the valid inputs that changes must stay within, in words; None for all of real
            space.

    Example:

    >>> import numpy as np
    >>> proof = Certificate(np.array([0.5, 0.0]), np.array([1, 0]), np.array([1, 1]),
    ...     np.array([0.7, -0.1]), 1.0, (), (), "composition", "PROVED", 0.0, "sha256:0")
    >>> proof.certified_accuracy(0.25), proof.certified_accuracy([0.0, 0.6]).tolist()
    (0.5, [0.5, 0.0])
    """

    radius: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    margins: np.ndarray
    gain_upper_bound: float
    contributions: tuple
    assumptions: tuple
    method: str
    verdict: str
    float_allowance: float
    model_digest: str
    perturbed: tuple | None = None
    norm: str = "l2"
    within: str | None = None

    # Set by `certify`, for proof files; no field, so that an edited copy carries none.
    proof = None

    def __post_init__(self):
        for name, dtype in (
            ("radius", np.float64),
            ("predictions", np.int64),
            ("labels", np.int64),
            ("margins", np.float64),
        ):
            value = np.array(getattr(self, name), dtype=dtype)
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        shapes = {getattr(self, n).shape for n in ("radius", "predictions", "labels", "margins")}
        if len(shapes) != 1 or self.radius.ndim != 1:
            raise ValueError(
                "A certificate needs one radius, prediction, label and margin per input. "
                f"Received: shapes {sorted(shapes)}."
            )
        if np.any(np.isnan(self.radius)) or np.any(self.radius < 0):
            raise ValueError("Radii must be numbers ≥ 0. Received: a negative radius or NaN.")
        if self.perturbed is not None:
            names = self.perturbed
            named = isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)
            if not named or not names or len(set(names)) != len(names):
                raise ValueError(
                    "`perturbed` must hold names of inputs, each once, or be None for all inputs. "
                    f"Received: perturbed={names!r}."
                )
            object.__setattr__(self, "perturbed", tuple(names))
        if self.norm not in NORMS:
            raise ValueError(f"`norm` must be one of {NORMS}. Received: norm={self.norm!r}.")
        if not (self.within is None or isinstance(self.within, str)):
            raise ValueError(f"`within` must be text, or None. Received: {self.within!r}.")
        if self.verdict not in ("PROVED", "NOT_PROVED"):
            raise ValueError(f"Unknown verdict. Received: verdict={self.verdict!r}.")

    def __len__(self):
        return len(self.radius)

    @property
    def accuracy(self):
        """Share of the inputs whose prediction is their label, without any proof."""
        return float(np.mean(self.predictions == self.labels))

    def certified_accuracy(self, radius):
        """Share of the inputs that keep their label under every change of norm ≤ `radius`.

        Args:
            radius: non-negative number or array, in units of the model's input.

        Returns:
            float, or a float64 array of the argument's shape.

        Raises:
            ValueError: if a radius is negative or NaN.
        """
        radii = np.asarray(radius, dtype=np.float64)
        if np.any(np.isnan(radii)) or np.any(radii < 0):
            raise ValueError(f"`radius` must be a number ≥ 0. Received: radius={radius!r}.")
        # A radius of 0 stands for "nothing proved", so it never counts, not even at 0.
        positive = np.sort(self.radius[self.radius > 0])
        shares = (len(positive) - np.searchsorted(positive, radii, side="left")) / len(self)
        return float(shares) if shares.ndim == 0 else shares

    def explain(self):
        """Plain text: what is proved, for how many inputs, by which layers' gains, and when."""
        proved = self.radius > 0
        median = float(np.median(self.radius))
        largest = float(np.max(self.radius))
        lines = [
            f"Certificate: {self.verdict} (method: {self.method})",
            "",
            f"{len(self)} inputs. The model chooses the label on {self.accuracy:.1%} of them, and "
            f"for {np.mean(proved):.1%} a positive radius is proved.",
            f"A radius r means: no change of {self._what()} with {_WORDS[self.norm]} norm up to r "
            + (f"that stays within {self.within} " if self.within else "")
            + "alters the decision.",
            f"Median radius {at_least(median, 6)}, largest {at_least(largest, 6)}.",
        ]
        finite = self.radius[np.isfinite(self.radius)]
        if self.verdict == "PROVED" and len(finite) and finite.max() > 0:
            radii = finite.max() * np.array([0.25, 0.5, 0.75, 1.0])
            shown = [at_least(r, 4) for r in radii]
            shares = ", ".join(f"{self.certified_accuracy(float(r)):.1%} at {r}" for r in shown)
            lines.append(f"Certified accuracy: {self.certified_accuracy(0.0):.1%} at 0, {shares}.")
        else:
            lines += self._why_not()
        bound = (
            f"no change of {self._what()} moves the logits by more than "
            f"{at_most(self.gain_upper_bound, 6)} times "
            f"its {'' if self.norm == 'l2' else 'l2 '}norm. "
        )
        if any(c.kind == "product" for c in self.contributions):
            bound = "none on all of space, since signals are multiplied. "
        lines += [
            "",
            f"Gain: {bound}Layer by layer:",
            "",
            *table(self.contributions),
            "",
            "Rounding: the computed logits lie within "
            f"{self.float_allowance:.3g} of the exact ones; this is taken off every margin.",
            *numbered(self.assumptions),
            f"Model {self.model_digest[:23]}…",
        ]
        return "\n".join(lines)

    def _what(self):
        if self.perturbed is None:
            return "the input"
        names = " and ".join(map(repr, self.perturbed))
        return f"{names} alone, the other inputs held fixed,"

    def _why_not(self):
        if self.verdict == "PROVED":
            return []
        if not np.isfinite(self.float_allowance):
            return [
                "No radius could be proved: the model computes in too low a precision for a bound "
                "on its rounding error. Certify a float32 copy of it, or pass "
                "precision='float64', which concerns the same weights in exact arithmetic."
            ]
        products = any(c.kind == "product" for c in self.contributions)
        if not np.isfinite(self.gain_upper_bound) and not products:
            return ["No radius could be proved: the product of the layers' gains overflows."]
        if not np.any(self.predictions == self.labels):
            return ["No radius could be proved: the model chooses the label on none of them."]
        return [
            "No radius could be proved: the margins do not exceed the rounding allowance of "
            f"{self.float_allowance:.3g}."
        ]

    def __str__(self):
        return self.explain()

    def _page(self):
        """Radii and shares rounded down, the gain up."""
        median = float(np.median(self.radius)) if len(self) else 0.0
        facts = (
            ("verdict", self.verdict),
            ("inputs", len(self)),
            ("accuracy", share(self.accuracy) if len(self) else "—"),
            ("median radius", f"{at_least(median, 4)} ({_WORDS[self.norm]})"),
            ("gain", f"≤ {at_most(self.gain_upper_bound, 4)}"),
            ("method", self.method),
        )
        finite = self.radius[np.isfinite(self.radius) & (self.radius > 0)]
        radii = np.linspace(0.0, finite.max(), 5) if len(finite) else ()
        shares = [(at_least(r, 4), share(self.certified_accuracy(float(r)))) for r in radii]
        rows = [
            (i, int(self.labels[i]), int(self.predictions[i]), at_least(self.radius[i], 4))
            for i in range(min(len(self), MOST_ROWS))
        ]
        tables = (
            Table(("radius", "certified accuracy"), shares, "No change up to the radius matters:"),
            Table(("input", "label", "decision", "radius"), rows, "Inputs:", len(self)),
        )
        return Page("Certificate", facts, tables, self.assumptions)

    def to_json(self):
        """JSON text with all fields; floats keep every digit, infinities are strings."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["contributions"] = [dataclasses.asdict(c) for c in self.contributions]
        return json.dumps(seal({"format": FORMAT, **encode(fields)}), allow_nan=False)

    @classmethod
    def from_json(cls, text):
        """Certificate from `to_json`'s text.

        Raises:
            ValueError: if the text is not a complete certificate of this format, or was damaged.
        """
        try:
            fields = unseal(json.loads(text))
            if fields.pop("format") != FORMAT:
                raise KeyError("format")
            for name in ("radius", "margins"):
                fields[name] = np.array([float(v) for v in fields[name]], dtype=np.float64)
            for name in ("gain_upper_bound", "float_allowance"):
                fields[name] = float(fields[name])
            fields["assumptions"] = tuple(fields["assumptions"])
            fields.setdefault("perturbed", None)  # not in files of before
            fields["contributions"] = tuple(
                Contribution(
                    **{
                        **row,
                        "inputs": tuple(row["inputs"]),
                        "gain_upper_bound": float(row["gain_upper_bound"]),
                        "lipschitz_upper_bound": float(row["lipschitz_upper_bound"]),
                    }
                )
                for row in fields["contributions"]
            )
            return cls(**fields)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"Not a certificate in the format {FORMAT!r}, or a truncated one. "
                f"Received: {type(error).__name__}: {error}."
            ) from error

    def save(self, path):
        """Writes the certificate, through a temporary file: never half a file.

        A name that ends in `.npz` makes a proof file: the claims, the inputs, the multipliers, and
        digests of the weights, all of which `tf_lyapunov.verification.verify` (and
        `tf-lyapunov verify`) re-checks from the model's weights alone. Its gains and radii are
        rounded to the safe side by a part in 10⁶ at most. Radii by bounds around inputs
        (`"linear"`, `"auto"`) are those that the verifier proves with the multipliers found, of
        large networks about 1% smaller, as the file then says; those by `"local"` and `"box"` are
        the global ones. It is about models with one input. Any other name makes JSON, a record that
        proves nothing.

        Args:
            path: file name; an existing file is replaced.

        Raises:
            ValueError: for a proof file, if the model has changed since or has several inputs, the
                certificate was loaded or edited, its gain or `float_allowance` is
                infinite, or `verify` would refuse the two. Nothing is written then.
            UnsupportedLayerError: for a proof file, naming a layer the verifier does not know.
        """
        if str(path).endswith(".npz"):
            try:
                save_proof(self, path)
            except OverflowError as error:
                raise ValueError(
                    "A proof file needs inputs on which no value overflows. Received: "
                    f"{error}. Save as .json, or scale the inputs."
                ) from error
        else:
            write_text(path, self.to_json())

    @classmethod
    def load(cls, path):
        """Certificate from a file written by `save`, JSON or proof file, unchecked.

        The file is not proof of itself: verify it, compare `model_digest`, or certify again.

        Raises:
            ValueError: if the file is no certificate (`ProofFileError` for a proof file).
        """
        if str(path).endswith(".npz"):
            try:
                # It carries no proof itself.
                return cls.from_json(json.dumps(claimed_fields(path)))
            except ValueError as error:
                raise incomplete(path, error) from error
        with open(path, encoding="utf-8") as file:
            return cls.from_json(file.read())
