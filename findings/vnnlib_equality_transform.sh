#!/usr/bin/env bash
# vnnlib 1.0.2: `compat.transform` turns an equality between outputs into one inequality.
#
# Expected: Y[0] == Y[1] becomes the two rows Y[0] - Y[1] <= 0 and Y[1] - Y[0] <= 0, or is refused.
# Seen: the polytope of "==" has one row, and it is the one of "<=". A verifier that reads the
# polytopes searches a half space instead of a plane: it reports counterexamples that do not satisfy
# the property. The syntax tree of the parsed query keeps the equality.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check vnnlib==1.0.2
cd "$folder"
"$folder/env/bin/python" - <<'END'
import importlib.metadata

import vnnlib
from vnnlib import compat

TEXT = """
(vnnlib-version <2.0>)
(declare-network f
  (declare-input X float32 [1])
  (declare-output Y float32 [2])
)
(assert (<= X[0] 1.0))
(assert (>= X[0] 0.0))
(assert ({} Y[0] Y[1]))
"""
rows = {}
for relation in ("<=", "==", ">="):
    (case,) = compat.transform(vnnlib.parse_query_string(TEXT.format(relation)))
    (polytope,) = case.output_constraints
    rows[relation] = ([list(map(float, r)) for r in polytope.coeff_matrix], list(polytope.rhs))
    print("vnnlib", importlib.metadata.version("vnnlib"), relation, rows[relation])
assert rows["=="] == rows["<="] and len(rows["=="][0]) == 1, "changed"
assert rows[">="] != rows["<="]
END
