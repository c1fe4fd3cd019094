"""`export_memory`: the matrix inequalities of a system with memory, for `check_memory.m`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from tf_lyapunov.writing import write_bytes

# What is proved here is as tight as a Cholesky factor in float64 can tell; eigenvalues with a bound
# on their error need more.
ROOM = 1e-6


def export_memory(path, certificate):
    """Writes the inequalities that `certify_dynamics` proved, for MATLAB and GNU Octave.

    `matlab_compat/check_memory.m` proves them again: for every recurrent layer its gain over
    sequences, and the supply rate or the rate of contraction that the certificate has. The file
    holds one variable `memory` with the matrices of each step, of the storage V = xᵀPx and its
    multipliers (see `verification.dissipation`), and the gains of layers without memory. That the
    matrices are those of the weights is for `verification.verify`, not for MATLAB. θ, R and the
    rate are written a millionth larger (`ROOM`) than proved, which eigenvalues need.

    Args:
        path: file name, ending in .mat; written whole or not at all.
        certificate: `dynamics.DynamicsCertificate` of a model, proved.

    Raises:
        TypeError: for something else, or the certificate of a layer alone.
        ValueError: if nothing is proved, the model has changed since, or for a name of another
            kind.

    Example:

    >>> import tempfile, keras
    >>> from tf_lyapunov.dynamics import L2Gain, certify_dynamics
    >>> from tf_lyapunov.layers import RecurrentEquilibrium
    >>> layer = RecurrentEquilibrium(1, states=2, supply=L2Gain(2.0))
    >>> model = keras.Sequential([keras.Input((4, 1)), layer])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_memory(folder + "/memory.mat", certify_dynamics(model))

    Reference: Revay, Wang and Manchester (2024), Recurrent Equilibrium Networks.
    """
    from scipy.io import savemat

    from tf_lyapunov.dynamics import DynamicsCertificate
    from tf_lyapunov.verification import memoryfiles, sequences

    path = Path(path)
    if not isinstance(certificate, DynamicsCertificate):
        raise TypeError(
            "`certificate` must be what `certify_dynamics` gave. "
            f"Received: an object of type {type(certificate).__name__}."
        )
    if path.suffix != ".mat":
        raise ValueError(f"`path` must end in .mat. Received: {path}.")
    claim = certificate.evidence
    if claim is None or not certificate.proved:
        raise ValueError(
            f"There is no proof to write. Received: verdict {certificate.verdict}, gain "
            f"{certificate.gain_upper_bound}."
        )
    _, chain = sequences.read_sequences(certificate.model)
    wrong = memoryfiles.objections(chain, claim)[0]
    if wrong:
        raise ValueError(f"The model may have changed. Received: {' '.join(wrong)}")
    steps = [m.step for m in chain.memories]
    rows = []
    for step, storage, lam, theta in zip(
        steps, claim.storages, claim.multipliers, claim.squared, strict=True
    ):
        p, m = step.outputs, step.inputs
        supply = -np.eye(p), np.zeros((m, p)), np.zeros((m, m))
        rows.append(_row(step, storage, lam, supply, theta * (1 + ROOM), is_gain=True))
    if claim.supply is not None:
        q, s, r = claim.supply
        more = ROOM * max(float(np.max(np.abs(v), initial=0.0)) for v in claim.supply)
        rows.append(_row(steps[0], *claim.evidence, (q, s, r + more * np.eye(len(r)))))
    if claim.rate is not None:
        rate = min(claim.rate * (1 + ROOM), 1.0)
        rows.append(_row(steps[0], *claim.evidence, None, rate=rate))
    others = [s.gain for s in chain.stages if not isinstance(s, sequences.Memory)]
    held = np.empty((1, len(rows)), dtype=object)
    held[0, :] = rows
    record = {"inequalities": held, "other_gains": np.array([1.0, *others])}
    buffer = io.BytesIO()
    savemat(buffer, {"memory": record}, do_compression=True)
    write_bytes(path, buffer.getvalue())


def _row(step, storage, multipliers, supply, theta=0.0, rate=1.0, is_gain=False):
    none = np.zeros((0, 0))
    q, s, r = (none, none, none) if supply is None else supply
    return {
        "step": step.step,
        "neurons": step.neurons,
        "output": step.output,
        "alpha": float(step.sector.alpha),
        "beta": float(step.sector.beta),
        "P": storage,
        "multipliers": np.asarray(multipliers)[:, None],
        "Q": q,
        "S": s,
        "R": r,
        "theta": float(theta),
        "rate": float(rate),
        "is_gain": float(is_gain),
    }
