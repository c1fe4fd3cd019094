#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU): float32 Tanh and Sigmoid leave their ranges.
#
# Expected: |Tanh| <= 1 and 0 < Sigmoid <= 1 (true value 1.5e-8 at -18, far above float32's smallest).
# Seen: Tanh reaches 1.0000002 (two units in the last place above 1), Sigmoid 1.0000001 and, below
# about -16, exact zeros among values that are up to six times too large. Bounds on activations that
# assume the ranges of the real functions do not hold for what this runtime computes, and logarithms
# of its probabilities are infinite where the true ones are -18.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0
cd "$folder"
"$folder/env/bin/python" - <<'END'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

x = np.linspace(-30, 30, 200001).astype("float32")


def computed(operator):
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"])], "graph", values[:1], values[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


tanh, sigmoid = computed("Tanh"), computed("Sigmoid")
exact = 1 / (1 + np.exp(-x.astype("float64")))
zeros, worst = sigmoid == 0, float(np.max(sigmoid / exact))
print("onnxruntime", onnxruntime.__version__, "Tanh up to", repr(float(tanh.max())))
print("Sigmoid up to", repr(float(sigmoid.max())), "- zero up to x =", float(x[zeros].max()))
print("largest ratio to the exact sigmoid", worst)
assert 1 < tanh.max() < 1 + 1e-6, "changed"
assert 1 < sigmoid.max() < 1 + 1e-6, "changed"
assert -17 < x[zeros].max() < -15 and worst > 3, "changed"
END
