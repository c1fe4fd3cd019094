"""Certificates that are not about l2 balls are not read as if they were."""

import keras
import numpy as np
import pytest

from tf_lyapunov import certify
from tf_lyapunov.evaluation.accuracy import accuracy_under_attack
from tf_lyapunov.evaluation.summaries import certificate_summary


@pytest.mark.parametrize("options", [{"norm": "l1"}, {"norm": "linf"}, {"bounds": (0.0, 0.01)}])
def test_only_l2_certificates_stand_beside_l2_attacks(options):
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(2)])
    kernel = np.zeros((100, 2))
    kernel[:, 0] = 1.0
    model.layers[-1].set_weights([kernel, np.array([0.0, 5.0])])
    x, y = np.zeros((1, 100), "float32"), np.array([1])
    certificate = certify(model, x, y, method="linear", **options)
    with pytest.raises(ValueError, match="l2 balls"):
        accuracy_under_attack(model, x, y, {}, [1.0], certificate=certificate)
    with pytest.raises(ValueError, match="l2 balls"):
        certificate_summary(certificate)
