#!/usr/bin/env bash
# Lint, import layers, doctests and tests:  bash scripts/test.sh [PYTEST OPTIONS]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" all
bin="$venv/bin"
# The tests' matrices are small: several BLAS threads per worker only wait for each other.
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Processes that tests start read compiled modules instead of compiling them again.
unset PYTHONDONTWRITEBYTECODE
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports"
# Stealing work keeps a module's tests, and what they share, with one worker.
"$bin/python" -m pytest --doctest-modules tf_lyapunov tests \
  -n "${TFL_TEST_WORKERS:-2}" --dist worksteal "$@"
