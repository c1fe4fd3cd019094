#!/usr/bin/env bash
# One sparse logical variable that GNU Octave 7.3.0 wrote keeps SciPy 1.17.1 from reading a whole
# MATLAB v7 file.
#
# Expected: `loadmat` returns every variable, a sparse logical one as a sparse array.
# Seen: "ValueError: cannot reshape array of size 3 into shape (3,3)", so the variables beside it are
# lost too; `loadmat(..., variable_names=[...])` without the sparse one reads the file.
# Needs octave-cli on the path.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check scipy==1.17.1
cd "$folder"
octave-cli --quiet --no-history --norc --eval "weights = [1 2 3; 4 5 6]; mask = sparse(eye(3) > 0); save('mixed.mat', 'weights', 'mask', '-v7')"
"$folder/env/bin/python" - <<'END'
import scipy
from scipy.io import loadmat

try:
    loadmat("mixed.mat")
except ValueError as error:
    print("scipy", scipy.__version__, "-", error)
    assert "reshape" in str(error), error
else:
    raise SystemExit("changed: the file is read")
rest = loadmat("mixed.mat", variable_names=["weights"])
assert rest["weights"].shape == (2, 3)
print("without it:", rest["weights"].shape)
END
