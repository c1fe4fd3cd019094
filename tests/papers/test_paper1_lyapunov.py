"""Rahnama, Nguyen, Raff (CVPR 2020): published numbers, and a counterexample for each error."""

import math

import numpy as np
import pytest

from tf_lyapunov.design import spectral_design
from tf_lyapunov.errors import DesignInfeasible
from tf_lyapunov.theory import dissipativity as dis
from tf_lyapunov.theory import lyapunov
from tf_lyapunov.theory.sectors import Indices, Sector

LEAKY = Sector.of("leaky_relu", negative_slope=0.3)

# Table 2: design, then (radius, measured mean response, printed bound).
TABLE_2 = [
    (Indices(0.89, 0.28), [(0.1, 0.244, 0.435), (0.2, 0.490, 0.615), (0.3, 0.736, 0.753)]),
    (Indices(0.95, 0.26), [(0.1, 0.202, 0.407), (0.2, 0.406, 0.576), (0.3, 0.610, 0.706)]),
    (Indices(1.1, 0.22), [(0.1, 0.170, 0.352), (0.2, 0.340, 0.497), (0.3, 0.511, 0.609)]),
]
ROWS = [(claim, *row) for claim, rows in TABLE_2 for row in rows]
RELEASED = [Indices(0.74, 0.33)] * 4 + [Indices(0.86, 0.29)]


@pytest.mark.parametrize(("claim", "radius", "measured", "printed"), ROWS)
def test_table_2_prints_the_root_of_c_times_radius(claim, radius, measured, printed):
    # The printed ν are rounded: with ν = 1/(4δ), hence c = 3/(2δ²), all nine bounds are the
    # printed ones cut off after three digits.
    exact = Indices(claim.delta, 0.25 / claim.delta)
    assert abs(exact.nu - claim.nu) < 0.01
    assert 0 <= lyapunov.table_2_bound(exact, radius) - printed < 0.001
    assert lyapunov.table_2_bound(exact, radius) == pytest.approx(
        math.sqrt(1.5 * radius) / claim.delta
    )
    # With ν as printed they agree to half a percent.
    assert lyapunov.table_2_bound(claim, radius) == pytest.approx(printed, rel=0.006)
    assert measured <= printed


@pytest.mark.parametrize(("claim", "radius", "measured", "printed"), ROWS)
def test_the_corrected_bound_of_table_2_is_violated_by_the_papers_measurements(
    claim, radius, measured, printed
):
    corrected = lyapunov.corollary_2(claim, radius)
    assert corrected < printed
    # A mean that exceeds the bound shows at least one violating input.
    assert measured > corrected
    assert claim.gain * radius <= corrected


def test_the_first_row_of_table_2_corrected():
    bounds = [round(lyapunov.corollary_2(Indices(0.89, 0.28), r), 3) for r in (0.1, 0.2, 0.3)]
    assert bounds == [0.138, 0.275, 0.413]


def test_the_closed_form_example():
    layers = lyapunov.closed_form_indices(Indices(0.89, 0.28), 3)
    assert [round(layer.nu, 3) for layer in layers] == [0.987, 0.454, 0.156]
    assert [round(layer.delta, 3) for layer in layers] == [0.253, 0.551, 1.597]
    budgets = [lyapunov.budget(layer) for layer in layers]
    assert [float(f"{budget:.3g}") for budget in budgets] == [23.4, 4.94, 0.588]
    test = lyapunov.theorem_3(Indices(0.89, 0.28), layers)
    assert test.semidefinite.holds
    assert test.quasi_dominance.margin == pytest.approx(math.cos(math.pi / 4) - 1)


@pytest.mark.parametrize("claim", [claim for claim, _ in TABLE_2])
def test_quasi_dominance_cannot_hold_for_the_published_claims(claim):
    # Equal diagonal d = 1 is what dominance needs; the last layer then leaves δν ≤ 1/4.
    nu = claim.nu + 1
    for _ in range(2):
        nu = 1 - 1 / (4 * nu)
    assert (claim.delta + 1) * nu > 0.25
    with pytest.raises(DesignInfeasible):
        lyapunov.remark_4_indices(claim, 3)


def test_the_released_design_set_fails_theorem_3():
    claim = Indices(0.85, 0.29)
    test = lyapunov.theorem_3(claim, RELEASED)
    assert test.semidefinite.refuted
    assert test.margin == pytest.approx(-0.63, abs=0.01)
    assert not test.quasi_dominance.holds
    assert not dis.scaled_cascade(claim, RELEASED).holds
    design = spectral_design(claim, [LEAKY] * 5, "lyapunov", layer_indices=RELEASED)
    assert design.verdict == "NOT_PROVED"
    assert design.cascade_margin == test.margin


def test_the_released_bounds_are_not_theorem_2s():
    assert lyapunov.budget(RELEASED[0]) == pytest.approx(2.72, abs=0.005)
    assert abs(lyapunov.budget(RELEASED[0]) - 2.52) > 0.1
    assert lyapunov.budget(RELEASED[-1]) == pytest.approx(2.02, abs=0.01)


@pytest.mark.parametrize("delta", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_minus_half_the_identity_refutes_theorem_2(delta, fraction):
    layer = Indices(delta, fraction * 0.25 / delta)
    weight = -0.5 * np.eye(3)
    if lyapunov.budget(layer) < 0.5:
        weight *= 2 * lyapunov.budget(layer)
    supplies = dis.supply(np.eye(3), np.eye(3) @ weight.T, layer)
    assert np.all(supplies < 0)


def test_the_missing_square_root():
    # IIFOFP ⇒ gain² ≤ λ: a member of the cone with gain b has b ≤ √λ, not b² ≤ λ².
    layer = Indices(0.3, -1.0)
    b = layer.slopes[1]
    weight = b * np.eye(2)
    assert dis.worst_supply(weight, Sector.linear(), layer).supply >= -1e-12
    assert b <= lyapunov.budget(layer, square_root=True) < lyapunov.budget(layer)


def test_the_cone_collapses_to_a_line_when_delta_nu_is_one_quarter():
    layer = Indices(0.8, 0.25 / 0.8)
    a, b = layer.slopes
    assert a == pytest.approx(b, abs=1e-7)
    assert a == pytest.approx(1 / (2 * 0.8), abs=1e-7)
    for scale in (0.3, 1 / 1.6, 1.0):
        # A ReLU passes a change in one unit and blocks it in another: slopes 0 and `scale`.
        worst = dis.worst_supply(scale * np.eye(2), Sector(0.0, 1.0), layer)
        assert worst.supply < -0.1


@pytest.mark.parametrize("claim", [claim for claim, _ in TABLE_2])
def test_every_published_classifier_design_is_vacuous(claim):
    rng = np.random.default_rng(0)
    first = rng.normal(size=(5, 12)) * 1e-3
    last = rng.normal(size=(3, 5)) * 1e-3
    # However small the weights: moving the last of 12 inputs, of which only 3 have a partner.
    dx = np.eye(12)[-1:]
    hidden = first @ dx[0]
    dy = (last @ np.where(hidden > 0, hidden, 0.3 * hidden))[None]
    assert dis.supply(dx, dy, claim)[0] < 0
    witness = dis.null_coordinate_counterexample(last @ first, Sector.linear(), claim)
    assert witness.supply < 0
    with pytest.raises(DesignInfeasible):
        spectral_design(claim, [LEAKY, LEAKY, Sector.linear()])


def test_norm_rules_exist_only_for_negative_nu():
    for t in (1e-6, 0.1, 0.5):
        worst = dis.worst_supply(-t * np.eye(2), Sector.linear(), Indices(0.89, 0.28))
        assert worst.supply < -0.28
