"""Products with a constant: evaluation, the exact norm of the map, and what is no such map."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_lyapunov.certification import certify, lipschitz_upper_bound
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.validation import validate_on_probes

RNG = np.random.default_rng(0)


def constant(*shape):
    return RNG.normal(size=shape).astype("float32")


LAYERS = {
    "dense": (layers.EinsumDense("ab,bc->ac", 3, bias_axes="c"), (4,)),
    "open axes": (layers.EinsumDense("...x,xy->...y", 5, bias_axes="y"), (2, 3)),
    "heads": (layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), (4, 5)),
    "heads back": (layers.EinsumDense("abde,dec->abc", (None, 4)), (3, 2, 2)),
    "blocks": (layers.EinsumDense("abc,bcd->abd", (2, 3), bias_axes="bd"), (2, 4)),
    "along time": (layers.EinsumDense("abc,bd->adc", (3, 4), bias_axes="d"), (2, 4)),
}
BARE = {
    "matmul": (lambda x: ops.matmul(x, constant(4, 3)), (4,)),
    "matmul of images": (lambda x: ops.matmul(x, constant(4, 3)), (2, 4)),
    "matmul by a vector": (lambda x: ops.matmul(x, constant(4)), (3, 4)),
    "matmul from the left": (lambda x: ops.matmul(constant(5, 3), x), (3, 4)),
    "matmul by a stack": (lambda x: ops.matmul(x, constant(2, 4, 3)), (2, 5, 4)),
    "matmul that repeats": (lambda x: ops.matmul(x, constant(3, 4, 2)), (1, 2, 4)),
    "matmul by one": (lambda x: ops.matmul(x, constant(1, 4, 2)), (3, 2, 4)),
    "operator": (lambda x: x @ constant(4, 4), (4,)),
    "dot": (lambda x: ops.dot(x, constant(4, 3)), (2, 4)),
    "dot by more": (lambda x: ops.dot(x, constant(2, 4, 3)), (4,)),
    "tensordot": (lambda x: ops.tensordot(x, constant(3, 4, 2), axes=[[1, 2], [0, 1]]), (3, 4)),
    "tensordot by number": (lambda x: ops.tensordot(x, constant(4, 2), axes=1), (3, 4)),
    "einsum": (lambda x: ops.einsum("bij,jk->bki", x, constant(4, 2)), (3, 4)),
    "einsum left": (lambda x: ops.einsum("jk,bij->bik", constant(4, 2), x), (3, 4)),
    "einsum sums x": (lambda x: ops.einsum("bij,ik->bk", x, constant(3, 2)), (3, 4)),
    "einsum sums the constant": (lambda x: ops.einsum("bi,ik->bi", x, constant(3, 2)), (3,)),
    "einsum alone": (lambda x: ops.einsum("bij->bji", x), (3, 4)),
}


if keras.backend.backend() == "torch":
    BARE.pop("dot by more")  # Keras multiplies there as `matmul` does, which is refused


def model_of(function, shape):
    x = keras.Input(shape)
    model = keras.Model(x, function(x))
    for weight in model.weights:
        weight.assign(RNG.normal(size=weight.shape))
    return model


def called(model, x):
    return np.asarray(keras.ops.convert_to_numpy(model(x)), np.float64)


@pytest.mark.parametrize("name", [*LAYERS, *BARE])
def test_the_gain_is_the_norm_of_the_whole_map(name):
    function, shape = {**LAYERS, **BARE}[name]
    model = model_of(function, shape)
    network = read_network(model)
    assert not network.program.unread
    assert validate_on_probes(network).steps >= 1
    eye = np.eye(int(np.prod(shape)), dtype="float32").reshape(-1, *shape)
    matrix = (called(model, eye) - called(model, 0 * eye)).reshape(len(eye), -1)
    truth = np.linalg.norm(matrix, 2)
    bound = lipschitz_upper_bound(model).gain_upper_bound
    assert truth * (1 - 1e-5) <= bound <= truth * (1 + 1e-5)


def test_a_softmax_behind_an_einsum_is_looked_through():
    layer = layers.EinsumDense("ab,bc->ac", 3, bias_axes="c", activation="softmax")
    model = model_of(layer, (4,))
    network = read_network(model)
    assert network.decision == "softmax"
    sigma = np.linalg.norm(np.asarray(keras.ops.convert_to_numpy(layer.kernel), np.float64), 2)
    assert lipschitz_upper_bound(model).gain_upper_bound == pytest.approx(sigma, rel=1e-7)
    x = RNG.normal(size=(20, 4)).astype("float32")
    proof = certify(model, x)
    weights = np.asarray(keras.ops.convert_to_numpy(layer.kernel), np.float64)
    logits = x @ weights + np.asarray(keras.ops.convert_to_numpy(layer.bias), np.float64)
    order = np.sort(logits, axis=1)
    top = logits.argmax(axis=1)
    # The exact distance to the nearest boundary of a linear classifier.
    exact = np.min(
        [
            np.where(
                top == k,
                np.inf,
                (logits[np.arange(20), top] - logits[:, k])
                / np.maximum(np.linalg.norm(weights[:, top] - weights[:, [k]], axis=0), 1e-30),
            )
            for k in range(3)
        ],
        axis=0,
    )
    assert order.shape == (20, 3)
    assert np.all(np.asarray(proof.radius) <= exact * (1 + 1e-6))
    assert np.all(np.asarray(proof.radius) >= 0.3 * exact)


def test_an_activation_is_a_node_of_its_own():
    model = model_of(layers.EinsumDense("abc,cd->abd", (None, 3), activation="tanh"), (2, 4))
    assert [node.kind for node in read_network(model).nodes] == ["input", "map", "activation"]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: ops.matmul(constant(5, 3), ops.transpose(x)), "batch"),
        (lambda x: ops.einsum("bi,bj->ij", x, constant(2, 3)), "batch|samples"),
        (lambda x: ops.matmul(x[:, None, :], x[:, :, None]), "product of two inputs"),
        (lambda x: ops.einsum("bi,bi->b", x, x), "product of two inputs"),
        (lambda x: ops.einsum("bii->bi", x[:, :, None] * np.ones((1, 1, 3), "float32")), "diag"),
    ],
)
def test_what_is_no_map_of_samples_is_refused(function, reason):
    x = keras.Input((3,))
    with pytest.raises(UnsupportedLayerError, match=reason):
        lipschitz_upper_bound(keras.Model(x, function(x)))
