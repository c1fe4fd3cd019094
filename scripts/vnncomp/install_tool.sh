#!/usr/bin/env bash
# Installs the verifier, once:  install_tool.sh v1
set -euo pipefail
if [ "${1:-}" != "v1" ]; then
  echo "The version must be v1. Received: '${1:-}'." >&2
  exit 1
fi
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" tensorflow,onnx
"$venv/bin/tf-lyapunov" --version
