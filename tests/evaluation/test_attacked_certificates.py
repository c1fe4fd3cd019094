"""No attack changes a decision inside its certified radius: 10⁵ of them, of networks of gain 1."""

import keras
import numpy as np
import pytest

from tf_lyapunov import certify, models
from tf_lyapunov.attacks import PGD
from tf_lyapunov.models.lipschitz import FAMILIES, KEPT_FAMILIES
from tf_lyapunov.optimizers import is_marked
from tf_lyapunov.theory.balls import L2, Linf
from tf_lyapunov.training import initialize_for_bounds

SHAPE, CLASSES, BATCH = (8, 8, 1), 4, 2000
SMALL = {"name": "two_conv_two_dense", "filters": [4, 6], "widths": [8]}
NETWORKS = {
    **{family: {**SMALL, "family": family} for family in FAMILIES | KEPT_FAMILIES},
    "liresnet": {"name": "liresnet", "blocks": 2, "channels": 4, "units": 8},
    "lipnext": {"name": "lipnext", "size": [2, 16], "patch": 2},
    "potential_mixer": {"name": "potential_mixer", "size": [2, 16, 8], "patch": 2},
}
# Of every network, so that all hold 10⁵.
MANY = -(-100_000 // len(NETWORKS))


def certified(name, count):
    """`(model, x, radii, ball)` of a network's own decisions on random inputs."""
    rng = np.random.default_rng(sorted([*NETWORKS, "box"]).index(name))
    x = rng.standard_normal((count, *SHAPE)).astype("float32")
    if name == "box":
        keras.utils.set_random_seed(0)
        model = initialize_for_bounds(models.build({**SMALL, "name": "cnn"}, SHAPE, CLASSES))
        proof = certify(model, x, method="box", norm="linf", time_budget=600.0)
        return model, x, proof.radius, Linf
    model = models.build(NETWORKS[name], SHAPE, CLASSES, seed=0)
    for variable in model.trainable_variables:
        value = keras.ops.convert_to_numpy(variable)
        # Off the manifold, as rounding and steps leave it, but further: the departure is measured.
        scale = 0.02 if is_marked(variable) else 0.1
        variable.assign(value + scale * rng.standard_normal(value.shape))
    # Or one class may win everywhere, and there is nothing to find.
    logits = keras.ops.convert_to_numpy(model(x[:500], training=False))
    bias = model.layers[-1].bias
    bias.assign(bias - logits.mean(axis=0))
    return model, x, certify(model, x).radius, L2


def attacked(name, count):
    """Number of certificates that were attacked, none of them broken."""
    model, x, radius, ball = certified(name, count)
    holds = radius > 0
    assert np.mean(holds) > 0.95
    x, radius = x[holds], radius[holds]
    for random_start in (False, True):
        attack = PGD(ball(radius), steps=10, random_start=random_start, loss="margin",
                     batch_size=BATCH)  # fmt: skip
        found = attack(model, x)
        assert not np.any(found.success)
        reached = ball(1.0).norm(np.asarray(found.x_adv, np.float64) - x)
        assert np.median(reached / radius) > 0.9
    # Further away the same attack succeeds: one too weak to contradict would prove nothing.
    far = PGD(ball(20 * radius[:200]), steps=10, loss="margin", batch_size=BATCH)
    assert np.mean(far(model, x[:200]).success) > 0.5
    return len(x)


@pytest.mark.parametrize("name", ["orthogonal", "box"])
def test_no_attack_breaks_a_certificate(name):
    assert attacked(name, 200) > 190


@pytest.mark.slow
@pytest.mark.parametrize("name", ["box", *NETWORKS])
def test_no_attack_breaks_one_of_a_hundred_thousand_certificates(name):
    assert attacked(name, round(1.05 * MANY)) >= MANY
