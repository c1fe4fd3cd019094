"""Where onnxruntime itself loses digits: what is allowed for, and what is refused."""

import dataclasses

import numpy as np
import pytest
from onnx import helper
from onnx_files import model, run, saved

from tf_lyapunov.errors import UnfaithfulReading
from tf_lyapunov.onnx import operators
from tf_lyapunov.onnx.load import load_onnx


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs, outputs, name=f"{kind} {outputs[0]}", **attributes)


def _response_of_a_wide_channel(alpha):
    """`LRN` of channels 100·x, x, x, …: onnxruntime loses digits of the later ones."""
    weights = np.ones((6, 1, 1, 1), np.float32)
    weights[0] = 100.0
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("LRN", ["a"], ["y"], size=3, alpha=alpha, beta=0.75, bias=1.0),
    ]
    return model(nodes, {"x": ("n", 1, 3, 3)}, ["y"], {"w": weights})


def test_what_onnxruntimes_running_sums_lose_is_no_contradiction(tmp_path):
    path = saved(tmp_path, _response_of_a_wide_channel(0.5))
    assert load_onnx(path).inputs[0].shape[1:] == (1, 3, 3)
    x = np.random.default_rng(0).normal(size=(50, 1, 3, 3)).astype("float32")
    late = np.float64(x[:, 0])
    exact = late * (1 + 0.5 * late**2) ** -0.75  # a window of three equal channels
    assert np.abs(run(path, x)[:, 3] - exact).max() > 2.0**-18


def test_another_response_is_one_beside_its_running_sums(tmp_path, monkeypatch):
    newest, read = operators.READERS["LRN"]

    def wrong(build, node, values):
        changed = {**node.attributes, "alpha": node.get("alpha") * (1 + 1e-3)}
        return read(build, dataclasses.replace(node, attributes=changed), values)

    monkeypatch.setitem(operators.READERS, "LRN", (newest, wrong))
    with pytest.raises(UnfaithfulReading, match="LRN"):
        load_onnx(saved(tmp_path, _response_of_a_wide_channel(0.5)))


def test_a_group_normalization_that_its_runtime_gets_wrong_is_refused(tmp_path):
    """The standard's decomposition subtracts E[x]² from E[x²]: at a mean of 1000 little is left."""
    scale = {"s": np.ones(4, np.float32), "t": np.zeros(4, np.float32)}
    for mean, wrong in ((0.0, False), (1000.0, True)):
        nodes = [
            node("Add", ["x", "c"], ["a"]),
            node("GroupNormalization", ["a", "s", "t"], ["y"], num_groups=2),
        ]
        constants = {"c": np.array(mean, np.float32), **scale}
        path = saved(tmp_path, model(nodes, {"x": ("n", 4, 5, 5)}, ["y"], constants, opset=21))
        if wrong:
            with pytest.raises(UnfaithfulReading, match="operator GroupNormalization"):
                load_onnx(path)
        else:
            assert load_onnx(path).inputs[0].shape[1:] == (4, 5, 5)
