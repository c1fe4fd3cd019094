#!/usr/bin/env bash
# onnx 1.23.2 and onnxruntime 1.32.0 (CPU): GroupNormalization and LRN lose what float32 subtracts.
#
# Expected: a normalization ignores a constant that is added to its input: 1000 + x, of which float32
# keeps four digits behind the point, gives what x gives but for 1e-3; and the response of a channel
# does not depend on channels outside its window.
# Seen: the standard defines GroupNormalization (operator set 21) by other operators, with a variance
# E[x²] - E[x]². Neither onnxruntime nor onnx's reference evaluator has a kernel of its own, so that
# both are off by tenths of a standard deviation at 1000 + x, and both give NaN at 3000 + x.
# Their LayerNormalization and InstanceNormalization subtract the mean first and are right. LRN of
# onnxruntime updates one sum over the channels by adding and subtracting squares, so that a channel of
# 1000 leaves an error of a thousandth three channels on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0
cd "$folder"
"$folder/env/bin/python" - <<'END'
import numpy as np
import onnx.reference
import onnxruntime
from onnx import TensorProto, helper

rng = np.random.default_rng(0)


def computed(operator, x, names=(), **attributes):
    """What onnxruntime and the reference evaluator give, each with scales 1 and shifts 0."""
    size = x.shape[-1] if operator == "LayerNormalization" else x.shape[1]
    held = [
        helper.make_tensor(n, TensorProto.FLOAT, [size], np.full(size, v, np.float32))
        for n, v in zip(names, (1, 0))
    ]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *names], ["y"], **attributes)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        held,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    reference = onnx.reference.ReferenceEvaluator(model)
    return session.run(None, {"x": x})[0], reference.run(None, {"x": x})[0]


noise = rng.normal(size=(8, 32, 16, 16))
# operator: (attributes, shape of what is normalized together, axes of it)
KINDS = {
    "GroupNormalization": ({"num_groups": 2}, (8, 2, -1), -1),
    "InstanceNormalization": ({}, noise.shape, (2, 3)),
    "LayerNormalization": ({"axis": -1}, noise.shape, -1),
}
error = {}
for shift in (1000, 3000):
    x = (shift + noise).astype("float32")
    for operator, (attributes, shape, axes) in KINDS.items():
        wide = x.astype("float64").reshape(shape)
        exact = (wide - wide.mean(axes, keepdims=True)) / wide.std(axes, keepdims=True)
        found = computed(operator, x, ("scale", "bias"), epsilon=1e-5, **attributes)
        error[operator, shift] = [float(np.max(np.abs(v - exact.reshape(x.shape)))) for v in found]
        print(f"{operator} of {shift} + x: onnxruntime is off by {error[operator, shift][0]:.2g},",
              f"the reference evaluator by {error[operator, shift][1]:.2g}")
assert min(error["GroupNormalization", 1000]) > 0.1, "changed"
assert np.all(np.isnan(error["GroupNormalization", 3000])), "changed"
assert max(max(v) for (n, _), v in error.items() if n != "GroupNormalization") < 1e-2, "changed"

x = np.full((1, 6, 1, 1), 0.1, np.float32)
x[0, 0] = 1000.0
run, _ = computed("LRN", x, size=3, alpha=1.0, beta=0.75, bias=1.0)
exact = 0.1 * (1 + 0.01) ** -0.75
print("LRN, channels 2 to 4:", run[0, 2:5, 0, 0], "exactly", np.float32(exact))
off = float(np.max(np.abs(run[0, 2:5, 0, 0] - exact)) / exact)
print("relative error", off)
assert off > 1e-3, "changed"
END
