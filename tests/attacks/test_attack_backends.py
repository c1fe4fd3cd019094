"""The same attacks on JAX and torch, each in a process of its own."""

import functools
import importlib.util
import pathlib

import fresh_processes
import numpy as np
import pytest

SCRIPT = """
import sys
import numpy as np, keras
sys.path.insert(0, sys.argv[1])
from models_to_attack import cnn, linear, mlp, points
from tf_lyapunov.attacks import *
from tf_lyapunov.theory.balls import L2, Linf

assert keras.backend.backend() == sys.argv[2]
weights = np.linspace(-1, 1, 15).reshape(5, 3) ** 3
model, x = linear(weights, [0.1, 0.0, -0.1], activation="softmax"), points(33, 5)
rows = []
for attack in (FGM(L2(0.3)), PGD(L2(0.5), steps=9), PGD(Linf(0.2), random_start=True, restarts=2),
               PGD(L2(0.5), bounds=(-4, 4), loss="margin", stop_early=False, batch_size=8)):
    result = attack(model, x)
    rows.append(result.success)
conv = PGD(Linf(0.3), steps=5)(cnn(), points(9, 6, 6, 2))
assert np.all(np.isnan(conv.distance) == ~conv.success)
for attack in (MinimalFGS(), FMN(Linf, steps=20), DeepFool(), LBFGS(searches=2, steps=5),
               CarliniWagner(searches=1, steps=20, bounds=(-4, 4))):
    nearest = attack(model, x)
    assert np.all(nearest.success) and not np.any(nearest.zero_gradient), attack
    rows.append(nearest.distance > np.median(nearest.distance))
if sys.argv[3] == "all":
    rows.append(AutoAttack(L2(0.5), steps=10, queries=30, bounds=(-4, 4))(model, x).success)
else:
    rows.append(APGD(L2(0.5), steps=10, bounds=(-4, 4))(model, x).success)
assert Square(Linf(2.0), queries=60)(cnn(), points(9, 6, 6, 2)).success_rate > 0
stuck = PGD(L2(1.0), steps=3)(linear(np.zeros((3, 4))), points(5, 3))
assert np.all(stuck.zero_gradient) and not np.any(stuck.success)
trained = linear([[1.0, -1.0]])
assert not PGD(L2(0.5))(trained, [[1.0]]).success[0]
trained.set_weights([np.array([[1.0, -1.0]]), np.array([-0.8, 0.8])])
assert PGD(L2(0.5))(trained, [[1.0]]).success[0]
if sys.argv[2] != "tensorflow":
    assert "tensorflow" not in sys.modules
print("".join(str(int(v)) for v in np.concatenate(rows)))
"""


@functools.cache
def successes(backend, attacks):
    here = pathlib.Path(__file__).resolve().parent
    found = fresh_processes.output(SCRIPT, here, backend, attacks, backend=backend)
    return np.array(list(found.split()[-1]))


@pytest.mark.parametrize(
    "backend, attacks",
    [("torch", "few"), *(pytest.param(b, "all", marks=pytest.mark.slow) for b in ("jax", "torch"))],
)
def test_other_backends_find_the_same_adversarial_inputs(backend, attacks):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    expected, found = successes("tensorflow", attacks), successes(backend, attacks)
    assert len(set(expected)) == 2
    # Inputs within float32 rounding of a boundary, or of a median, may fall on either side.
    assert np.sum(expected != found) <= 4
