#!/usr/bin/env bash
# Builds sdist and wheel into dist/, checks them, and runs the README's example from the wheel in
# environments that hold Keras and one backend only:
#   bash scripts/wheel.sh [jax] [torch] [tensorflow]     (nothing: build and check alone)
set -euo pipefail
backends="$*"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "${TFL_EXTRAS:-all}"
rm -rf dist
"$venv/bin/python" -m build --outdir dist . > /dev/null
"$venv/bin/python" -m twine check --strict dist/*
wheel="$(realpath dist/*.whl)"
"$venv/bin/python" scripts/site/wheel.py "$wheel"

readme="$PWD/README.md"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH  # what runs is the wheel, outside of the checkout and without its path
# Of PyTorch the release that CI has a build for processors of; the newest brings gigabytes of CUDA.
declare -A release=([jax]=jax [torch]=torch==2.13.0 [tensorflow]=tensorflow)
for backend in $backends; do
  "$venv/bin/python" -m venv "$folder/$backend"
  # scikit-learn has the example's data.
  "$folder/$backend/bin/python" -m pip install --quiet --disable-pip-version-check \
    "$wheel" scikit-learn "${release[$backend]}"
  (cd "$folder" && KERAS_BACKEND="$backend" "$folder/$backend/bin/python" - "$readme" "$backend" <<'PYTHON'
import importlib.util
import pathlib
import re
import subprocess
import sys

readme, backend = sys.argv[1:]
for other in {"tensorflow", "jax", "torch"} - {backend}:
    assert importlib.util.find_spec(other) is None, f"{other} is installed too"
block = re.search(r"^```python\n(.*?)^```$", pathlib.Path(readme).read_text(), re.M | re.S)[1]
exec(compile(block, readme, "exec"))
assert proof.certified_accuracy(0.3) <= attack.robust_accuracy
command = pathlib.Path(sys.executable).with_name("tf-lyapunov")
shown = subprocess.run([command, "configs", "list"], check=True, capture_output=True, text=True)
assert "lyapunov/digits" in shown.stdout
PYTHON
  )
  echo "The README's example runs from the wheel with $backend alone."
  rm -rf "${folder:?}/$backend"
done
