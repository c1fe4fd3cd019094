#!/usr/bin/env bash
# onnx 1.23.2, ReferenceEvaluator: LRN normalizes as many channels as there are samples.
#
# Expected: every channel is divided by (k + a/n * sum of squares in its window)^b, whatever the size of
# the batch, and the same sample gives the same result alone and among others.
# Seen: the evaluator's loop runs over the first axis. Of two samples with six channels two channels
# are normalized and the other four returned divided by k^b; more samples than channels end with an
# IndexError. onnxruntime 1.32.0 is right in both cases. A comparison of a file with the standard's own
# evaluator thus fails on correct networks (or, for one sample, passes on networks without a response).
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
from onnx.reference import ReferenceEvaluator

SIZE, ALPHA, BETA, BIAS = 3, 0.9, 0.75, 1.0
ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 6, 2, 2]) for n in "xy"]
node = helper.make_node("LRN", ["x"], ["y"], size=SIZE, alpha=ALPHA, beta=BETA, bias=BIAS)
graph = helper.make_graph([node], "graph", ends[:1], ends[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
session = onnxruntime.InferenceSession(
    model.SerializeToString(), providers=["CPUExecutionProvider"]
)
reference = ReferenceEvaluator(model)

x = np.random.default_rng(0).normal(size=(7, 6, 2, 2)).astype("float32")
squares = np.pad(x.astype("float64") ** 2, [(0, 0), (1, 1), (0, 0), (0, 0)])
windows = squares[:, :-2] + squares[:, 1:-1] + squares[:, 2:]
exact = x / (BIAS + ALPHA / SIZE * windows) ** BETA

for count in (1, 2, 6):
    run = session.run(None, {"x": x[:count]})[0]
    seen = reference.run(None, {"x": x[:count]})[0]
    right = [int(np.sum(np.all(np.isclose(v, exact[:count], atol=1e-5), axis=(0, 2, 3)))) for v in (run, seen)]
    print(f"{count} samples of 6 channels: onnxruntime has {right[0]} right, the reference {right[1]}")
    assert right == [6, count], "changed"
    assert np.array_equal(seen[:, count:], x[:count, count:]), "changed"
try:
    reference.run(None, {"x": x})
except IndexError as error:
    print("7 samples:", type(error).__name__)
else:
    raise SystemExit("changed")
assert np.allclose(session.run(None, {"x": x})[0], exact, atol=1e-5)
END
