"""Systems with memory in Octave: proved again, and not when they are changed."""

import pathlib
import shutil
import subprocess

import keras
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from tf_lyapunov.dynamics import Contracting, L2Gain, certify_dynamics
from tf_lyapunov.layers import RecurrentEquilibrium
from tf_lyapunov.matlab import export_memory
from tf_lyapunov.theory.sectors import Indices

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "matlab_compat"


def proof(supply, *after):
    keras.utils.set_random_seed(0)
    layer = RecurrentEquilibrium(2, 2, supply, "tanh", neurons=3, return_sequences=True)
    return certify_dynamics(keras.Sequential([keras.Input((5, 2)), layer, *after]), optimise=False)


def test_octave_proves_the_inequalities_again_and_no_stronger_ones(tmp_path):
    program = shutil.which("octave-cli")
    if program is None:
        pytest.skip("GNU Octave is not installed (package octave): no octave-cli on the path")
    chain = proof(L2Gain(2.0), keras.layers.Dense(3))
    export_memory(tmp_path / "chain.mat", chain)
    export_memory(tmp_path / "indices.mat", proof(Indices(0.5, -0.3)))
    export_memory(tmp_path / "rate.mat", proof(Contracting(0.9)))
    good = ["chain", "indices", "rate"]
    changes = {
        "indices": {"Q": 3.0}, "chain": {"theta": 0.9, "multipliers": -1.0, "P": -1.0},
        "rate": {"rate": 0.1},
    }  # fmt: skip
    bad = []
    for name, change in changes.items():
        for field, factor in change.items():
            held = loadmat(tmp_path / f"{name}.mat")["memory"]
            row = held["inequalities"][0, 0][0, -1]
            row[field][0, 0] = row[field][0, 0] * factor
            bad.append(f"bad{len(bad)}")
            savemat(tmp_path / f"{bad[-1]}.mat", {"memory": held})
    command = f"addpath('{FOLDER}');"
    command += "".join(
        f"r = check_memory('{n}.mat'); printf('%s %.17g\\n', r.verdict, r.gain);"
        for n in good + bad
    )
    found = subprocess.run(
        [program, "--no-history", "--norc", "--eval", command],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    lines = [line.split() for line in found.stdout.splitlines()]
    assert [line[0] for line in lines] == ["PROVED"] * 3 + ["NOT_PROVED"] * len(bad), found.stderr
    assert float(lines[0][1]) == pytest.approx(chain.gain_upper_bound, rel=1e-6)
    assert all(float(line[1]) == np.inf for line in lines[3:])


def test_what_is_no_proof_is_not_written(tmp_path):
    found = proof(L2Gain(2.0))
    with pytest.raises(TypeError, match="certify_dynamics"):
        export_memory(tmp_path / "a.mat", None)
    with pytest.raises(ValueError, match=r"end in \.mat"):
        export_memory(tmp_path / "a.npz", found)
    with pytest.raises(ValueError, match="NOT_PROVED"):
        refused = certify_dynamics(found.model, claim=L2Gain(1e-6), optimise=False)
        export_memory(tmp_path / "a.mat", refused)
    found.model.layers[-1].cell.factor.assign(found.model.layers[-1].cell.factor * 0)
    with pytest.raises(ValueError, match="changed"):
        export_memory(tmp_path / "a.mat", found)
    assert list(tmp_path.iterdir()) == []
