"""Regions of attraction in Octave: proved again, and not when they are changed."""

import pathlib
import shutil
import subprocess

import keras
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from tf_lyapunov.control import Plant, SineGap, region_of_attraction
from tf_lyapunov.matlab import export_region

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "matlab_compat"


@pytest.fixture(scope="module")
def region():
    pytest.importorskip("cvxpy")
    hidden = keras.layers.Dense(2, "tanh", use_bias=False)
    last = keras.layers.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input((2,)), hidden, last])
    model.set_weights([np.array([[0.9, 0.3], [0.1, 0.4]]), np.array([[-1.0], [-0.5]])])
    plant = Plant([[1.1, 0.1], [0.0, 0.9]], [1.0, 0.3], gaps=[SineGap([1, 0], [0.0, 0.1])])
    return region_of_attraction(plant, model, [2.0, 2.0])


def test_octave_proves_a_region_again_and_no_larger_one(region, tmp_path):
    program = shutil.which("octave-cli")
    if program is None:
        pytest.skip("GNU Octave is not installed (package octave): no octave-cli on the path")
    export_region(tmp_path / "loop.mat", region)
    held = loadmat(tmp_path / "loop.mat", simplify_cells=True)["region"]
    for name in ("low", "high", "multipliers", "widths"):
        held[name] = np.asarray(held[name])[:, None]
    changes = {
        "larger": {"P": held["P"] * 0.9},
        "faster": {"rate": 0.5 * held["rate"]},
        "wider": {"low": held["low"] - 0.5},
    }
    for name, change in changes.items():
        savemat(tmp_path / f"{name}.mat", {"region": held | change})
    command = f"addpath('{FOLDER}'); r = check_region('loop.mat'); disp(r.verdict); "
    command += "printf('%.10g ', r.half_widths); disp('');"
    command += "".join(f"disp(check_region('{n}.mat').verdict);" for n in changes)
    found = subprocess.run(
        [program, "--no-history", "--norc", "--eval", command],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    lines = found.stdout.split("\n")
    assert lines[0] == "PROVED", found.stderr
    np.testing.assert_allclose([float(v) for v in lines[1].split()], region.half_widths)
    assert lines[2:5] == ["NOT_PROVED"] * 3


def test_what_is_no_region_is_refused(region, tmp_path):
    with pytest.raises(TypeError, match="region_of_attraction"):
        export_region(tmp_path / "a.mat", None)
    with pytest.raises(ValueError, match=r"end in \.mat"):
        export_region(tmp_path / "a.npz", region)
