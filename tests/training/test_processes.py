"""Training methods run on every backend, and continue from a file in a new process."""

import importlib.util

import fresh_processes
import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov import Linf
from tf_lyapunov.attacks import PGD
from tf_lyapunov.constraints import ParsevalFrame
from tf_lyapunov.training import AdversarialModel, LaplacianModel

SCRIPT = """
import sys, keras, numpy as np
from keras import layers
from tf_lyapunov import L2, Linf
from tf_lyapunov.attacks import PGD
from tf_lyapunov.callbacks import LyapunovMonitor
from tf_lyapunov.constraints import ParsevalFrame, SpectralBound
from tf_lyapunov.training import AdversarialModel, LaplacianModel, NonexpansiveModel
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
y = rng.integers(0, 3, 48)
x = (np.eye(6)[y] + 0.3 * rng.random((48, 6))).astype("float32")
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

def net(**options):
    return keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu", name="a", **options),
        layers.BatchNormalization(), layers.Dropout(0.1), layers.Dense(8, "relu", name="b",
        kernel_constraint=ParsevalFrame()), layers.Dense(3)])

pgd = PGD(Linf(0.05), steps=2, random_start=True)
bounded = net(kernel_constraint=SpectralBound(0.7))
monitor = LyapunovMonitor(verbose=0, on_violation="ignore")
for model in (AdversarialModel(bounded, PGD(L2(0.2), steps=2, random_start=True)),
              AdversarialModel(LaplacianModel(net(), ["a", "b"]), pgd, mix=0.5),
              AdversarialModel(NonexpansiveModel(net(), ["a"], distance=0.5), pgd, mix=0.5),
              AdversarialModel(net(), pgd, trades_beta=2.0))[:: int(sys.argv[1])]:
    seed = np.asarray(keras.ops.convert_to_numpy(model.random.state)).copy()
    model.compile(keras.optimizers.Adam(0.02), loss, metrics=["accuracy"])
    history = model.fit(x, y, batch_size=16, epochs=3, verbose=0, validation_data=(x, y),
                        callbacks=[monitor]).history
    assert history["gain_upper_bound"][-1] > 0
    assert np.all(np.isfinite(history["loss"])) and history["loss"][-1] < history["loss"][0]
    assert not np.array_equal(seed, keras.ops.convert_to_numpy(model.random.state)), "draws repeat"
kernel = keras.ops.convert_to_numpy(bounded.layers[0].kernel).astype(float)
assert np.linalg.norm(kernel, 2) <= 0.7
print("trains on", keras.backend.backend())
"""


@pytest.mark.parametrize(
    "backend, every",
    [("jax", 2), pytest.param("jax", 1, marks=pytest.mark.slow), ("torch", 1)],
)
def test_every_method_trains_on_every_backend(backend, every):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    assert f"trains on {backend}" in fresh_processes.output(SCRIPT, str(every), backend=backend)


LOADED = """
import sys, keras, numpy as np
from tf_lyapunov import training
x, y, expected = (np.load(f"{sys.argv[1]}/{name}.npy") for name in "xyz")
model = keras.models.load_model(f"{sys.argv[1]}/w.keras")
assert np.allclose(model.predict(x, verbose=0), expected, atol=1e-6)
assert isinstance(model.model, training.LaplacianModel) and model.seed == 7
names = [type(layer.kernel_constraint).__name__ for layer in model.plain.layers]
assert names == ["ParsevalFrame", "ParsevalFrame", "NoneType"]
attack = model.attack
assert (attack.steps, attack.step, attack.random_start, attack.loss) == (4, 0.05, True, "margin")
assert attack.ball.radius == 0.1 and attack.bounds == (0.0, 1.5)
iterations = int(model.optimizer.iterations)
model.fit(x, y, verbose=0)
assert int(model.optimizer.iterations) > iterations > 0
print("continues")
"""


def test_a_saved_method_continues_in_a_new_process(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.random((24, 6)).astype("float32"), rng.integers(0, 3, 24)
    attack = PGD(Linf(0.1), steps=4, step=0.05, random_start=True, bounds=(0.0, 1.5), loss="margin")
    frame = ParsevalFrame(0.1)
    hidden = [layers.Dense(8, "relu", name=name, kernel_constraint=frame) for name in "ab"]
    inner = LaplacianModel(
        keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(3)]), ["a", "b"]
    )
    robust = AdversarialModel(inner, attack, mix=0.5, seed=7)
    robust.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    robust.fit(x, y, verbose=0)
    robust.save(tmp_path / "w.keras")
    for name, array in zip("xyz", (x, y, robust.predict(x, verbose=0)), strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    assert fresh_processes.output(LOADED, tmp_path).strip() == "continues"
