"""How many probes a reading is compared on; few find a mistake in large signals."""

import keras
import numpy as np
import pytest

from tf_lyapunov.errors import UnfaithfulReading
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.validation import PROBES, SCALES, validate_on_probes


def _network(side):
    layer = keras.layers.DepthwiseConv2D(3, padding="same")
    model = keras.Sequential([keras.Input((side, side, 2)), layer])
    return read_network(model, bounded=False), layer


def test_small_signals_are_compared_on_many_probes_and_large_ones_on_one_a_scale():
    assert validate_on_probes(_network(4)[0]).inputs == 1 + PROBES * len(SCALES)
    assert validate_on_probes(_network(150)[0]).inputs == 1 + len(SCALES)


@pytest.mark.parametrize("share", [1e-3, -1e-4])
def test_few_probes_find_a_weight_that_was_read_wrong(share):
    network, layer = _network(150)
    assert network.program.steps  # read before the weight changes
    kernel = np.array(layer.kernel)
    kernel[2, 0, 1, 0] += share
    layer.kernel.assign(kernel)
    with pytest.raises(UnfaithfulReading, match=layer.name):
        validate_on_probes(network)
