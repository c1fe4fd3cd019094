"""Proof files of models with memory: storages and multipliers, checked against the weights.

For every recurrent stage there are P_i ⪰ 0, Λ_i ≥ 0 and θ_i for which (1) of `dissipation` holds
with Q = -I, S = 0, R = 0: its gain over sequences is √θ_i at most. Gains of stages multiply. A
supply rate, or a rate of contraction, of a single recurrent stage has a P and a Λ of its own.
"""

import dataclasses
import time

import numpy as np

from tf_lyapunov.digits import at_most, exactly
from tf_lyapunov.verification import archive, claimed, sequences
from tf_lyapunov.verification.arithmetic import sqrt_up
from tf_lyapunov.verification.dissipation import is_explicit, is_well_posed, proves
from tf_lyapunov.verification.outcome import Outcome, reasons_against

_KINDS = {
    "sizes": "i8", "storages": "f8", "multipliers": "f8", "squared": "f8", "gain": "f8",
    "supply": "f8", "rate": "f8", "claim_storage": "f8", "claim_multipliers": "f8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryClaim:
    """What a proof file says of a chain with memory.

    Attributes:
        gain: of the chain.
        squared: θ_i of every recurrent stage.
        storages, multipliers: tuples of P_i and Λ_i.
        supply: `(Q, S, R)` of the only stage, or None.
        rate: of its contraction, or None.
        evidence: `(P, Λ)` of supply or rate, or None.
    """

    gain: float
    squared: tuple
    storages: tuple
    multipliers: tuple
    supply: tuple | None = None
    rate: float | None = None
    evidence: tuple | None = None


def pack(chain, claim, notes=()):
    """`(header, arrays)` for `archive.write`."""
    steps = [m.step for m in chain.memories]
    sizes = [[s.states, s.units, s.inputs, s.outputs] for s in steps]
    evidence = (np.zeros(0), np.zeros(0)) if claim.evidence is None else claim.evidence
    supply = () if claim.supply is None else claim.supply
    arrays = {
        "sizes": np.array(sizes, np.int64).reshape(-1, 4),
        "storages": _flat(claim.storages),
        "multipliers": _flat(claim.multipliers),
        "squared": np.array(claim.squared, np.float64),
        "gain": np.array([claim.gain]),
        "supply": _flat(supply),
        "rate": np.array([] if claim.rate is None else [claim.rate], np.float64),
        "claim_storage": np.ravel(evidence[0]),
        "claim_multipliers": np.ravel(evidence[1]),
    }
    return claimed.pack(archive.MEMORIES, chain, arrays, (), notes)


def _flat(arrays):
    return np.concatenate([np.zeros(0), *(np.ravel(a) for a in arrays)])


def unpack(header, arrays):
    """`(layers, claim, notes)` of a file's contents.

    Raises:
        KeyError, TypeError, ValueError: if something is missing, unknown or of the wrong form.
    """
    layers, fields, pieces, notes = claimed.unpack(header, arrays, _KINDS)
    if pieces:
        raise ValueError("a proof of a system with memory has no multipliers of boxes")
    sizes = fields["sizes"]
    if sizes.ndim != 2 or sizes.shape[1] != 4 or np.any(sizes < 0) or np.any(sizes > 2**20):
        raise ValueError("the sizes of its stages are not rows of four numbers")
    sizes = [tuple(int(v) for v in row) for row in sizes]
    squared, gain = fields["squared"], fields["gain"]
    if squared.shape != (len(sizes),) or gain.shape != (1,) or np.any(squared < 0):
        raise ValueError("there is not one gain for every stage")
    storages = _cut(fields["storages"], [(n, n) for n, *_ in sizes])
    multipliers = _cut(fields["multipliers"], [(q,) for _, q, *_ in sizes])
    supply, rate, evidence = None, None, None
    if fields["supply"].size or fields["rate"].size:
        if len(sizes) != 1 or (fields["supply"].size and fields["rate"].size):
            raise ValueError("a supply rate or a rate of contraction is of one recurrent stage")
        n, q, m, p = sizes[0]
        evidence = (
            *_cut(fields["claim_storage"], [(n, n)]),
            *_cut(fields["claim_multipliers"], [(q,)]),
        )
        if fields["rate"].size:
            if fields["rate"].shape != (1,) or not 0 < fields["rate"][0] <= 1:
                raise ValueError("a rate of contraction is a number above 0 and at most 1")
            rate = float(fields["rate"][0])
        else:
            supply = tuple(_cut(fields["supply"], [(p, p), (m, p), (m, m)]))
    elif fields["claim_storage"].size or fields["claim_multipliers"].size:
        raise ValueError("it holds multipliers of no claim")
    claim = MemoryClaim(
        float(gain[0]), tuple(float(v) for v in squared), tuple(storages), tuple(multipliers),
        supply, rate, evidence,
    )  # fmt: skip
    return layers, claim, notes


def _cut(flat, shapes):
    """Arrays of these shapes, of one that holds them one after the other."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    if flat.shape != (sum(sizes),):
        raise ValueError("its matrices are not of the sizes that it states")
    parts = np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def objections(chain, claim):
    """`(sentences on what does not follow from the weights, gain that does)`."""
    memories, gains = chain.memories, []
    if len(memories) != len(claim.storages):
        return [f"The model has {len(memories)} recurrent layers, the file another number."], np.inf
    found = []
    for k, memory in enumerate(memories):
        step = memory.step
        p, m = step.outputs, step.inputs
        if claim.storages[k].shape != (step.states,) * 2 or len(claim.multipliers[k]) != step.units:
            return [f"The storage of layer {memory.name!r} is of another size."], np.inf
        rate = -np.eye(p), np.zeros((m, p)), np.zeros((m, m))
        pair = claim.storages[k], claim.multipliers[k]
        if not proves(step, *pair, rate, claim.squared[k]):
            found.append(f"The inequality of layer {memory.name!r} is not proved by its storage.")
        if not is_well_posed(step, claim.multipliers[k]):
            found.append(
                f"The equation of the neurons of layer {memory.name!r} may have no solution."
            )
        gains.append(sqrt_up(claim.squared[k]))
    gain = sequences.gain_of(chain, gains)
    if not gain <= claim.gain:
        found.append(f"The claimed gain {claim.gain!r} is below the {gain!r} that follows.")
    if claim.rate is not None or claim.supply is not None:
        found += _judged(chain, memories[0].step, claim)
    return found, gain


def _judged(chain, step, claim):
    """Sentences on a supply rate or a rate of contraction that is not proved."""
    if len(chain.stages) != 1:
        return ["A supply rate is claimed of a model of several stages."]
    if claim.rate is not None:
        # No more than the rate's square, which is rounded.
        squared = np.nextafter(claim.rate * claim.rate, 0)
        if not proves(step, *claim.evidence, squared_rate=squared):
            return [f"Contraction at rate {claim.rate!r} is not proved by its storage."]
        return []
    shapes = [(step.outputs,) * 2, (step.inputs, step.outputs), (step.inputs,) * 2]
    q, _, r = claim.supply
    if [v.shape for v in claim.supply] != shapes:
        return ["The supply rate is of another number of inputs or outputs."]
    if not (np.array_equal(q, q.T) and np.array_equal(r, r.T)):
        return ["Q or R of the supply rate is not symmetric."]
    if not proves(step, *claim.evidence, claim.supply):
        return ["The supply rate is not proved by its storage."]
    return []


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryVerification(Outcome):
    """Outcome of `verify` for a proof file of a model with memory.

    Attributes:
        holds: the claim follows from the model's weights.
        reasons: why not; empty if it holds.
        claim: `MemoryClaim`, as the file says.
        gain_upper_bound: as derived here; infinite if nothing could be.
        notes: what the file says of itself, unchecked.
        seconds: wall time.
        solved: names of the layers whose neurons solve an equation, which the claim takes as exact.
    """

    holds: bool
    reasons: tuple
    claim: MemoryClaim
    gain_upper_bound: float
    notes: tuple
    seconds: float
    solved: tuple = ()

    def explain(self):
        """Plain text: whether the file's claim follows from the weights, and if not, why."""
        count = len(self.claim.storages)
        lines = [
            f"{'VERIFIED' if self.holds else 'NOT VERIFIED'}: a system with {count} recurrent "
            f"layer{'' if count == 1 else 's'}."
        ]
        lines += [f"  - {reason}" for reason in self.reasons]
        if self.holds:
            lines.append(
                "  Sequences of every length from equal initial states: ‖Δy‖ ≤ "
                f"{at_most(self.claim.gain, 6)}·‖Δu‖."
            )
            if self.claim.rate is not None:
                lines.append(f"  States approach each other at rate {at_most(self.claim.rate, 6)}.")
            if self.claim.supply is not None:
                lines.append(f"  V⁺ - V ≤ ΔyᵀQΔy + 2ΔyᵀSᵀΔu + ΔuᵀRΔu with {self._words()}.")
            if self.solved:
                lines.append(
                    "  Of exact neurons where they solve an equation, in layers "
                    f"{', '.join(map(repr, self.solved))}: what the iterations of the layer leave "
                    "of it comes on top."
                )
        return "\n".join(lines + self.closing("random sequences"))

    def _words(self):
        pairs = zip("QSR", self.claim.supply, strict=True)
        return ", ".join(f"{name} = {exactly(v)}" for name, v in pairs)

    def fields(self):
        """JSON-safe dict of the outcome, without what the file says of itself."""
        supply = self.claim.supply
        return {
            "holds": bool(self.holds),
            "reasons": list(self.reasons),
            "claimed_gain_upper_bound": self.claim.gain,
            "rate": self.claim.rate,
            "supply": None if supply is None else [v.tolist() for v in supply],
            "solved": list(self.solved),
        }


def checked(layers, claim, notes, model_or_path):
    """`MemoryVerification` of a file's contents, see `rechecking.verify`."""
    begin = time.monotonic()
    model, chain = sequences.read_sequences(model_or_path)
    gain = np.inf

    def check():
        nonlocal gain
        found, gain = objections(chain, claim)
        return found or sequences.contradictions(model, chain)

    reasons = reasons_against(layers, chain, check)
    return MemoryVerification(
        not reasons, tuple(reasons), claim, np.inf if reasons else gain, notes,
        time.monotonic() - begin,
        tuple(m.name for m in chain.memories if not is_explicit(m.step)),
    )  # fmt: skip
