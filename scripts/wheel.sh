#!/usr/bin/env bash
# Builds sdist and wheel into dist/, checks them, and runs the README's example from the wheel in
# environments that hold Keras and one backend only, JAX and PyTorch by default:
#   bash scripts/wheel.sh [--download] [BACKEND ...]
# What an environment holds beside the wheel is linked to what is installed here; with --download
# it is fetched anew, which takes about two minutes for each.
set -euo pipefail
download=""
if [ "${1:-}" = --download ]; then
  download=yes
  shift
fi
backends="$*"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "${TFL_EXTRAS:-all}"
rm -rf dist
"$venv/bin/python" -m build --outdir dist . > /dev/null
"$venv/bin/python" -m twine check --strict dist/*
wheel="$(realpath dist/*.whl)"
"$venv/bin/python" scripts/site/wheel.py "$wheel"

if [ -z "$backends" ]; then
  for backend in jax torch; do
    if "$venv/bin/python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$backend'))"; then
      backends="$backends $backend"
    else
      echo "Without $backend, which is not installed here."
    fi
  done
fi
root="$PWD"
python="$(realpath -s "$venv/bin/python")"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH  # what runs is the wheel, outside of the checkout and without its path
# Of PyTorch the release that CI has a build for processors of; the newest brings gigabytes of CUDA.
declare -A release=([jax]=jax [torch]=torch==2.13.0 [tensorflow]=tensorflow)

example() {  # BACKEND
  cd "$folder"
  # scikit-learn has the example's data.
  if [ -n "$download" ]; then
    "$python" -m venv "$1"
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check \
      "$wheel" scikit-learn "${release[$1]}"
  else
    "$python" "$root/scripts/site/environment.py" "$1" "$wheel" scikit-learn "$1"
  fi
  # A thread each: both run at the same time, and wait for other threads in a small network most.
  OMP_NUM_THREADS=1 KERAS_BACKEND="$1" "$1/bin/python" "$root/scripts/site/example.py" "$root/README.md" "$1"
}

running=()
for backend in $backends; do
  example "$backend" > "$folder/$backend.log" 2>&1 &
  running+=("$!")
done
failed=0
for process in "${running[@]}"; do
  wait "$process" || failed=1
done
for backend in $backends; do
  cat "$folder/$backend.log"
done
exit "$failed"
