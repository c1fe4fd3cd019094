"""What certificates in other norms, or within bounds, say in words."""

import re

import keras
import numpy as np
import pytest

from tf_lyapunov import certify
from tf_lyapunov.certification import Certificate


@pytest.fixture(scope="module")
def model():
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(2)])
    kernel = np.zeros((100, 2))
    kernel[:, 0] = 1.0
    model.layers[-1].set_weights([kernel, np.array([0.0, 5.0])])
    return model


def test_gains_are_about_l2_whatever_the_norm_of_radii(model):
    # All 100 entries may move by 1 in l-infinity, and the logit by 100; 10 holds for l2 alone.
    x = np.zeros((1, 100), "float32")
    text = certify(model, x, method="linear", norm="linf").explain()
    assert re.search(r"by more than 10(\.0001)? times its l2 norm", text)


def test_radii_within_bounds_say_so(model):
    # All entries up by 0.06 leave the decision: an l2 norm of 0.6, far below the radius.
    x = np.zeros((1, 100), "float32")
    certificate = certify(model, x, method="linear", bounds=(0.0, 0.01))
    assert certificate.radius[0] > 0.6
    for found in (certificate, Certificate.from_json(certificate.to_json())):
        assert "norm up to r that stays within 0.0 to 0.01 alters" in found.explain()
    whole = certify(model, x, method="composition", bounds=(0.0, 0.01))
    assert whole.within is None
