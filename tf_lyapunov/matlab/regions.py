"""`export_region`: the matrix inequality of a region of attraction, for `check_region.m`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from tf_lyapunov.writing import write_bytes


def export_region(path, region):
    """Writes the inequalities of a proved region for MATLAB and GNU Octave.

    `matlab_compat/check_region.m` proves them again: that V = xᵀPx falls for all slopes within the
    sectors, and that the ellipsoid lies in the set where they hold. The file holds one variable
    `region` with the matrices M and N of x⁺ = Mξ and v = Nξ, ξ = (x, w, q), the sectors, the
    bounds |cᵀx| ≤ d, P, ρ and the multipliers (see `verification.loops`). That the sectors follow
    from the weights is for `verification.verify`, not for MATLAB.

    Args:
        path: file name, ending in .mat; written whole or not at all.
        region: `control.RegionOfAttraction` with an ellipsoid.

    Raises:
        TypeError: for something else.
        ValueError: without an ellipsoid, or for a name of another kind.

    Example:

    >>> import tempfile
    >>> from tf_lyapunov.control import Plant, region_of_attraction
    >>> import keras
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.set_weights([np.array([[-0.7]])])
    >>> region = region_of_attraction(Plant([[1.2]], [1.0]), model, [1.0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_region(folder + "/loop.mat", region)
    """
    from scipy.io import savemat

    from tf_lyapunov.control import RegionOfAttraction
    from tf_lyapunov.verification import loops
    from tf_lyapunov.verification.reading import read_with_calls

    path = Path(path)
    if not isinstance(region, RegionOfAttraction):
        raise TypeError(
            "`region` must be what `region_of_attraction` gave. "
            f"Received: an object of type {type(region).__name__}."
        )
    if path.suffix != ".mat":
        raise ValueError(f"`path` must end in .mat. Received: {path}.")
    if region.claim is None:
        raise ValueError(f"There is no region to write. Received: {region.reason}")
    claim = region.claim
    chain = loops.controller_of(read_with_calls(region.controller)[1])
    first = claim.first if len(claim.first) else np.inf
    form = loops.form_on(claim.plant, chain, claim.box, first, claim.reads)
    size = form.motion.shape[1]
    record = {
        "motion": form.motion,
        "motion_error": form.motion_error,
        "signal": np.concatenate([form.signal, form.gap_reads(size)]),
        "signal_error": np.concatenate([form.signal_error, np.zeros((len(claim.mu), size))]),
        "low": np.concatenate([form.alpha, form.low])[:, None],
        "high": np.concatenate([form.beta, form.high])[:, None],
        "multipliers": np.concatenate([claim.lam, claim.mu])[:, None],
        "bounds": form.bounds,
        "bounds_error": form.bounds_error,
        "widths": form.widths[:, None],
        "P": claim.shape,
        "rate": claim.rate[:, None],
    }
    buffer = io.BytesIO()
    savemat(buffer, {"region": record}, do_compression=True)
    write_bytes(path, buffer.getvalue())
