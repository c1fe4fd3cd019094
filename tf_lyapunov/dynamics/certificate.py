"""What is proved of a system with memory, and how it says so."""

import dataclasses
import math

import numpy as np

from tf_lyapunov.digits import at_least, at_most
from tf_lyapunov.showing import Page, Shown, Table
from tf_lyapunov.verification import archive, memoryfiles, sequences
from tf_lyapunov.verification.arithmetic import hypot_up, product_up, sqrt_up, sum_up


@dataclasses.dataclass(frozen=True)
class StageGain:
    """One stage of the chain and what is proved of it.

    Attributes:
        name: of the layer.
        gain_upper_bound: of sequences through it.
        state_gain: ‖Δy‖ ≤ state_gain·‖Δx₀‖ for equal inputs; None without memory.
        residual_gain: ‖Δy‖ ≤ residual_gain·‖r‖ between exact neurons and those that leave r of
            their equation; None where they are computed, not solved for.
    """

    name: str
    gain_upper_bound: float
    state_gain: float | None = None
    residual_gain: float | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class DynamicsCertificate(Shown):
    """What the weights of a model with memory prove, in float64 and rounded outwards.

    For every two input sequences of any one length, with differences Δu, Δy in l2 over all steps,

        ‖Δy‖ ≤ gain·‖Δu‖ + Σ_i after_i·√V_i(Δx₀ᵢ),     V_i(Δx) = ΔxᵀP_iΔx,                     (1)

    over the recurrent stages i, `after_i` the product of the gains behind stage i. From equal
    initial states, such as the zeros that Keras starts with, the sum is zero.

    Attributes:
        gain_upper_bound: of (1).
        stages: tuple of `StageGain`, in order.
        storages: tuple of P_i.
        claim: what was asked for, or None for the gain alone.
        verdict: `"PROVED"` or `"NOT_PROVED"`.
        nearest: the nearest claim of the kind of `claim` that is proved, or None if none is.
        indices: `Indices` that are proved, of a single recurrent layer that has or is asked for
            them; else None.
        rate: proven contraction rate, or None.
        radius: (n,) lower bounds on the l2 change of a whole sequence that changes its decision;
            None without inputs.
        predictions: (n,) labels of the logits in float64.
        is_right: (n,) bool, where labels were given.
        assumptions: tuple of sentences.
        seconds: wall time.
        evidence: `verification.memoryfiles.MemoryClaim`: storages and multipliers of what is
            proved; None where some gain is infinite.
        model: what was certified.
    """

    gain_upper_bound: float
    stages: tuple
    storages: tuple
    claim: object
    verdict: str
    nearest: object
    indices: object
    rate: float | None
    radius: np.ndarray | None
    predictions: np.ndarray | None
    is_right: np.ndarray | None
    assumptions: tuple
    seconds: float
    evidence: object = None
    model: object = None

    @property
    def proved(self):
        """Whether the claim, or some finite gain where nothing was claimed, is proved."""
        return self.verdict == "PROVED"

    def output_upper_bound(self, input_change, *state_changes):
        """Bound (1) on the change of the outputs, rounded up.

        Args:
            input_change: ‖Δu‖ over all steps.
            *state_changes: Δx₀ of every recurrent stage, in order, as vectors; none for equal ones.

        Raises:
            ValueError: for a size that is negative or NaN, and vectors of other lengths than the
                stages' states.
        """
        if state_changes and len(state_changes) != len(self.storages):
            raise ValueError(
                f"There must be a change of state for each of {len(self.storages)} recurrent "
                f"stages, or none. Received: {len(state_changes)}."
            )
        if not float(input_change) >= 0:
            raise ValueError(
                f"`input_change` must be a norm, at least 0. Received: {input_change!r}."
            )
        terms = [product_up(self.gain_upper_bound, float(input_change))]
        recurrent = [i for i, s in enumerate(self.stages) if s.state_gain is not None]
        changes = [np.asarray(change, dtype=np.float64) for change in state_changes]
        for i, change, storage in zip(recurrent, changes, self.storages, strict=False):
            if change.shape != (len(storage),) or np.any(np.isnan(change)):
                raise ValueError(
                    f"A change of the states of {self.stages[i].name!r} must be a vector of "
                    f"{len(storage)} numbers. Received: shape {change.shape}."
                )
            norm = hypot_up(*np.abs(change).tolist())
            after = product_up(*(s.gain_upper_bound for s in self.stages[i + 1 :]))
            terms.append(product_up(after, self.stages[i].state_gain, norm))
        return sum_up(*terms)

    def certified_accuracy(self, radius):
        """Share of the inputs that keep their right decision under every change of this l2 norm.

        Raises:
            ValueError: without inputs and labels.
        """
        if self.is_right is None:
            raise ValueError(
                "`certified_accuracy` needs inputs and labels: certify_dynamics(model, x, y)."
            )
        return float(np.mean(self.is_right & (self.radius >= radius)))

    def save(self, path):
        """Writes a proof file (`.npz`), which `verification.verify` re-checks by NumPy alone.

        It holds the gain, and the claim of a single recurrent layer where it is proved; no radii.

        Args:
            path: file name; an existing file is replaced.

        Raises:
            ValueError: if nothing is proved, or the verifier cannot confirm it, because the model
                has changed. Nothing is written then.
            TypeError: for the certificate of a layer or a `System`: a file is about a model.
        """
        if self.evidence is None or not self.proved:
            raise ValueError(
                f"There is no proof to write. Received: verdict {self.verdict}, gain "
                f"{self.gain_upper_bound}. Certify the nearest claim: {self.nearest!r}."
            )
        model, chain = sequences.read_sequences(self.model)
        wrong = memoryfiles.objections(chain, self.evidence)[0]
        wrong = wrong or sequences.contradictions(model, chain)
        if wrong:
            raise ValueError(
                "The verifier could not confirm this certificate, so no proof file was written: "
                f"the model may have changed. Received: model {model.name!r}. {' '.join(wrong)}"
            )
        archive.write(path, *memoryfiles.pack(chain, self.evidence))

    def explain(self):
        """Plain text: the inequality, every stage, the claim, and the assumptions."""
        gain = at_most(self.gain_upper_bound, 6)
        lines = [f"‖Δy‖ ≤ {gain}·‖Δu‖ over sequences of any length, from equal initial states."]
        if self.claim is not None:
            lines.append(f"{self.verdict}: {self.claim!r}.")
            if not self.proved and self.nearest is not None:
                lines.append(f"The nearest claim that is proved: {self.nearest!r}.")
        lines += ["", "stage: gain; change of the outputs per change of the initial state"]
        for s in self.stages:
            state = "" if s.state_gain is None else f"; {at_most(s.state_gain, 4)}"
            if s.residual_gain is not None:
                state += f"; {at_most(s.residual_gain, 4)} per rest of the equation"
            lines.append(f"  {s.name}: {at_most(s.gain_upper_bound, 4)}{state}")
        return "\n".join([*lines, "", *self.assumptions])

    def __str__(self):
        return self.explain()

    def __float__(self):
        return float(self.gain_upper_bound)

    def _page(self):
        facts = [("gain", f"≤ {at_most(self.gain_upper_bound, 4)}")]
        if self.claim is not None:
            facts.append(("claim", repr(self.claim)))
        if self.indices is not None:
            facts.append(("delta", at_least(self.indices.delta, 4)))
            facts.append(("nu", f"≥ {at_least(self.indices.nu, 4)}"))
        if self.rate is not None:
            facts.append(("rate", f"≤ {at_most(self.rate, 4)}"))
        if not self.proved and self.nearest is not None:
            facts.append(("nearest proved", repr(self.nearest)))
        if self.radius is not None:
            facts.append(("median radius", at_least(float(np.median(self.radius)), 4)))
        rows = tuple(
            (
                s.name,
                at_most(s.gain_upper_bound, 4),
                "" if s.state_gain is None else at_most(s.state_gain, 4),
            )
            for s in self.stages
        )
        table = Table(("stage", "gain", "per initial state"), rows)
        return Page(f"DynamicsCertificate {self.verdict}", tuple(facts), (table,), self.assumptions)


def state_gain(storage, norm_up):
    """√‖P‖, rounded up."""
    found = norm_up(storage)
    return sqrt_up(found) if math.isfinite(found) else math.inf
