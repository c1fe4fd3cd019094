#!/usr/bin/env bash
# deel-lip 1.5.0: `InvertibleUpSampling`, "the inverse of the InvertibleDownSampling layer", is its inverse on
# square images only.
#
# Expected: InvertibleUpSampling(2)(InvertibleDownSampling(2)(x)) is x, for images of every height and width.
# Seen: 4×6 images come back as 6×4 ones, in both data formats, with their pixels in another order, neither
# that of x nor that of x with height and width exchanged: the layer reshapes with the two sizes exchanged.
# No error, and the layer is still an isometry: only what was trained at certain places is elsewhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check tensorflow==2.21.0 deel-lip==1.5.0
cd "$folder"
TF_CPP_MIN_LOG_LEVEL=3 "$folder/env/bin/python" - <<'END'
import numpy as np
from deel.lip.layers import InvertibleDownSampling, InvertibleUpSampling

for height, width, same in ((4, 4, True), (4, 6, False)):
    x = np.arange(height * width, dtype="float32").reshape(1, height, width, 1)
    for data_format in ("channels_last", "channels_first"):
        last = data_format == "channels_last"
        z = x if last else np.moveaxis(x, -1, 1)
        down = InvertibleDownSampling((2, 2), data_format=data_format)
        up = InvertibleUpSampling((2, 2), data_format=data_format)
        y = up(down(z)).numpy()
        print(data_format, "in", z.shape, "back", y.shape, y.ravel().astype(int))
        assert np.array_equal(y, z) == same, "changed"
        if not same:
            sides = (1, 2) if last else (2, 3)
            assert y.shape == np.swapaxes(z, *sides).shape, "changed"
            assert not np.array_equal(y, np.swapaxes(z, *sides)), "changed"
END
