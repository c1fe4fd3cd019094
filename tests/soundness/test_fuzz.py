"""Random legal models: every claim of the library holds against independent oracles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from soundness import fuzz, generator, oracles

FUZZ = Path(fuzz.__file__)
# About 0.4 s of a core a model, in parts that workers share; the longer search is a slow test.
MODELS, PART = 300, 30


@pytest.mark.parametrize("first", range(0, MODELS, PART))
def test_no_claim_about_a_random_model_is_false(first):
    state = fuzz.fuzz(PART, first)
    assert state["violations"] == []
    assert state["models"] == PART
    assert state["claims"]


def test_a_case_is_a_function_of_its_seed():
    for seed in range(6):
        first, second = generator.build(seed), generator.build(seed)
        assert first.described == second.described
        assert np.array_equal(first.x, second.x)
        ours, theirs = (oracles.evaluate(c.model, c.argument(c.x)) for c in (first, second))
        assert np.array_equal(ours, theirs)


def test_the_twin_computes_the_models_function():
    for seed in range(40):
        case = generator.build(seed)
        if case.policy != "float32" or any(
            w in case.described for w in ("cast", "round", "nested", "dtype", "replaced", "inputs")
        ):
            continue
        if case.twin is None:
            continue
        own, twin = oracles.evaluate(case.model, case.x), oracles.evaluate(case.twin, case.x)
        assert np.allclose(own, twin, rtol=1e-3, atol=1e-3 * np.max(np.abs(twin))), case.described


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    state = tmp_path / "state.json"
    for models in ("2", "4"):
        fuzz.main(["--models", models, "--resume", str(state), "--kinds", "gain"])
    whole = fuzz.fuzz(4, kinds=["gain"])
    kept = json.loads(state.read_text())
    assert (kept["done"], kept["claims"]) == (4, whole["claims"])


@pytest.mark.slow
@pytest.mark.parametrize("backend, models", [("tensorflow", 10000), ("jax", 1000), ("torch", 1000)])
def test_no_claim_is_false_on_any_backend(backend, models, tmp_path):
    pytest.importorskip(backend)
    state = tmp_path / "state.json"
    command = [sys.executable, FUZZ, "--models", models, "--seed", 100000, "--resume", state]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    found = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert found.returncode in (0, 1), found.stderr[-2000:]
    assert json.loads(state.read_text())["violations"] == []
