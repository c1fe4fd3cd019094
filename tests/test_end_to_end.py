"""The whole path on every backend, as a user would write it, each in a new process."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import fresh_processes
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

SCRIPT = """
import keras, numpy as np, sys
import tf_lyapunov as tfl

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x = rng.normal(size=(256, 8, 8, 1)).astype("float32")
y = (x[:, :4].mean((1, 2, 3)) > 0).astype(int) + 2 * (x[:, :, :4].mean((1, 2, 3)) > 0)
model = keras.Sequential([
    keras.Input((8, 8, 1)),
    keras.layers.Conv2D(4, 3, padding="same"),
    keras.layers.LeakyReLU(negative_slope=0.1),
    keras.layers.AveragePooling2D(2),
    keras.layers.Flatten(),
    keras.layers.Dense(4),
])
leaky = tfl.Sector.of("leaky_relu", negative_slope=0.1)
design = tfl.spectral_design(tfl.Indices(delta=0.4, nu=-2.0), [leaky, tfl.Sector.linear()])
tfl.constrain(model, design)
model.compile(keras.optimizers.Adam(0.1), tfl.losses.TemperatureCrossEntropy(temperature=0.1))
monitor = tfl.callbacks.LyapunovMonitor(design, on_violation="raise", verbose=0)
model.fit(x, y, epochs=3, batch_size=64, verbose=0, callbacks=[monitor], validation_data=(x, y))
proof = tfl.certify(model, x, y)
assert proof.gain_upper_bound <= design.gain * (1 + 1e-9), proof.gain_upper_bound
radius = np.maximum(proof.radius, 1e-9)
inside = tfl.attacks.PGD(radius=tfl.L2(radius * (1 - 1e-4)), steps=20)(model, x)
assert not inside.success.any()
outside = tfl.attacks.PGD(radius=tfl.L2(radius * 2 + 0.5), steps=20)(model, x)
assert outside.success.any()  # else the attack would prove nothing
model.save(sys.argv[1])
print(keras.backend.backend())
"""

LOAD = """
import keras, numpy as np, sys
import tf_lyapunov as tfl

model = keras.models.load_model(sys.argv[1])
layer = model.layers[0]
assert type(layer.kernel.constraint) is tfl.constraints.SpectralBound
model.fit(np.ones((32, 8, 8, 1), "float32"), np.zeros(32), verbose=0)
tfl.project(model)
print(tfl.certify(model, np.ones((2, 8, 8, 1), "float32")).verdict)
"""


def run_afresh(code, backend, *arguments):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def run(code, backend, *arguments):
    found = fresh_processes.output(code, *arguments, backend=backend, warnings="ignore")
    return found.strip().splitlines()[-1]


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_design_train_certify_attack_save_and_load_in_a_new_process(backend, tmp_path):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    path = str(tmp_path / "model.keras")
    line = run(SCRIPT, backend, path)
    assert line == backend
    assert run(LOAD, backend, path) == "PROVED"


def test_importing_the_package_loads_no_heavy_module():
    code = (
        "import sys, keras; before = set(sys.modules); import tf_lyapunov; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    assert run_afresh(code, "jax") == "['tf_lyapunov']"
