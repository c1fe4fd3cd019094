"""Adjoints, absolute maps and norms of every linear operation against its own matrix."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_lyapunov.local import maps
from tf_lyapunov.local.flow import flow_of, trace
from tf_lyapunov.program.network import read_network


def image(*made):
    return keras.Sequential([keras.Input((5, 4, 2)), *made])


def joined():
    x = keras.Input((4, 3))
    means = layers.GlobalAveragePooling1D(keepdims=True)(x)
    return keras.Model(x, layers.Concatenate(axis=1)([x - means, 2.0 * x + np.ones((1, 3))]))


MODELS = {
    "dense": lambda: keras.Sequential([keras.Input((3, 4)), layers.Dense(5)]),
    "conv": lambda: image(layers.Conv2D(3, (3, 2), strides=2, padding="same")),
    "dilated": lambda: image(layers.Conv2D(4, 2, dilation_rate=2, groups=2)),
    "wide": lambda: keras.Sequential([keras.Input((6, 5)), layers.Conv1D(2, 3, padding="causal")]),
    "depthwise": lambda: image(layers.DepthwiseConv2D(2, depth_multiplier=2)),
    "separable": lambda: image(layers.SeparableConv2D(3, 2)),
    "transposed": lambda: image(layers.Conv2DTranspose(3, 3, strides=2, padding="same")),
    "normalised": lambda: image(layers.BatchNormalization(), layers.Rescaling(0.5, 1.0)),
    "moved": lambda: image(layers.Permute((3, 1, 2)), layers.UpSampling2D(2), layers.Cropping2D(1)),
    "padded": lambda: image(layers.ZeroPadding2D(1), layers.Flatten()),
    "mean": lambda: image(layers.AveragePooling2D((2, 3), strides=1, padding="same")),
    "global": lambda: image(layers.GlobalAveragePooling2D()),
    "joined": joined,
    "negative": lambda: keras.Model(x := keras.Input((3,)), ops.negative(x) + layers.Dense(3)(x)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_operation_agrees_with_its_matrix(name):
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    rng = np.random.default_rng(0)
    for weight in model.weights:
        value = rng.uniform(0.5, 1.5, size=weight.shape)
        if "variance" not in weight.path:
            value = value * rng.choice([-1, 1], weight.shape)
        weight.assign(value)
    flow = flow_of(read_network(model))
    traced = trace(flow, rng.normal(size=model.inputs[0].shape[1:]))
    assert flow.links
    for k, link in enumerate(flow.links, 1):
        assert maps.is_linear(link.operation)
        shapes = [traced.shape(i) for i in link.inputs]
        zeros = [np.zeros((1, *s)) for s in shapes]
        shift = maps.applied(link.operation, zeros)
        out = traced.shape(k)
        c = rng.normal(size=(3, *out))
        found = maps.adjoint(link.operation, c, shapes)
        norms = maps.norms(link.operation, shapes)
        sizes = maps.absolute(link.operation, [np.ones((1, *s)) for s in shapes])
        total = np.zeros(int(np.prod(out)))
        for i, shape in enumerate(shapes):
            count = int(np.prod(shape))
            reads = [np.zeros((count, *s)) for s in shapes]
            reads[i] = np.eye(count).reshape(count, *shape)
            matrix = (maps.applied(link.operation, reads) - shift).reshape(count, -1)
            # <Wx, c> = <x, Wᵀc>, for every x.
            assert np.allclose(found[i].reshape(3, -1), c.reshape(3, -1) @ matrix.T, atol=1e-12)
            exact = np.linalg.norm(matrix, 2)
            assert exact <= norms[i] * (1 + 1e-12) and norms[i] <= max(1.3 * exact, 1e-12)
            total += np.abs(matrix).sum(axis=0)
        assert np.allclose(sizes.ravel(), total, atol=1e-12)
        offset = maps.offset(link.operation)
        held = np.zeros(out) if offset is None else np.broadcast_to(offset, out)
        assert np.allclose(shift[0], held, atol=1e-12)
        moved = maps.radius(link.operation, shapes, [1.0] * len(shapes))
        assert moved >= max(norms) * (1 - 1e-12)


def test_a_convolution_in_one_product_is_the_one_by_taps():
    rng = np.random.default_rng(0)
    for groups in (1, 2):
        model = image(layers.Conv2D(4, 3, strides=2, padding="same", groups=groups))
        operation = flow_of(read_network(model)).links[0].operation
        x = rng.normal(size=(3, 5, 4, 2))
        plain = operation._map(x, operation.kernel)
        found = maps.convolved_forth(x, operation.kernel, operation.linear_map)
        assert np.allclose(found, plain, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_columns_of_zeros_change_nothing(share):
    rng = np.random.default_rng(0)
    kernel, c = rng.normal(size=(300, 200)), rng.normal(size=(64, 200))
    c[:, rng.random(200) >= share] = 0.0
    found = maps._dense_back(c, kernel)
    size = np.abs(c) @ np.abs(kernel.T)
    assert found.shape == (64, 300)
    assert np.all(np.abs(found - np.einsum("ij,kj->ik", c, kernel)) <= 400 * 2.0**-53 * size)
