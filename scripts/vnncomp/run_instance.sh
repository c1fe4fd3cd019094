#!/usr/bin/env bash
# Decides an instance:  run_instance.sh v1 BENCHMARK NET.onnx PROP.vnnlib RESULTS.txt TIMEOUT
# The results file holds sat (and a counterexample), unsat, unknown, timeout or error.
set -uo pipefail
if [ $# -ne 6 ] || [ "$1" != "v1" ]; then
  echo "Usage: run_instance.sh v1 BENCHMARK NET.onnx PROP.vnnlib RESULTS.txt TIMEOUT. Received: $*" >&2
  exit 1
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# What passes before the command's own clock starts, and after its last check of it.
limit="$(awk -v t="$6" 'BEGIN { print (t > 20 ? t - 2 : 0.9 * t) }')"
rm -f "$5"
"${TFL_VENV:-$root/.venv}/bin/tf-lyapunov" verify-property "$3" "$4" \
  --timeout "$limit" --out "$5" --overwrite
code=$?
# Decided or not, there is an answer; whatever else went wrong is an error.
[ -s "$5" ] || echo error >"$5"
[ $code -le 1 ]
