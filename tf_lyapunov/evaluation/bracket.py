"""(5) Proof and attack on the same inputs: lower bound ≤ minimal perturbation ≤ smallest found."""

from __future__ import annotations

import dataclasses

import numpy as np

from tf_lyapunov.attacks import DDN, FMN, DeepFool, Ensemble, MinimalFGV
from tf_lyapunov.attacks.base import Attack
from tf_lyapunov.certification.margins import certify, decisions
from tf_lyapunov.certification.perturbation import RULES, minimal_perturbation_lower_bound
from tf_lyapunov.digits import at_least, at_most
from tf_lyapunov.evaluation.accuracy import logits as executed_logits
from tf_lyapunov.evaluation.exactness import ExactDecisions, norms_up
from tf_lyapunov.evaluation.quartiles import plain, quartiles, written
from tf_lyapunov.losses.classes import class_numbers
from tf_lyapunov.program.feeding import batches
from tf_lyapunov.program.holding import takes_networks
from tf_lyapunov.program.inputs import Inputs
from tf_lyapunov.progress import shown
from tf_lyapunov.showing import MOST_ROWS, Page, Shown, Table
from tf_lyapunov.theory.balls import L2


class UnsoundBound(RuntimeError):
    """A perturbation below a proven bound changed the decision: a defect of the library.

    Attributes:
        index: positions of the inputs.
        lower, upper: the bounds there, and the norms of what was found.
    """

    def __init__(self, message: str, index=(), lower=(), upper=()):
        super().__init__(message)
        self.index, self.lower, self.upper = tuple(index), tuple(lower), tuple(upper)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Bracket(Shown):
    """Between what the minimal l2 perturbation of every input lies.

    Attributes:
        lower: float64 (n,), the larger of `certified` and `bound`; 0 where the model does not
            choose the label.
        upper: float64 (n,), norm of the smallest perturbation found; 0 where the model is wrong
            already, infinite where nothing was found.
        certified: float64 (n,), radius of `certify`.
        bound: float64 (n,), sound bound of `minimal_perturbation_lower_bound`.
        published: float64 (n,), what the published rules claim, or None. No certificate: no part
            of `lower`.
        attack: array of str (n,), who found `upper`: `"clean"` where the model is wrong already,
            `""` where nothing was found.
        labels, predictions: int64 (n,), true classes (or the model's decisions), and decisions.
        x_adv: float32 array like the input, the perturbed inputs; the clean one where nothing was
            found. For a model with several inputs a list, tuple or dict like theirs.
        predictions_adv: int64 (n,), decisions there.
        zero_gradient: bool (n,), nothing was found, and an attack met a zero gradient.
        rounding: bool (n,), the model's own float arithmetic changed its decision below `lower`,
            exact arithmetic does not; `upper` is about exact arithmetic there.
        notes: of the attacks, and of the published rules.
        perturbed: names of the inputs that may change, the others being held fixed; None for all.
    """

    lower: np.ndarray
    upper: np.ndarray
    certified: np.ndarray
    bound: np.ndarray
    published: np.ndarray | None
    attack: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    x_adv: np.ndarray = dataclasses.field(repr=False)
    predictions_adv: np.ndarray
    zero_gradient: np.ndarray
    rounding: np.ndarray
    notes: tuple[str, ...] = ()
    perturbed: tuple[str, ...] | None = None

    def __len__(self):
        return len(self.lower)

    @property
    def wrong(self):
        """Bool (n,): misclassified without any perturbation."""
        return self.attack == "clean"

    @property
    def found(self):
        """Bool (n,): classified as labelled, and changed by a perturbation."""
        return np.isfinite(self.upper) & ~self.wrong

    @property
    def ratio(self):
        """upper/lower, float64 (n,); NaN for misclassified inputs and where both are infinite."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(self.lower > 0, self.upper / self.lower, np.inf)
        return np.where(self.wrong, np.nan, ratio)

    @property
    def deviation(self):
        """upper - lower, float64 (n,): the paper's deviation, with the sound bound."""
        with np.errstate(invalid="ignore"):
            return self.upper - self.lower

    @property
    def violations(self):
        """Bool (n,): found below what the *published* rules claim; None without them."""
        return None if self.published is None else self.found & (self.upper < self.published)

    def rows(self):
        """One dict per input, JSON-ready; None where a number is infinite or undefined."""
        columns = {
            "label": self.labels,
            "prediction": self.predictions,
            "bound": self.bound,
            "certified": self.certified,
            "lower": self.lower,
            "upper": self.upper,
            "ratio": self.ratio,
            "attack": self.attack,
            "prediction_adv": self.predictions_adv,
        }
        if self.published is not None:
            columns["published"] = self.published
        return [
            {"input": i, **{name: plain(column[i]) for name, column in columns.items()}}
            for i in range(len(self))
        ]

    def record(self, x=None, images=4):
        """What a report shows (`Results.bracket`), JSON-ready.

        Args:
            x: the inputs; the first few perturbed ones are shown if they are images.
            images: how many.
        """
        rows = np.flatnonzero(self.found)
        out = {
            "summary": self.summary(),
            "notes": list(self.notes),
            "lower": self.lower[rows].tolist(),
            "upper": self.upper[rows].tolist(),
            "published": None if self.published is None else self.published[rows].tolist(),
            "labels": self.labels[rows].tolist(),
            "predictions_adv": self.predictions_adv[rows].tolist(),
        }
        some = rows[:images]
        if isinstance(self.x_adv, (list, tuple, dict)):
            x = None  # of several inputs, which one to show is not said
        if x is not None and len(some) and np.ndim(x) == 4 and np.shape(x)[-1] in (1, 3):
            out["images"] = {
                "clean": np.asarray(x, np.float64)[some].tolist(),
                "perturbed": self.x_adv[some].tolist(),
                "titles": [
                    f"{self.labels[i]} as {self.predictions_adv[i]}, {self.upper[i]:.3g}"
                    for i in some
                ],
            }
        return out

    def summary(self):
        """Counts, and quartiles over the inputs on which an attack succeeded, JSON-ready."""
        found = self.found
        out = {
            "inputs": len(self),
            **({} if self.perturbed is None else {"perturbed": list(self.perturbed)}),
            "wrong": int(self.wrong.sum()),
            "found": int(found.sum()),
            "not_found": int(np.sum(~np.isfinite(self.upper))),
            "zero_gradient": int(self.zero_gradient.sum()),
            "rounding": int(self.rounding.sum()),
            "tighter": {
                "bound": int(np.sum(found & (self.bound > self.certified))),
                "certified": int(np.sum(found & (self.certified > self.bound))),
            },
            "attacks": {
                str(n): int(c)
                for n, c in zip(*np.unique(self.attack[found], return_counts=True), strict=True)
            },
        }
        for name in ("bound", "certified", "lower", "upper", "ratio"):
            out[name] = quartiles(getattr(self, name)[found])
        if self.published is not None:
            out["published"] = quartiles(self.published[found])
            out["violations"] = int(self.violations.sum())
        return out

    def table(self):
        """The summary as aligned text."""
        summary = self.summary()
        names = ("bound", "certified", "lower", "upper", "ratio", "published")
        lines = [f"{'':>10}  {'quarter':>10}  {'median':>10}  {'3 quarters':>10}"]
        for name in names:
            if summary.get(name) is not None:
                shown = "  ".join(f"{written(v):>10}" for v in summary[name])
                lines.append(f"{name:>10}  {shown}")
        counts = (
            f"{summary['found']} of {summary['inputs']} inputs perturbed, {summary['wrong']} wrong "
            f"already, {summary['not_found']} not found"
        )
        if summary["zero_gradient"]:
            counts += f" ({summary['zero_gradient']} with a zero gradient)"
        if summary["rounding"]:
            counts += f" ({summary['rounding']} decisions changed below a bound by rounding alone)"
        who = ", ".join(f"{name} {n}" for name, n in summary["attacks"].items())
        lines.append(counts + (f"; nearest by {who}" if who else ""))
        if self.published is not None:
            lines.append(f"{summary['violations']} perturbations below the published bound")
        return "\n".join(lines)

    __str__ = table

    def _page(self):
        found, right = self.found, len(self) - int(self.wrong.sum())
        low, high = np.where(found, self.lower, np.nan), np.where(found, self.upper, np.nan)
        middle = [float(np.nanmedian(v)) if found.any() else None for v in (low, high)]
        facts = (
            ("found", f"{int(found.sum())} of {right} inputs"),
            ("wrong before", len(self) - right),
            ("median proved", "—" if middle[0] is None else f"≥ {at_least(middle[0], 4)}"),
            ("median found", "—" if middle[1] is None else f"≤ {at_most(middle[1], 4)}"),
        )
        rows = [
            (i, at_least(self.lower[i], 4), at_most(self.upper[i], 4), str(self.attack[i]) or "—")
            for i in range(min(len(self), MOST_ROWS))
        ]
        columns = ("input", "proved, at least", "found, at most", "by")
        return Page("Bracket", facts, (Table(columns, rows, "", len(self)),), self.notes)


@takes_networks
def bracket(
    model,
    x,
    y=None,
    *,
    attacks=None,
    rules="sound",
    method="composition",
    perturbed=None,
    bounds=None,
    batch_size=256,
    time_budget=10.0,
    state=None,
    progress=None,
):
    """Lower bound, certified radius and smallest perturbation found, for every input.

        max(κ, radius) ≤ min{‖r‖ : the decision at x + r is not y} ≤ min over attacks of ‖r‖  (5.2)

    κ is the sound bound of `minimal_perturbation_lower_bound`, which relaxations on the ball around
    each input raise as far as `time_budget` allows; the radius is that of `certify`. Both
    are about exact arithmetic; attacks ask the model itself. Where it changes its decision below a
    bound, exact arithmetic is asked at that point: if it agrees, the bound is wrong, which is an
    error; if not, the perturbation is enlarged until it agrees.

    Args:
        model: a built Keras model of supported layers with logits or probabilities (n, K).
        x: array (n, …), or a list, tuple or dict of arrays for several inputs;
            `keras.utils.PyDataset`, tf.data, or an iterable of batches.
        y: labels; `None` takes the data set's, or the model's own decisions.
        attacks: an `Ensemble`, or an attack, attacks, or names and attacks, untargeted, in l2;
            default: FGV, DeepFool, DDN and FMN.
        rules: `"published"` computes the published rules too, to compare; they prove nothing.
        method: of `certify`.
        perturbed: which input of several may change, as for `certify`; the others are held fixed.
        bounds: None, or `(low, high)`: a box that the default attacks stay in. Lower bounds hold
            with and without it.
        batch_size: inputs evaluated at once.
        time_budget: seconds for relaxations on the balls around inputs, in κ, or in the radius if
            `method` has them; 0 for none.
        state: file in which finished attacks are kept, see `Ensemble`.
        progress: whether to show how far it is, after two seconds; `None`: in a terminal and a
            notebook; or a function that is called with a line of text.

    Returns:
        `Bracket`.

    Raises:
        UnsoundBound: naming inputs whose decision changes below a proven bound.
        UnsupportedLayerError: naming a layer without a rule.
        ValueError: for other norms, targeted attacks, NaN or infinite inputs, labels out of range.

    Example:

    >>> import keras, numpy as np
    >>> identity = keras.layers.Dense(2, kernel_initializer="identity")
    >>> model = keras.Sequential([keras.Input((2,)), identity])
    >>> found = bracket(model, np.array([[3.0, 1.0]]))
    >>> found.lower.round(4).tolist(), found.upper.round(4).tolist()
    ([1.4142], [1.4142])

    Reference: Peck et al., Lower bounds on the robustness to adversarial perturbations (2017),
    sections 3.3, 4.3 and 5.3, in sound form.
    """
    if rules not in RULES:
        raise ValueError(f"`rules` must be one of {RULES}. Received: rules={rules!r}.")
    ensemble = _ensemble(attacks, bounds, batch_size)
    inputs = Inputs.of(model)
    chosen = inputs.chosen(perturbed)
    x, y, arrays = _arrays(x, y, inputs)
    common = dict(batch_size=batch_size, perturbed=perturbed)
    say = progress if callable(progress) else None
    with shown(False if say else progress, "bracket"):
        taken = inputs, chosen, arrays
        way = method, time_budget
        return _bracket(model, x, y, taken, common, ensemble, rules, way, state, say)


def _bracket(model, x, y, taken, common, ensemble, rules, way, state, say):
    (inputs, chosen, arrays), batch_size = taken, common["batch_size"]
    method, seconds = way
    searches = method in ("linear", "auto")
    sound = minimal_perturbation_lower_bound(
        model, x, y, time_budget=0.0 if searches else seconds, **common
    )
    labels = sound.labels
    claimed, notes = None, ()
    if rules == "published":
        published = minimal_perturbation_lower_bound(model, x, labels, rules=rules, **common)
        claimed, notes = published.bound, tuple(str(warning) for warning in published.warnings)
    # Multipliers of global gains have `certify`'s own time where no relaxations take it.
    options = {"time_budget": max(seconds, 1e-3)} if searches else {}
    certified = certify(model, x, labels, method=method, **options, **common).radius
    result = ensemble(model, x, labels, perturbed=common["perturbed"], state=state, progress=say)
    predictions = decisions(executed_logits(model, x, batch_size=batch_size))
    wrong = (predictions != labels) | (result.success & (result.distance == 0))
    found = [np.array(a) for a in inputs.flat(result.x_adv)]
    # Inputs that are held fixed are the same, whatever dtype the attack holds them in.
    change = [
        a.astype(np.float64) - b.astype(np.float64) if moves else np.zeros(b.shape)
        for a, b, moves in zip(found, arrays, chosen, strict=True)
    ]
    upper = np.where(result.success, norms_up(change), np.inf)
    lower = np.maximum(sound.bound, certified)
    lower, certified, bound, upper = (
        np.where(wrong, 0.0, v) for v in (lower, certified, sound.bound, upper)
    )
    attack = np.where(wrong, "clean", result.found_by.astype(str)).astype(object)
    predictions_adv = result.predictions_adv.copy()
    doubtful = np.flatnonzero(~(upper >= lower))
    if len(doubtful):
        exact = ExactDecisions(model, inputs, arrays, batch_size)
        for i in doubtful:
            by = ensemble.attacks.get(str(attack[i]))
            box = None if by is None else by.bounds
            here, step = ([a[i] for a in part] for part in (arrays, change))
            norm, point, decision = exact.crossing(here, step, labels[i], box)
            if norm < lower[i]:
                raise UnsoundBound(
                    f"Input {i}: a perturbation of norm {norm:.17g} by {attack[i]} changes the "
                    f"decision {labels[i]}, below the proven bound {lower[i]:.17g} (bound "
                    f"{bound[i]:.17g}, certified {certified[i]:.17g}). Please report this model: "
                    "no number of this run is to be trusted.",
                    [int(i)], [lower[i]], [norm],
                )  # fmt: skip
            upper[i] = norm
            attack[i] = "" if point is None else attack[i]
            predictions_adv[i] = decision
            for array, own, at in zip(found, here, point or here, strict=True):
                array[i] = own if point is None else at
    flagged = np.zeros(len(lower), bool)
    flagged[doubtful] = True
    return Bracket(
        lower=lower,
        upper=upper,
        certified=certified,
        bound=bound,
        published=None if claimed is None else np.where(wrong, 0.0, claimed),
        attack=attack,
        labels=labels,
        predictions=predictions,
        x_adv=inputs.like(x, found),
        predictions_adv=predictions_adv,
        zero_gradient=result.zero_gradient & ~np.isfinite(upper),
        rounding=flagged,
        notes=(*result.notes, *notes),
        perturbed=inputs.chosen_names(chosen),
    )


def _ensemble(attacks, bounds, batch_size):
    if attacks is None:
        common = dict(bounds=bounds, batch_size=batch_size)
        attacks = {
            "FGV": MinimalFGV(**common),
            "DeepFool": DeepFool(**common),
            "DDN": DDN(**common),
            "FMN": FMN(L2, **common),
        }
    elif bounds is not None:
        raise ValueError(
            f"`bounds` is for the default attacks. Received: bounds={bounds!r} with attacks. Give "
            "it to them."
        )
    if isinstance(attacks, Attack):
        attacks = [attacks]
    ensemble = attacks if isinstance(attacks, Ensemble) else Ensemble(attacks)
    if ensemble.norm is not L2 or ensemble.targeted:
        raise ValueError(
            "Brackets are about untargeted l2 perturbations. "
            f"Received: {ensemble!r} in {ensemble.norm.__name__}"
            + (", targeted." if ensemble.targeted else ".")
        )
    return ensemble


def _arrays(x, y, inputs):
    """Inputs in the structure that they were given in, labels, and arrays, one per input."""
    parts = list(batches(x, y, inputs))
    arrays = [np.concatenate(same) for same in zip(*(part[0] for part in parts), strict=True)]
    kept = isinstance(x, (list, tuple, dict))
    x = inputs.like(x, arrays) if kept else inputs.called(arrays)
    given = [part[1] for part in parts]
    if any(g is None for g in given):
        return x, None, arrays
    labels = np.concatenate(given)
    if labels.ndim == 2 and labels.shape[1] > 1:
        labels = class_numbers(labels, *labels.shape)
    return x, labels, arrays
