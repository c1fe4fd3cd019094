"""Bounds do not depend on the scale of what is bounded: tiny coefficients prove nothing more."""

import keras
import numpy as np
import pytest
from keras import layers

import tf_lyapunov as tfl
from tf_lyapunov.local.regions import Region
from tf_lyapunov.local.relaxation import Elementwise, Multipliers
from tf_lyapunov.local.scalable import spectral_norm
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import elementwise
from tf_lyapunov.verification.around import region as verifier_region
from tf_lyapunov.verification.around import relaxation as verifier
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.operations import Activation

SCALES = [1.0, 1e-31, 1e-170, 1e-301]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("lam", [0.0, 1e-33, 1e-250])
def test_a_relaxation_reaches_the_end_of_a_box_whatever_the_scale(scale, lam):
    box = np.array([-7.0]), np.array([9.0])
    step = Elementwise(
        elementwise.named("relu", {}, None), np.zeros((1, 1)), *(b[None] for b in box), 20.0
    )
    c, share = np.array([[-scale], [scale]]), np.array([[0.25], [0.75]])
    with np.errstate(divide="ignore"):
        _, h, _ = step.backward(c, Multipliers(share, np.log(np.full(2, lam)), step.columns))
    # By hand, at the ends of the pieces: λ may only add to what is subtracted again.
    assert h[0] <= -0.75 * 9 * scale * (1 - 1e-12) and h[1] <= 0
    if lam == 0:
        assert h[0] == pytest.approx(-6.75 * scale, rel=1e-12)
        assert h[1] == pytest.approx(0.0, abs=1e-12 * scale)


@pytest.mark.parametrize("scale", [1e-170, 1e-301])
def test_the_verifiers_relaxation_and_norm_reach_as_far(scale):
    far = 2.0**390
    operation = Activation("relu", {})
    step = verifier.Relaxation(operation, np.zeros(1), np.array([-far]), np.array([far]))
    given = verifier.Multipliers(np.array([0]), np.array([[0.5]]), np.zeros(1))
    _, h, _ = step.back(Functionals(np.array([[-scale]])), given, np.inf)
    assert h[0] <= -0.5 * scale * far * (1 - 1e-12)
    ball = verifier_region.Region(np.zeros(2), far, "l2")
    value, _ = ball.minimum(Functionals(np.array([[3 * scale, 4 * scale]])))
    assert value[0] == pytest.approx(-5 * scale * far, rel=1e-12)


@pytest.mark.parametrize("scale", [*SCALES, 1e200])
def test_norms_keep_their_scale(scale):
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [6.0, -8.0]])
    assert np.allclose(rounding.euclidean_norms(scale * rows) / scale, [5, 0, 10], rtol=1e-14)
    value, _ = Region.ball(np.zeros(2), 2.0).minimum(scale * rows)
    assert np.allclose(value / scale, [-10, 0, -20], rtol=1e-14)
    exact = np.linalg.norm(rows, 2)
    assert exact <= spectral_norm(scale * rows) / scale <= exact * (1 + 1e-6)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="float64 models compute in float32 elsewhere"
)
def test_radii_do_not_depend_on_the_scale_of_the_logits():
    rng = np.random.default_rng(1)
    hidden, last = (layers.Dense(n, dtype="float64") for n in (6, 2))
    model = keras.Sequential(
        [keras.Input((3,), dtype="float64"), hidden, layers.ReLU(dtype="float64"), last]
    )
    weights = [rng.normal(size=w.shape) for w in model.get_weights()]
    x = rng.normal(size=(2, 3))
    found = []
    for power in (0, -103, -560):
        model.set_weights([*weights[:2], *(np.ldexp(w, power) for w in weights[2:])])
        found.append(tfl.certify(model, x, method="linear", norm="linf").radius)
    # Rows are scaled by powers of two, so that searches differ by rounding alone; those in single
    # precision do not know 2^560, and find nothing then.
    assert np.allclose(found[1], found[0], rtol=1e-3)
    assert np.all(found[2] <= found[0] * (1 + 1e-3)) and np.all(found[2] > 0)
