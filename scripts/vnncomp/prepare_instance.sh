#!/usr/bin/env bash
# Before the time of an instance runs:  prepare_instance.sh v1 BENCHMARK NET.onnx PROP.vnnlib
# Exit code 0: the instance can be run; 1: it is skipped.
set -euo pipefail
if [ $# -ne 4 ] || [ "$1" != "v1" ]; then
  echo "Usage: prepare_instance.sh v1 BENCHMARK NET.onnx PROP.vnnlib. Received: $*" >&2
  exit 1
fi
for file in "$3" "$4"; do
  if [ ! -r "$file" ]; then
    echo "The file cannot be read: $file" >&2
    exit 1
  fi
done
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# Brings the libraries' files into memory.
"${TFL_VENV:-$root/.venv}/bin/python" -c "import tf_lyapunov.library, onnx, onnxruntime" 2>/dev/null
