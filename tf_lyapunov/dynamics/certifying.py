"""`certify_dynamics`: gains, indices and radii of models with memory, from their weights."""

import math
import time
from fractions import Fraction

import keras
import numpy as np

from tf_lyapunov.dynamics import search
from tf_lyapunov.dynamics.certificate import DynamicsCertificate, StageGain, state_gain
from tf_lyapunov.dynamics.simulating import margins
from tf_lyapunov.dynamics.stages import stages_of
from tf_lyapunov.dynamics.systems import System
from tf_lyapunov.errors import UnfaithfulReading, UnsupportedLayerError
from tf_lyapunov.theory.rounding import round_down, sqrt_up
from tf_lyapunov.theory.sectors import Indices
from tf_lyapunov.theory.supply_rates import Contracting, L2Gain, Supply, supply_matrices
from tf_lyapunov.theory.threads import one_thread
from tf_lyapunov.verification.arithmetic import norm_up, product_up, row_norms_up, up
from tf_lyapunov.verification.dissipation import is_explicit, is_well_posed, proves, residual_gain
from tf_lyapunov.verification.memoryfiles import MemoryClaim

# Float32 evaluation of a model and float64 of its weights, relative to the size of the logits.
_NEAR = 1e-2


def certify_dynamics(
    model, x=None, y=None, *, claim=None, solver="clarabel", optimise=None, seconds=None
):
    """What the weights of a model with memory prove, over sequences of any length.

    For each recurrent layer, P ⪰ 0 and Λ ≥ 0 are sought with (1) of `verification.dissipation`:
    first those of its parametrisation, then by a semidefinite program. Whatever they are, it is
    proved for the float32 weights as used, read as float64, by a Cholesky factor with outward
    rounding. Gains of a chain multiply.

    Args:
        model: a built `RecurrentEquilibrium` layer, `keras.layers.RNN` of the cell, or a Sequential
            or functional chain of these and of layers that act on every step alone; or a
            `dynamics.System`.
        x: sequences (n, steps, features) whose decisions are to be certified, or None. The model
            must end in logits of every sequence.
        y: integer labels (n,), or None.
        claim: `L2Gain(γ)` of the whole model; or `Indices(δ, ν)`, `Supply(Q, S, R)` or
            `Contracting(a)` of a single recurrent layer. By default the layer's own kind is
            certified beside the gain, as far as it holds.
        solver: of cvxpy, `"clarabel"`, `"scs"` or `"mosek"`.
        optimise: whether P and Λ are optimised; by default where cvxpy is installed and a layer has
            at most 80 states, neurons and inputs together. Without it the bound is that of the
            parametrisation, scaled.
        seconds: time limit of each semidefinite program.

    Returns:
        `DynamicsCertificate`. What is not proved is its verdict, with the nearest claim that is.

    Raises:
        UnsupportedLayerError: for a layer without a rule, such as an LSTM, and for masks.
        ValueError: if weights or inputs are not finite, something is not built, or a claim does
            not fit the model.
        UnfaithfulReading: if the model's own logits are not those of its weights.

    Example:

    >>> import numpy as np
    >>> from tf_lyapunov.dynamics import L2Gain
    >>> from tf_lyapunov.layers import RecurrentEquilibrium
    >>> layer = RecurrentEquilibrium(1, states=2, supply=L2Gain(2.0))
    >>> _ = layer(np.ones((1, 3, 1), "float32"))
    >>> certify_dynamics(layer, claim=L2Gain(2.0)).verdict
    'PROVED'

    Reference: Revay, Wang and Manchester (2024); sound form (weights as stored, any P and Λ).
    """
    begin = time.monotonic()
    stages = [model] if isinstance(model, System) else stages_of(model)
    single = stages[0] if len(stages) == 1 and isinstance(stages[0], System) else None
    _check_claim(claim, single)
    options = {"solver": solver, "optimise": optimise}
    with one_thread():
        gains, storages, squared, multipliers = [], [], [], []
        for stage in stages:
            found = _gain(stage, seconds, options)
            gains.append(found[0])
            storages += found[1]
            multipliers += found[2]
            squared += found[3]
        total = product_up(*(g.gain_upper_bound for g in gains))
        indices, rate, verdict, nearest, proof = _judged(claim, single, total, seconds, options)
        found = (None, None, None)
        if x is not None:
            found = _radii(model, stages, storages, gains, x, y)
    return DynamicsCertificate(
        total, tuple(gains), tuple(storages), claim, verdict, nearest, indices, rate, *found,
        _assumptions(stages, x, total), time.monotonic() - begin,
        _evidence(total, squared, storages, multipliers, proof), model,
    )  # fmt: skip


def _check_claim(claim, single):
    kinds = (L2Gain, Indices, Supply, Contracting)
    if claim is not None and not isinstance(claim, kinds):
        raise TypeError(
            f"`claim` must be L2Gain, Indices, Supply or Contracting. Received: claim={claim!r}."
        )
    if claim is None or isinstance(claim, L2Gain):
        return
    if single is None:
        raise ValueError(
            "Indices, supply rates and contraction are of one recurrent layer. Received: "
            f"claim={claim!r} for a model of several stages. Pass the layer, or claim a gain."
        )
    if isinstance(claim, Supply):
        claim.matrices(single.outputs, single.inputs)


def _evidence(total, squared, storages, multipliers, proof):
    """`MemoryClaim` of what was proved: `proof` is a dict of its last three fields."""
    if not math.isfinite(total):
        return None
    # Of a chain, the verifier's own norms of dense layers may differ in the last places.
    return MemoryClaim(
        product_up(total, 1 + 2.0**-40), tuple(squared), tuple(storages), tuple(multipliers),
        **proof,
    )  # fmt: skip


def _gain(stage, seconds, options):
    """`(StageGain, [P], [Λ], [θ])` of a stage; of one without memory the lists are empty."""
    if not isinstance(stage, System):
        return StageGain(stage.name, stage.gain), [], [], []
    p, m = stage.outputs, stage.inputs
    rate = -np.eye(p), np.zeros((m, p)), np.zeros((m, m))
    found = search.proved_theta(stage, rate, seconds=seconds, **options)
    if _posed(stage, found) is None:
        storage = np.full((stage.states,) * 2, np.inf)
        return StageGain(stage.name, math.inf, math.inf), [storage], [], []
    theta, storage, multipliers = found
    theta = max(theta, 0.0)
    gain = sqrt_up(Fraction(theta))
    left = None if is_explicit(stage) else residual_gain(stage, storage, multipliers)
    of = StageGain(stage.name, gain, state_gain(storage, norm_up), left)
    return of, [storage], [multipliers], [theta]


def _judged(claim, single, gain, seconds, options):
    """`(indices, rate, verdict, nearest, proof)`: a dict of what a proof says beside gains."""
    asked = claim
    if claim is None and single is not None and not isinstance(single.supply, L2Gain):
        asked = single.supply
    if asked is None or isinstance(asked, L2Gain):
        limit = math.inf if claim is None else claim.gamma
        proved = math.isfinite(gain) and gain <= limit
        known = L2Gain(gain) if 0 < gain < math.inf else None
        return None, None, _verdict(proved), known, {}
    if isinstance(asked, Contracting):
        found = _posed(single, search.proved_rate(single, asked.rate, **options))
        rate = None if found is None else found[0]
        proved = rate is not None and rate <= asked.rate
        nearest = None if rate is None else Contracting(rate)
        proof = {} if found is None else {"rate": rate, "evidence": found[1:]}
        verdict = _verdict(proved or (claim is None and math.isfinite(gain)))
        return None, rate, verdict, nearest, proof
    q, s, r = supply_matrices(asked, single.outputs, single.inputs)
    base = np.zeros_like(r) if isinstance(asked, Indices) else r
    found = search.proved_theta(single, (q, s, base), seconds=seconds, **options)
    found = _posed(single, found)
    if found is None:
        return None, None, _verdict(claim is None and math.isfinite(gain)), None, {}
    theta, storage, multipliers = found
    if isinstance(asked, Indices):
        nu = -theta / 2
        if asked.delta > 0:  # beyond it the cone is empty, so that only rounding can lead there
            nu = min(nu, round_down(1 / (4 * Fraction(asked.delta))))
        indices = Indices(asked.delta, nu)
        proved = nu >= asked.nu
        rate = supply_matrices(indices, single.outputs, single.inputs)
        proof = _written(single, storage, multipliers, rate)
        return indices, None, _verdict(proved or claim is None), indices, proof
    proved = proves(single, storage, multipliers, (q, s, r))
    nearest = asked
    if not proved:
        raised, diagonal = np.array(r), np.diag_indices(len(r))
        raised[diagonal] = up(raised[diagonal] + theta)
        nearest = Supply(q, s, raised)
    rate = nearest.Q, nearest.S, nearest.R
    proof = _written(single, storage, multipliers, rate)
    return None, None, _verdict(proved or claim is None), nearest, proof


def _posed(single, found):
    """What was found, or None where the neurons' equation is not proved to have a solution."""
    return found if found is not None and is_well_posed(single, found[2]) else None


def _written(single, storage, multipliers, supply):
    """Fields of a supply rate for `MemoryClaim`; none if its own rounding keeps it unproved."""
    if not proves(single, storage, multipliers, supply):
        return {}
    return {"supply": supply, "evidence": (storage, multipliers)}


def _verdict(proved):
    return "PROVED" if proved else "NOT_PROVED"


def _radii(model, stages, storages, gains, x, y):
    """`(radius, predictions, is_right)`."""
    x = np.asarray(x)
    if x.ndim != 3 or not len(x) or not np.issubdtype(x.dtype, np.number):
        raise ValueError(
            f"`x` must be sequences (n, steps, features) of numbers. Received: shape {x.shape} of "
            f"{x.dtype}."
        )
    if not np.all(np.isfinite(x)):
        raise ValueError("`x` must be finite. Received: NaN or infinity in a sequence.")
    layers = [s.layer for s in stages if isinstance(s, System)]
    if any(isinstance(s, System) and not is_explicit(s) for s in stages):
        raise UnsupportedLayerError(
            "Radii need neurons that are computed, not solved for: the logits in float64 have no "
            "bound on the rest of an equation. Received: a layer with implicit=True. Certify the "
            "model without inputs, or use blocks."
        )
    if not isinstance(model, keras.Model) or any(v is None or v.stateful for v in layers):
        raise ValueError(
            "Radii need a model that starts every sequence from zero states. Received: a layer, or "
            "stateful=True."
        )
    narrow = keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(x, dtype=model.compute_dtype))
    values = narrow.astype(np.float64)
    # Radii are of the inputs as given: what the cast moved them by is taken off.
    moved = row_norms_up((values - x.astype(np.float64)).reshape(len(x), -1))
    head = stages[-1]
    linear = getattr(head, "kind", "") == "dense" and head.activation is keras.activations.linear
    kept = stages[:-1] if linear else stages
    levels = [g.gain_upper_bound for g in gains]
    logits, errors = margins(stages, storages, levels, values)
    _compare(model, narrow, logits)
    if logits.shape[1] < 2:
        raise ValueError(
            f"Radii need at least two logits. Received: {logits.shape[1]}. Give each class one."
        )
    before = product_up(*levels[: len(kept)])
    predictions = np.argmax(logits, axis=1)
    labels = predictions if y is None else _labels(y, logits)
    radius = np.full(len(x), np.inf)
    for k in range(logits.shape[1]):
        for label in np.unique(labels):
            if k == label:
                continue
            if linear:
                pair = np.abs(head.kernel[:, label] - head.kernel[:, k]) * (1 + 2.0**-50)
                slope = product_up(before, float(row_norms_up(pair[None])[0]))
            else:
                slope = product_up(before, math.nextafter(math.sqrt(2), 2))
            chosen = labels == label
            gap = (logits[chosen, label] - logits[chosen, k]) * (1 - 2.0**-50)
            gap = gap - 2 * errors[chosen] * (1 + 2.0**-50)
            if slope == 0:
                found = np.where(gap > 0, np.inf, 0.0)
            else:
                found = np.maximum(gap / slope * (1 - 2.0**-50), 0.0)
            radius[chosen] = np.minimum(radius[chosen], found)
    radius = np.maximum((radius - moved) * (1 - 2.0**-50), 0.0)
    is_right = None if y is None else predictions == labels
    return np.where(np.isfinite(errors), radius, 0.0), predictions, is_right


def _labels(y, logits):
    labels = np.asarray(y)
    fits = labels.shape == (len(logits),) and np.issubdtype(labels.dtype, np.integer)
    if not fits or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"`y` must hold {len(logits)} integer labels from 0 to {logits.shape[1] - 1}. "
            f"Received: shape {labels.shape} of {labels.dtype}."
        )
    return labels


def _compare(model, x, logits):
    """Refuses a model that computes something else than what was read of it."""
    own = np.asarray(keras.ops.convert_to_numpy(model(x, training=False)), dtype=np.float64)
    size = 1 + float(np.max(np.abs(logits)))
    if own.shape != logits.shape or not np.max(np.abs(own - logits)) <= _NEAR * size:
        raise UnfaithfulReading(
            "The model does not compute what its weights say. Received: logits that differ from "
            "those of the stages. Remove layers whose `call` was replaced.",
            model.name,
        )


def _assumptions(stages, x, gain):
    found = [
        "Exact arithmetic on the weights as stored; inputs of every length; no masks.",
        "From different initial states V(Δx₀) is added: output_upper_bound.",
    ]
    layers = [s.layer for s in stages if isinstance(s, System) and s.layer is not None]
    if any(getattr(layer, "stateful", False) for layer in layers):
        found.append("Stateful layers: a sequence is what comes between two resets.")
    if any(isinstance(s, System) and not is_explicit(s) for s in stages):
        found.append(
            "Neurons that solve an equation are exact; what the splitting leaves of it, r, adds "
            "residual_gain·‖r‖ to the outputs of each of the two sequences."
        )
    if x is not None:
        found.append("Radii are in l2 over a whole sequence.")
    for stage in () if math.isfinite(gain) else stages:
        radius = _linear_radius(stage)
        if radius >= 1:
            found.append(
                f"{stage.name}: its linear part has the spectral radius {radius:.6g} (an "
                "estimate), so that no storage sees all of its states. "
                "Stabilise it first, by feedback or by training under a supply rate."
            )
    return tuple(found)


def _linear_radius(stage):
    """Largest |λ(A + B₁ᾱ(I - ᾱD₁₁)⁻¹C₁)| at the smallest slopes α; 0 where none exists."""
    if not isinstance(stage, System) or not stage.states:
        return 0.0
    n, q = stage.states, stage.units
    a = stage.step[:, :n]
    if stage.sector.alpha:
        inner = np.eye(q) - stage.sector.alpha * stage.neurons[:, n : n + q]
        try:
            follow = np.linalg.solve(inner, stage.sector.alpha * stage.neurons[:, :n])
        except np.linalg.LinAlgError:  # no neurons that solve their equation
            return 0.0
        a = a + stage.step[:, n : n + q] @ follow
    return float(np.max(np.abs(np.linalg.eigvals(a))))


__all__ = ["certify_dynamics"]
