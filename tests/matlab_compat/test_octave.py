"""The MATLAB functions, run by GNU Octave, against Python in both directions."""

import contextlib
import importlib.util
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from tf_lyapunov.design import Design, spectral_design
from tf_lyapunov.matlab import export_mat, import_mat
from tf_lyapunov.theory.cascade import cascade_matrix, scaled_cascade, scaled_cascade_matrix
from tf_lyapunov.theory.dissipativity import gain_rule_holds, theorem_1_matrix
from tf_lyapunov.theory.sectors import Indices, Sector
from tf_lyapunov.theory.spectra import is_positive_semidefinite, smallest_eigenvalue

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "matlab_compat"
GOLDEN = FOLDER / "golden"
# get_indexes lowers its budgets until the cascade is verified; how far depends on the last bits
# of LAPACK's eigenvalues, and is below this (relative) for every golden claim.
RESERVE = 1e-6


@pytest.fixture(scope="session")
def octave():
    """Runs a command in Octave with matlab_compat on its path."""
    program = shutil.which("octave-cli")
    if program is None:
        pytest.skip("GNU Octave is not installed (package octave): no octave-cli on the path")

    def run(command):
        return subprocess.run(
            [program, "--no-history", "--norc", "--eval", f"addpath('{FOLDER}'); {command}"],
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def tests_run(octave, tmp_path_factory):
    path = tmp_path_factory.mktemp("octave") / "results.mat"
    return octave(f"exit(run_tests('{path}') > 0)"), path


@pytest.fixture(scope="session")
def results(tests_run):
    return loadmat(tests_run[1], simplify_cells=True, mat_dtype=True)


@pytest.fixture(scope="session")
def make_golden():
    spec = importlib.util.spec_from_file_location("make_golden", FOLDER / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vector(value):
    return np.atleast_1d(np.asarray(value, dtype=np.float64))


def test_every_octave_test_passes(tests_run):
    process, _ = tests_run
    lines = process.stdout.splitlines()
    assert process.returncode == 0, process.stdout + process.stderr
    assert lines[-1].endswith("tests, 0 failures")
    assert sum(line.startswith("ok ") for line in lines) == int(lines[-1].split()[0]) >= 31


def test_python_proves_the_designs_that_octave_made(results, make_golden):
    assert len(results["designs"]) == len(make_golden.DESIGNS)
    for found, (claim, sectors) in zip(results["designs"], make_golden.DESIGNS, strict=True):
        budgets = vector(found["sn_vec"])
        pairs = zip(vector(found["delta_vec"]), vector(found["nu_vec"]), strict=True)
        layers = [Indices(*pair) for pair in pairs]
        for budget, sector, layer in zip(budgets, sectors, layers, strict=True):
            assert gain_rule_holds(budget, sector, layer)
        assert scaled_cascade(claim, layers, vector(found["p_vec"])).holds
        ours = np.array(spectral_design(claim, sectors).budgets)
        np.testing.assert_allclose(budgets, ours, rtol=RESERVE)
        a, b = claim.slopes
        assert found["kc"][0] <= a and found["kc"][1] >= b


def test_octave_cascades_have_the_entries_and_eigenvalues_of_python(results, make_golden):
    for found, (claim, layers, weights) in zip(
        results["cascades"], make_golden.CASCADES, strict=True
    ):
        m = scaled_cascade_matrix(claim, layers, weights)
        # Python rounds every entry correctly, Octave to within one unit in the last place.
        np.testing.assert_allclose(found["M"], m, rtol=2 * np.finfo(float).eps, atol=1e-300)
        np.testing.assert_allclose(
            found["A"], cascade_matrix(claim, layers), rtol=2 * np.finfo(float).eps, atol=1e-300
        )
        value, bound = smallest_eigenvalue(m)
        entries = np.finfo(float).eps * np.linalg.norm(m)
        assert abs(found["value"] - value) <= bound + found["bound"] + entries


def test_multipliers_found_by_octave_prove_the_layers_in_python(results, make_golden):
    verdicts = []
    for found, layer in zip(results["lmis"], make_golden.lmis(), strict=True):
        sector = Sector(layer["alpha"], layer["beta"])
        matrix = theorem_1_matrix(
            layer["W"], sector, Indices(layer["delta"], layer["nu"]), vector(found["Lambda"])
        )
        # Python's matrix is rounded too: by n+6 operations on each entry at most.
        error = 2 * (len(matrix) + 6) * np.finfo(float).eps
        verdicts.append(is_positive_semidefinite(matrix, entry_error=error).holds)
        assert verdicts[-1] == bool(found["feasible"])
    assert verdicts == [True, True, True, True, False]


def test_the_largest_nu_found_by_octave_is_proved_in_python_and_optimal(results, make_golden):
    for found, layer in zip(results["indices"], make_golden.indices(), strict=True):
        sector = Sector(layer["alpha"], layer["beta"])
        # Large multipliers round coarsely: 64 roundings of the largest entry, seen by the input.
        multipliers = vector(found["Lambda"])
        slack = 64 * np.finfo(float).eps * (1 + max(multipliers) * layer["gain"]) * layer["gain"]
        claim = Indices(layer["delta"], found["nu"] - slack)
        matrix = theorem_1_matrix(layer["W"], sector, claim, multipliers)
        error = 2 * (len(matrix) + 6) * np.finfo(float).eps
        verdict = is_positive_semidefinite(matrix, entry_error=error)
        assert verdict.holds, verdict
        tolerance = 1e-5 if sector.alpha == sector.beta else 1e-6
        assert found["nu"] == pytest.approx(layer["nu"], abs=tolerance * layer["gain"], rel=1e-6)


def test_octave_norms_are_upper_bounds_equal_to_python_up_to_rounding(results, make_golden):
    for found, expected in zip(results["norms"], make_golden.maps(), strict=True):
        # Octave adds at most 8·side·2⁻⁵³ relative, Python's factors side²·2⁻⁵³, for sides to 1800,
        # and 0.05% an axis where it samples long ones.
        sampled = 0.0 if expected["matrix"].size else 1e-3
        above = found / expected["upper"] - 1
        assert -(1800**2) * 2.0**-53 - sampled <= above <= 8 * 1800 * 2.0**-53
        if expected["matrix"].size:
            assert found >= np.linalg.norm(expected["matrix"], 2)


def test_gains_proved_by_octave_are_those_of_python(results):
    for name in ("dense", "branched"):
        certificate = import_mat(GOLDEN / f"{name}_network.mat").certificate
        # The norms of at most six maps, each rounded up by less than 8·64·2⁻⁵³ on either side.
        tolerance = 2 * 6 * 8 * 64 * 2.0**-53
        assert abs(results[f"{name}_gain"] / certificate.gain_upper_bound - 1) <= tolerance


def test_a_design_saved_by_octave_is_proved_in_python(octave, tmp_path):
    path = tmp_path / "design.mat"
    process = octave(f"save_design('{path}', -2, 0.4, [.1 .1 1], [1 1 1])")
    assert process.returncode == 0, process.stderr
    design = import_mat(path).design
    assert isinstance(design, Design) and design.is_proved and design.rule == "sound"
    assert design.claim == Indices(0.4, -2.0)
    assert set(design.layer_proofs) == {"norm rule (2.1)"} and design.scaled_margin > 0
    assert design.sectors == (Sector(0.1, 1.0), Sector(0.1, 1.0), Sector(1.0, 1.0))


def test_weights_edited_in_octave_return_to_the_model(octave, tmp_path, make_golden):
    model = make_golden.branched_network()["model"]
    before = {v.path: np.array(v) for v in model.weights}
    source, edited = tmp_path / "model.mat", tmp_path / "edited.mat"
    export_mat(source, model=model)
    process = octave(
        f"s = load('{source}'); s.network.maps{{1}}.kernel(:, :, 1, 2) = 0.5; "
        f"s.network.variables{{1}}.value(1) = 7; save('{edited}', '-struct', 's', '-v7')"
    )
    assert process.returncode == 0, process.stderr
    import_mat(edited).assign_to(model)
    changed = [p for p, v in before.items() if not np.array_equal(v, _weight(model, p))]
    kernel = _weight(model, model.get_layer("conv").kernel.path)
    assert len(changed) == 2 and model.get_layer("conv").kernel.path in changed
    assert np.all(kernel[:, :, 0, 1] == 0.5)
    assert sum(np.sum(_weight(model, p) != before[p]) for p in changed) == 9 + 1


def test_an_untouched_file_saved_again_by_octave_reads_the_same(octave, tmp_path):
    for name in ("dense", "branched", "conic"):
        source, again = GOLDEN / f"{name}_network.mat", tmp_path / f"{name}.mat"
        process = octave(f"s = load('{source}'); save('{again}', '-struct', 's', '-v7')")
        assert process.returncode == 0, process.stderr
        first, second = import_mat(source), import_mat(again)
        assert first.design == second.design and first.model_digest == second.model_digest
        assert first.weights.keys() == second.weights.keys()
        for path, value in first.weights.items():
            np.testing.assert_array_equal(value, second.weights[path], strict=True)
        if first.certificate is not None:
            assert first.certificate.to_json() == second.certificate.to_json()


def test_variables_beside_ours_are_not_read(octave, tmp_path):
    """scipy 1.17.1 cannot read a sparse logical matrix that Octave 7.3 wrote."""
    source, again = GOLDEN / "dense_network.mat", tmp_path / "again.mat"
    process = octave(
        f"s = load('{source}'); s.mask = sparse(eye(3) > 0); save('{again}', '-struct', 's', '-v7')"
    )
    assert process.returncode == 0, process.stderr
    with contextlib.suppress(ValueError):  # until scipy reads it
        assert "mask" in loadmat(again)
    first, second = import_mat(source), import_mat(again)
    assert first.model_digest == second.model_digest
    assert all(np.array_equal(first.weights[k], second.weights[k]) for k in first.weights)


def test_octave_prints_a_report_with_a_verdict(octave):
    process = octave(f"check_certificate('{GOLDEN / 'dense_network.mat'}')")
    assert process.stdout.rstrip().endswith("verdict: PROVED"), process.stderr
    assert "first_slope has slopes in [0.1" in process.stdout


def test_a_file_in_octaves_own_format_is_refused_with_advice(octave, tmp_path):
    path = tmp_path / "text.mat"
    assert octave(f"x = 1; save('{path}', 'x')").returncode == 0
    with pytest.raises(ValueError, match="-v7"):
        import_mat(path)


def test_the_golden_files_are_what_the_script_writes(tmp_path, make_golden):
    make_golden.write(tmp_path)
    names = sorted(path.name for path in GOLDEN.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        old, new = (
            loadmat(folder / name, simplify_cells=True, mat_dtype=True)
            for folder in (GOLDEN, tmp_path)
        )
        for key in old:
            if not key.startswith("__"):
                _same(old[key], new[key], f"{name}:{key}")


# They depend on Keras' version or on the summation order of float32 logits.
_VOLATILE = {"digest", "model_digest", "radius", "margins", "float_allowance", "reserve"}


def _same(old, new, where):
    if isinstance(old, dict):
        assert old.keys() == new.keys(), where
        for key in old.keys() - _VOLATILE:
            _same(old[key], new[key], f"{where}.{key}")
    elif isinstance(old, (list, np.ndarray)) and np.asarray(old).dtype == object:
        assert len(old) == len(new), where
        for k, (a, b) in enumerate(zip(old, new, strict=True)):
            _same(a, b, f"{where}[{k}]")
    elif isinstance(old, str) or np.asarray(old).dtype.kind == "U":
        assert np.array_equal(old, new), where
    else:
        # Eigenvalues near zero are compared by their bounds elsewhere; here against the entries.
        np.testing.assert_allclose(new, old, rtol=RESERVE, atol=1e-9, err_msg=where)


def _weight(model, path):
    [variable] = [v for v in model.weights if v.path == path]
    return np.array(variable)


def test_savemat_of_plain_numbers_is_no_export(tmp_path):
    savemat(tmp_path / "plain.mat", {"network": 1.0})
    with pytest.raises(ValueError, match=r"tf_lyapunov\.mat"):
        import_mat(tmp_path / "plain.mat")
