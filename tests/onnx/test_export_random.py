"""Random models: what is read is written, and onnxruntime computes what Keras does."""

import pathlib
import warnings

import exported
import fresh_processes
import keras
import numpy as np
import pytest
from soundness import generator

import tf_lyapunov as tfl
from tf_lyapunov import layers as ours
from tf_lyapunov.errors import UnfaithfulExport
from tf_lyapunov.program.network import read_network

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
L = keras.layers
ROOT = pathlib.Path(__file__).resolve().parents[2]


def _any(rng):
    """A layer for every rank."""
    width = int(rng.integers(2, 7))
    name = ["relu", "tanh", "softplus", "gelu", "elu", "mish", "sigmoid"][rng.integers(7)]
    return [
        lambda: L.Dense(width, activation=name),
        lambda: L.Activation(name),
        lambda: L.BatchNormalization(),
        lambda: L.LayerNormalization(),
        lambda: L.PReLU(),
        lambda: L.Rescaling(1.75, -0.25),
        lambda: ours.FullSort(),
        lambda: ours.TwoSidedReLU(),
        lambda: L.Softmax(),
        lambda: L.Dropout(0.2),
    ]


def _images(rng):
    width, size = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    pad = ["same", "valid"][rng.integers(2)]
    stride = int(rng.integers(1, 3))
    return [
        lambda: L.Conv2D(width, size, stride, pad),
        lambda: L.Conv2D(width, size, stride, pad, activation="relu"),
        lambda: L.Conv2DTranspose(width, size, stride, pad),
        lambda: L.DepthwiseConv2D(size, 1, pad, 2),
        lambda: L.MaxPooling2D(size, stride, pad),
        lambda: L.AveragePooling2D(size, stride, pad),
        lambda: L.ZeroPadding2D((1, size)),
        lambda: L.UpSampling2D(2),
        lambda: L.UpSampling2D(2, interpolation="bilinear"),
        lambda: L.Permute((3, 2, 1)),
        lambda: ours.SDPLipschitzConv2D(width),
        lambda: ours.L2NormPooling2D(size, stride, pad),
        lambda: ours.LocalResponseNormalization(1),
        lambda: L.Flatten(),
        lambda: L.GlobalAveragePooling2D(),
        lambda: lambda x: keras.ops.flip(x, axis=1),
        lambda: lambda x: L.Concatenate(axis=-1)([x, keras.ops.abs(x)]),
        lambda: lambda x: L.Add()([x, L.Conv2D(x.shape[-1], 3, padding="same")(x)]),
    ]


def random_chain(seed):
    """A model of a few layers that fit one another."""
    rng = np.random.default_rng(seed)
    shape = [(6, 5, 3), (7, 4), (6,)][rng.integers(3)]
    inputs = x = keras.Input(shape)
    for _ in range(int(rng.integers(2, 8))):
        choices = _any(rng) + (_images(rng) if len(x.shape) == 4 else [])
        layer = choices[rng.integers(len(choices))]()
        try:
            y = layer(x)
        except (ValueError, TypeError):  # a window larger than the image
            continue
        if all(0 < n <= 40 for n in y.shape[1:]):
            x = y
    return exported.drawn(keras.Model(inputs, L.Dense(3)(L.Flatten()(x))), seed)


def check(model, seed, path):
    tfl.export_onnx(model, path, rng=np.random.default_rng(seed))
    x = np.random.default_rng(seed).normal(size=(3, *model.inputs[0].shape[1:])).astype("float32")
    expected = keras.ops.convert_to_numpy(model(x, training=False))
    held = exported.outputs(path, x)
    assert np.all(np.abs(held - expected) <= 1e-3 * (1 + np.abs(expected).max()))


@pytest.mark.parametrize("first", [0, 30, *(pytest.param(n, marks=pytest.mark.slow)
                                            for n in range(60, 600, 30))])  # fmt: skip
def test_random_chains_are_exported(first, tmp_path):
    for seed in range(first, first + 30):
        check(random_chain(seed), seed, tmp_path / "net.onnx")


def odd_models(seeds):
    """Cases of the soundness tests that the library reads, with the shapes of their inputs."""
    for seed in seeds:
        case = generator.build(seed)
        shapes = [(None, *s) for s in case.shapes]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_network(case.model, shapes, bounded=False).program.check_read()
            except Exception:  # refused, as the soundness tests demand
                continue
        yield seed, case, shapes


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 1100), marks=pytest.mark.slow)]
)
def test_odd_models_are_exported_unless_their_numbers_overflow(seeds, tmp_path):
    written = 0
    for seed, case, shapes in odd_models(seeds):
        try:
            tfl.export_onnx(
                case.model, tmp_path / "net.onnx", input_shapes=shapes,
                rng=np.random.default_rng(seed),
            )  # fmt: skip
            written += 1
        except UnfaithfulExport as error:
            overflows = "normalization" in str(error) or "inf where" in str(error)
            assert "kernels" in case.described and overflows, (seed, case.described, error)
    assert written >= 0.3 * len(seeds)


SCRIPT = """
import sys
import numpy as np
import exported, tf_lyapunov as tfl
from tf_lyapunov.errors import UnsupportedLayerError
names = [n for n in exported.FLAT if not sys.argv[2:] or n in sys.argv[2:]]
assert names
for name in names:
    model = exported.made(name)
    if name == "normalizing: layer, rows" and exported.keras.backend.backend() == "torch":
        # Keras on PyTorch normalizes other axes than it is told to.
        try:
            tfl.export_onnx(model, sys.argv[1])
        except UnsupportedLayerError:
            continue
        raise AssertionError("a layer that is not what it says was exported")
    tfl.export_onnx(model, sys.argv[1], rng=np.random.default_rng(0))
    xs = [np.random.default_rng(1).normal(size=(3, *t.shape[1:])).astype("float32")
          for t in model.inputs]
    y = exported.keras.ops.convert_to_numpy(model(xs if len(xs) > 1 else xs[0], training=False))
    z = exported.outputs(sys.argv[1], *xs)
    assert y.shape == z.shape, name
    assert np.abs(y - z).max() <= 2e-5 * (1 + np.abs(y).max()), name
"""
FEW = ["pooling: mean same", "linear: conv2d transposed", "normalizing: layer", "moving: up",
       "normalizing: layer, rows"]  # fmt: skip


@pytest.mark.parametrize(
    "backend, names",
    [
        ("torch", FEW),
        pytest.param("torch", [], marks=pytest.mark.slow),
        pytest.param("jax", [], marks=pytest.mark.slow),
        pytest.param("tensorflow", [], marks=pytest.mark.slow),
    ],
)
def test_models_of_every_backend_are_exported(backend, names, tmp_path):
    pytest.importorskip(backend)
    path = [ROOT / "tests" / "onnx"]
    fresh_processes.output(SCRIPT, tmp_path / "net.onnx", *names, backend=backend, path=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear: cayley", "fourier: cayley", "sandwich: 2d"])
def test_plain_models_are_litert_files(name, tmp_path):
    tensorflow = pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("LiteRT files are written on TensorFlow")
    model, path = exported.made(name), str(tmp_path / "net.tflite")
    tfl.export_plain(model).export(path, format="litert", verbose=False)
    x = np.random.default_rng(0).normal(size=(1, *model.inputs[0].shape[1:])).astype("float32")
    runner = tensorflow.lite.Interpreter(path)
    runner.allocate_tensors()
    runner.set_tensor(runner.get_input_details()[0]["index"], x)
    runner.invoke()
    found = runner.get_tensor(runner.get_output_details()[0]["index"])
    expected = keras.ops.convert_to_numpy(model(x, training=False))
    assert np.allclose(found, expected, atol=1e-4)
