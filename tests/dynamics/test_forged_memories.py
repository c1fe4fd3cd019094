"""Proof files of models with memory with any one number changed: caught, or still true.

What the verifier accepts is judged once more in rational arithmetic.
"""

import itertools
from fractions import Fraction

import keras
import numpy as np
import pytest
from equilibria import draw

from tf_lyapunov.dynamics import Contracting, L2Gain, Supply, certify_dynamics
from tf_lyapunov.layers import RecurrentEquilibrium
from tf_lyapunov.theory.sectors import Indices
from tf_lyapunov.verification import archive, memoryfiles, verify
from tf_lyapunov.verification.sequences import Pointwise, read_sequences

# Of a supply rate Q < 0, S ≠ 0 and R that is no multiple of I.
RATE = Supply(-np.eye(2), np.array([[0.3, 0.1], [0.0, 0.2]]), np.array([[60.0, 1.0], [1.0, 70.0]]))
CLAIMS = {
    "gain": (L2Gain(3.0), L2Gain(50.0)),
    "indices": (Indices(0.6, -0.4), Indices(0.6, -0.4)),
    "rate": (Contracting(0.8), Contracting(0.8)),
    "supply": (L2Gain(3.0), RATE),
}
FACTORS = (0.99, 1.01, 1 - 2.0**-40, 0.0, -1.0, 1e-200, 1e200, np.inf)


def single(supply, seed=0, **arguments):
    keras.utils.set_random_seed(seed)
    layer = RecurrentEquilibrium(2, 2, supply, neurons=3, return_sequences=True, **arguments)
    model = keras.Sequential([keras.Input((5, 2)), layer])
    draw(layer, np.random.default_rng(seed), spread=0.3)
    return model


def saved(model, claim, path):
    """`(chain, header, arrays)` of a file that holds."""
    certify_dynamics(model, claim=claim, optimise=False).save(path)
    assert verify(path, model).holds
    return read_sequences(model)[1], *archive.read(path)


# Exactly ----------------------------------------------------------------------------------------


def rational(array):
    return np.vectorize(Fraction, otypes=[object])(np.asarray(array, np.float64))


def is_semidefinite(matrix):
    """Exactly, by elimination: a pivot of zero has a row of zeros."""
    matrix = matrix.copy()
    for k in range(len(matrix)):
        pivot, row = matrix[k, k], matrix[k, k + 1 :].copy()
        if pivot < 0 or (pivot == 0 and np.any(row != 0)):
            return False
        if pivot:
            matrix[k + 1 :, k + 1 :] -= np.outer(row, row) / pivot
    return True


def is_true(step, storage, multipliers, supply=None, theta=0, rate=1):
    """(1) of `verification.dissipation` with P ⪰ 0 and Λ ≥ 0, exactly; P ≻ 0 for a rate."""
    n, q, m = step.states, step.units, step.inputs
    eye = rational(np.eye(n + q + m))
    p, lam = rational(storage), rational(np.diag(multipliers))
    x, v, y = map(rational, (step.step, step.neurons, step.output))
    w, u = eye[n : n + q], eye[n + q :]
    alpha, beta = Fraction(step.sector.alpha), Fraction(step.sector.beta)
    if np.any(p != p.T) or np.any(lam < 0) or not is_semidefinite(p):
        return False
    form = Fraction(rate) ** 2 * eye[:, :n] @ p @ eye[:n] - x.T @ p @ x
    cross = w.T @ lam @ v
    form = form - (alpha + beta) * (cross + cross.T) + 2 * w.T @ lam @ w
    form = form + 2 * alpha * beta * v.T @ lam @ v
    if supply is None:
        tiny = Fraction(1, 2**2000) * rational(np.eye(n))
        return is_semidefinite(p - tiny) and is_semidefinite(form[: n + q, : n + q])
    of_y, of_both, of_u = map(rational, supply)
    both = u.T @ of_both @ y
    form = form + y.T @ of_y @ y + both + both.T + u.T @ of_u @ u + Fraction(theta) * u.T @ u
    return is_semidefinite(form)


def claim_is_true(chain, claim):
    """Whether all that an accepted claim says follows from the weights, exactly."""
    square = Fraction(1)
    for stage in chain.stages:
        square *= Fraction(stage.gain) ** 2 if isinstance(stage, Pointwise) else 1
    parts = zip(chain.memories, claim.storages, claim.multipliers, claim.squared, strict=True)
    for memory, storage, multipliers, theta in parts:
        step = memory.step
        rate = -np.eye(step.outputs), np.zeros((step.inputs, step.outputs)), 0 * np.eye(step.inputs)
        if not is_true(step, storage, multipliers, rate, theta):
            return False
        square *= Fraction(theta)
    if np.isfinite(claim.gain) and not (claim.gain >= 0 and Fraction(claim.gain) ** 2 >= square):
        return False
    if claim.rate is not None:
        return is_true(chain.memories[0].step, *claim.evidence, rate=claim.rate)
    if claim.supply is not None:
        return is_true(chain.memories[0].step, *claim.evidence, claim.supply)
    return True


# Edits ------------------------------------------------------------------------------------------


def edits(arrays):
    """Every number of every array times every factor, and in the place of its neighbour."""
    for name, array in arrays.items():
        for spot, factor in itertools.product(range(array.size), (*FACTORS, None)):
            held = array.copy()
            if factor is None:
                held.flat[spot] = array.flat[(spot + 1) % array.size]
            elif array.dtype.kind == "i":
                held.flat[spot] += int(np.sign(factor - 1)) or 1
            else:
                with np.errstate(invalid="ignore", over="ignore"):
                    held.flat[spot] *= factor
            if not np.array_equal(held, array):
                yield (name, spot, factor), arrays | {name: held}


def judged(chain, header, arrays):
    """ "unreadable", "caught" or "accepted"; what is accepted must be true."""
    try:
        _, claim, _ = memoryfiles.unpack(header, arrays)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return "unreadable"
    with np.errstate(all="ignore"):
        if memoryfiles.objections(chain, claim)[0]:
            return "caught"
    assert claim_is_true(chain, claim)
    return "accepted"


def tamper(chain, header, arrays):
    counts = {"unreadable": 0, "caught": 0, "accepted": 0}
    for what, changed in edits(arrays):
        try:
            counts[judged(chain, header, changed)] += 1
        except AssertionError as error:
            raise AssertionError(f"a false claim was accepted: {what}") from error
    return counts


@pytest.mark.parametrize("name", CLAIMS)
def test_every_number_that_is_changed_is_caught_or_harmless(name, tmp_path):
    supply, claim = CLAIMS[name]
    chain, header, arrays = saved(single(supply), claim, tmp_path / "proof.npz")
    assert judged(chain, header, arrays) == "accepted"
    counts = tamper(chain, header, arrays)
    # Most numbers are needed as they are; larger gains and other multipliers are true as well.
    assert counts["caught"] >= 60 and counts["unreadable"] >= 10 and counts["accepted"] >= 10
    for number, factor in (("gain", 0.99), ("squared", 0.5)):
        assert judged(chain, header, arrays | {number: arrays[number] * factor}) == "caught"


def test_every_number_of_a_chain_that_is_changed_is_caught_or_harmless(tmp_path):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((4, 2)),
            RecurrentEquilibrium(2, 2, L2Gain(1.5), neurons=2, return_sequences=True),
            keras.layers.Dense(2, activation="tanh"),
            RecurrentEquilibrium(2, 2, L2Gain(0.8), activation="leaky_relu", neurons=2),
        ]
    )
    rng = np.random.default_rng(1)
    for layer in (model.layers[0], model.layers[2]):
        draw(layer, rng, spread=0.3)
    chain, header, arrays = saved(model, L2Gain(50.0), tmp_path / "proof.npz")
    counts = tamper(chain, header, arrays)
    assert counts["caught"] >= 50 and counts["accepted"] >= 5
    # The proofs of the two layers in each other's place.
    for names in (("storages",), ("multipliers",), ("storages", "multipliers", "squared")):
        turned = {n: np.roll(arrays[n], len(arrays[n]) // 2) for n in names}
        assert judged(chain, header, arrays | turned) == "caught"


def test_what_one_file_proves_is_not_taken_from_another(tmp_path):
    """Arrays of two files of models of one form, each in the place of the other's."""
    supply = Contracting(0.8)
    first, second = (
        saved(single(supply, seed), supply, tmp_path / f"{seed}.npz") for seed in (0, 3)
    )
    chain, header, arrays = first
    found = {name: judged(chain, header, arrays | {name: second[2][name]}) for name in arrays}
    assert found["storages"] == found["claim_storage"] == "caught"
    whole = {name: a for name, a in second[2].items() if name.startswith("claim")}
    assert judged(chain, header, arrays | whole) == "caught"
    # The other model's file, and this one's steps in another order.
    assert judged(second[0], header, arrays) == "caught"


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-300, 5e-324])
def test_a_storage_that_does_not_see_all_states_proves_no_contraction(scale, tmp_path):
    """With P = 0 the inequality holds at any rate; so does one that sees the first state alone."""
    model = single(Contracting(0.8))
    chain, header, arrays = saved(model, Contracting(0.8), tmp_path / "proof.npz")
    for storage in (scale * np.eye(2), scale * np.diag([1.0, 0.0])):
        blind = {
            "rate": np.array([1e-6]),
            "claim_storage": storage.ravel(),
            "claim_multipliers": np.zeros(3),
        }
        assert judged(chain, header, arrays | blind) == "caught"
