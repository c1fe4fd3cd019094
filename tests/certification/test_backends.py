"""Certificates on the JAX and torch backends agree with NumPy."""

import importlib.util

import fresh_processes
import pytest

SCRIPT = """
import keras, numpy as np
from keras import layers
from tf_lyapunov.certification import certify, lipschitz_upper_bound, register_gain
from tf_lyapunov.bounds.stages import stages
keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(size=(12, 8, 8, 1)).astype("float32")
inputs = keras.Input((8, 8, 1))
h = layers.Conv2D(3, 3, padding="same")(inputs)
h = layers.ReLU()(layers.BatchNormalization()(h))
h = layers.AveragePooling2D(3, 2, padding="same")(keras.ops.add(h, layers.Conv2D(3, 1)(h)))
logits = layers.Dense(4)(layers.Flatten()(h))
plain = keras.Model(inputs, logits)
proof = certify(keras.Model(inputs, layers.Softmax()(logits)), x)
assert np.allclose(proof.radius, certify(plain, x).radius, rtol=1e-4)
assert proof.verdict == "PROVED" and np.all(proof.radius > 0)

class Sub(keras.Model):
    def __init__(self):
        super().__init__()
        self.a, self.b = layers.Dense(5, activation="gelu"), layers.Dense(3)
    def call(self, x, training=None):
        h = self.a(x)
        return self.b(h + keras.ops.tanh(h))

model = Sub()
z = x.reshape(12, -1)
model(z)
proof = certify(model, z)
a, b = (np.asarray(keras.ops.convert_to_numpy(d.kernel), dtype=float) for d in (model.a, model.b))
expected = 2 * np.linalg.norm(a, 2) * np.linalg.norm(b, 2)
assert expected <= proof.gain_upper_bound <= expected * 1.13
half = keras.Sequential([keras.Input((6,)), layers.Dense(3, dtype="mixed_bfloat16")])
assert certify(half, z[:, :6]).float_allowance > 1e-3
# A pooling layer's own matrix, read off on this backend, is no larger than its bound.
for q, s, n in [(3, 2, 6), (2, 1, 5), (3, 2, 7), (4, 3, 8)]:
    layer = layers.AveragePooling1D(q, s, padding="same")
    pool = keras.Sequential([keras.Input((n, 1)), layer])
    matrix = keras.ops.convert_to_numpy(pool(np.eye(n, dtype="float32")[..., None]))[..., 0]
    bound = lipschitz_upper_bound(pool).gain_upper_bound
    assert np.linalg.norm(matrix, 2) <= bound * (1 + 1e-6), (q, s, n)
# Two inputs, one of them held fixed: a linear model's exact radius, and an attack that meets it.
from tf_lyapunov.attacks import DeepFool
p, q = keras.Input((3,), name="p"), keras.Input((4,), name="q")
last = layers.Dense(3)
two = keras.Model({"p": p, "q": q}, last(layers.Concatenate()([p, q])))
given = {"p": z[:, :3], "q": z[:, 3:7]}
kernel = np.asarray(keras.ops.convert_to_numpy(last.kernel), dtype=float)
logits = z[:, :7].astype(float) @ kernel
best = logits.argmax(axis=1)
for perturbed, rows in ((None, slice(0, 7)), ("p", slice(0, 3)), (1, slice(3, 7))):
    apart = np.linalg.norm(kernel[rows][:, best].T[:, :, None] - kernel[rows][None], axis=1)
    gap = logits[np.arange(12), best][:, None] - logits
    exact = np.min(np.where(apart > 0, gap / np.where(apart > 0, apart, 1), np.inf), axis=1)
    radius = certify(two, given, perturbed=perturbed, precision="float64").radius
    assert np.all(radius <= exact * (1 + 1e-12)) and np.all(radius >= exact * (1 - 1e-6) - 1e-9)
    found = DeepFool()(two, given, perturbed=perturbed)
    assert found.success.all() and np.allclose(found.distance, exact, rtol=1e-3, atol=1e-5)
    assert np.all(found.distance > radius * (1 - 1e-5) - 1e-6)
print("agrees on", keras.backend.backend())
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_certificates_work_on_every_backend(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    assert f"agrees on {backend}" in fresh_processes.output(SCRIPT, backend=backend)


LAYERS = """
import keras, numpy as np
keras.utils.set_random_seed(0)
from tf_lyapunov import layers as ours
from tf_lyapunov.certification import read_network
from tf_lyapunov.program.validation import validate_on_probes
image = keras.Input((6, 5, 4))
h = ours.ConvexCombination()([image, ours.Householder()(image)])
h = ours.LocalResponseNormalization(1, 1.0, 0.5, 0.75)(ours.ConvexPotentialConv2D(3, 2)(h))
h = ours.SkewOrthogonalConv2D(4, 3, activation=ours.MaxMin())(h)
h = ours.CayleyConv2D(4, 3)(ours.LpPooling2D(2, 1, p=3.5)(h))
h = ours.SandwichConv2D(4, 2)(ours.ScaledAveragePooling2D(2, 1)(ours.TwoSidedReLU()(h)))
h = ours.SandwichDense(5)(ours.GlobalL2NormPooling2D()(h))
network = read_network(keras.Model(image, ours.SDPLipschitzDense(6)(ours.FullSort()(h))))
assert not network.program.unread
validation = validate_on_probes(network, rng=np.random.default_rng(0))
assert len(validation.blind) <= 2, validation.blind
"""


def test_every_family_of_the_librarys_layers_is_evaluated_as_torch_computes_it():
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    fresh_processes.output(LAYERS, backend="torch")
