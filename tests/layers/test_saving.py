"""Every layer of the library, saved here and loaded in another process."""

import fresh_processes
import keras
import numpy as np
import pytest
from test_export import CASES, outputs, single

from tf_lyapunov import layers as ours

LOAD = """
import sys, keras, numpy as np
import tf_lyapunov
from tf_lyapunov.layers import LipschitzLayer
models = sys.argv[1:]
for path in models:
    model, data = keras.models.load_model(path), np.load(path + ".npz")
    y = keras.ops.convert_to_numpy(model(data["x"]))
    assert np.max(np.abs(y - data["y"])) <= 1e-5 * max(1, np.max(np.abs(y))), path
    for layer in model.layers:
        if isinstance(layer, LipschitzLayer):
            assert bool(layer._is_fresh(layer._sources)), path
            for name, value in layer.effective_values().items():
                found = np.max(np.abs(value - data[name]))
                assert found <= 1e-5 * max(1, np.max(np.abs(value))), (path, name, found)
print("loaded", len(models), "on", keras.backend.backend())
"""


def combination():
    x = keras.Input((6,))
    branch = ours.SpectralDense(6)(x)
    return keras.Model(x, ours.ConvexCombination(0.3)([x, branch]))


@pytest.mark.parametrize(
    "backend", ["tensorflow", *(pytest.param(b, marks=pytest.mark.slow) for b in ("jax", "torch"))]
)
def test_every_layer_is_saved_and_loaded_in_a_new_process(backend, tmp_path):
    pytest.importorskip(backend)
    made = [single(make, shape, seed=3) for make, shape, _ in CASES]
    x = np.random.default_rng(0).standard_normal((3, 6)).astype("float32")
    made.append((combination(), x))
    paths = [str(tmp_path / f"{i}.keras") for i in range(len(made))]
    for path, (model, x) in zip(paths, made, strict=True):
        values = {}
        for layer in model.layers:
            if isinstance(layer, ours.LipschitzLayer):
                values |= layer.effective_values()
        np.savez(path + ".npz", x=x, y=outputs(model, x), **values)
        model.save(path)
    done = fresh_processes.output(LOAD, *paths, backend=backend)
    assert f"loaded {len(paths)} on {backend}" in done
