#!/usr/bin/env bash
# Trains, certifies, attacks and reports on scikit-learn's digits, or on another config:
#   bash scripts/quickstart.sh [CONFIG] [OPTIONS of `tf-lyapunov run`]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" datasets,report
config=configs/lyapunov/digits.yaml
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  config="$1"
  shift
fi
exec "$venv/bin/tf-lyapunov" run "$config" "$@"
