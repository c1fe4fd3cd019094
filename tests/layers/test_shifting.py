"""`ShiftMixing`: groups of channels go round, and nothing else happens to them."""

import keras
import numpy as np
import pytest

from tf_lyapunov.layers import ShiftMixing


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_groups_go_forward_and_back_along_each_axis_and_the_rest_stays(data_format):
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 9))
    first = data_format == "channels_first"
    given = np.moveaxis(x, -1, 1) if first else x
    y = keras.ops.convert_to_numpy(ShiftMixing(0.25, data_format, dtype="float64")(given))
    y = np.moveaxis(y, 1, -1) if first else y
    for i, (axis, step) in enumerate(((1, 1), (1, -1), (2, 1), (2, -1))):
        group = slice(2 * i, 2 * i + 2)
        assert np.allclose(y[..., group], np.roll(x[..., group], step, axis), atol=1e-7)
    assert np.allclose(y[..., 8:], x[..., 8:], atol=1e-7)


def test_what_cannot_move_is_refused_by_name():
    with pytest.raises(ValueError, match="at most ½"):
        ShiftMixing(0.6)
    for share, shape, reason in (
        (0.3, (None, 4, 4, 8), "at most 0.25 on 2 axes"),
        (0.1, (None, 4, 4, 8), "A group must hold a channel"),
        (0.25, (None, 8), "images or sequences"),
    ):
        with pytest.raises(ValueError, match=reason):
            ShiftMixing(share).build(shape)
