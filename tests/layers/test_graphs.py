"""What a training step leaves in a TensorFlow graph, which is copied wherever it is compiled."""

import keras
import pytest

from tf_lyapunov import layers

SIDE, IMAGE = 512, (32, 32, 16)
NAMES = [name for name in layers.__all__ if name.endswith(("Dense", "Conv1D", "Conv2D"))]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="graphs of TensorFlow")
@pytest.mark.parametrize("name", NAMES)
def test_a_wide_layer_leaves_no_matrix_in_the_graph(name):
    # Constants of 2048² entries took 24 GB in a network of seven such layers.
    tf = pytest.importorskip("tensorflow")
    kind = getattr(layers, name)
    if name.endswith("Dense"):
        layer, shape = kind(SIDE), (2, SIDE)
    else:
        layer, shape = kind(16, 3), (2, *IMAGE[-3 if name.endswith("2D") else -2 :])
    layer.build((None, *shape[1:]))

    @tf.function(autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, training=True))
        return tape.gradient(loss, layer.trainable_variables)

    graph = step.get_concrete_function(tf.TensorSpec(shape, "float32")).graph
    matrix = 4 * SIDE**2
    assert graph.as_graph_def().ByteSize() < matrix
