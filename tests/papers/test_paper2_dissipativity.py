"""Aquino et al.: published numbers, and a counterexample for each error."""

import math

import numpy as np
import pytest

from tf_lyapunov.design import spectral_design
from tf_lyapunov.theory import dissipativity as dis
from tf_lyapunov.theory.sectors import Indices, Sector

LEAKY = Sector.of("leaky_relu", negative_slope=0.1)
CLAIM = Indices(delta=0.4, nu=-2.0)


def test_the_cone_of_the_published_claim():
    assert [round(slope, 2) for slope in CLAIM.slopes] == [-1.31, 3.81]


def test_the_quoted_cone_belongs_to_other_indices():
    quoted = Indices(delta=4.0, nu=-0.4)
    assert [round(slope, 3) for slope in quoted.slopes] == [-0.215, 0.465]


def test_the_sign_of_nu_2_in_theorem_3_is_negative():
    # With the printed "-ν_2 + δ_1" a cascade of two identities would be refused for δ = ν = 1/2.
    layers = [Indices.from_slopes(0.5, 1.5)] * 2
    matrix = dis.cascade_matrix(CLAIM, layers)
    assert matrix[1, 1] == -layers[0].delta - layers[1].nu
    x = np.array([1.0, 2.0, -1.0])

    def omega(indices, u, y):
        return u * y - indices.delta * y * y - indices.nu * u * u

    direct = omega(CLAIM, x[0], x[2]) - omega(layers[0], x[0], x[1]) - omega(layers[1], x[1], x[2])
    assert -x @ matrix @ x == pytest.approx(direct)


def test_get_indexes_has_no_unique_solution():
    # Only the sums δ_l + ν_{l+1} enter: moving weight between them changes nothing, without end.
    layers = [Indices(1.0, -1.0), Indices(2.0, -0.5), Indices(1.5, -0.7)]
    for shift in (1.0, 10.0, 1000.0):
        moved = [
            Indices(layers[0].delta + shift, layers[0].nu),
            Indices(layers[1].delta + shift, layers[1].nu - shift),
            Indices(layers[2].delta, layers[2].nu - shift),
        ]
        np.testing.assert_allclose(
            dis.cascade_matrix(CLAIM, moved), dis.cascade_matrix(CLAIM, layers), atol=1e-12
        )


def test_the_released_bound_is_violated():
    indices = Indices(delta=0.525, nu=-0.476)
    bound = dis.get_indexes_budget(indices, LEAKY)
    assert round(bound, 3) == 1.454
    worst = dis.worst_supply(-bound * np.eye(2), LEAKY, indices)
    assert worst.supply < -1.0
    # The sound bound is a third of it, and Theorem 4 allows nothing.
    assert dis.gain_budget(indices, LEAKY) < 0.42
    assert dis.theorem_4_budget(indices, LEAKY) <= 0


def test_the_released_bound_is_negative_for_linear_layers():
    for indices in (Indices(0.525, -0.476), Indices(0.4, -2.0)):
        assert dis.get_indexes_budget(indices, Sector.linear()) < 0


def test_theorem_4_needs_nu_below_minus_one_half_for_wide_to_narrow_layers():
    assert dis.theorem_4_budget(Indices(0.4, -0.5), LEAKY) == pytest.approx(0.0, abs=1e-15)
    assert dis.theorem_4_budget(Indices(0.4, -0.6), LEAKY) > 0
    assert dis.theorem_4_budget(Indices(0.4, -0.4), LEAKY) < 0


def test_theorem_4_in_many_random_draws():
    rng = np.random.default_rng(0)
    violations = 0
    for _ in range(400):
        indices = Indices(float(rng.uniform(0.05, 4.0)), -float(rng.uniform(0.55, 8.0)))
        sector = Sector(float(rng.uniform(0.0, 0.9)), 1.0)
        n = int(rng.integers(1, 5))
        s = float(rng.uniform(0.0, 0.95))
        bound = dis.theorem_4_budget(indices, sector, s)
        if bound <= s:
            continue
        u, _, vt = np.linalg.svd(rng.normal(size=(n, n)))
        weight = u @ np.diag(np.append(rng.uniform(s, bound, n - 1), bound)) @ vt
        supply = dis.worst_supply(weight, sector, indices, draws=4).supply
        violations += supply < -1e-12
    assert violations == 0


def test_the_released_designs_of_mnist_exceed_what_the_claim_allows():
    # (ν, δ) = (-2, .4) is proved for products up to 1.31; the released bounds multiply to 5.9.
    released = (2.3783, 2.5231, 0.9815)
    design = spectral_design(CLAIM, [LEAKY, LEAKY, Sector.linear()])
    assert math.prod(design.budgets) == pytest.approx(-CLAIM.slopes[0], rel=1e-6)
    assert not design.check(released).holds
    assert math.prod(released) > 4 * dis.allowed_gain_product(CLAIM)
    # And some network within the released bounds violates the claim.
    network = -math.prod(released) * np.eye(2)
    assert dis.worst_supply(network, Sector.linear(), CLAIM, draws=1).supply < 0


@pytest.mark.parametrize(
    ("claim", "depth", "factor"),
    [
        (CLAIM, 2, 2.68),
        (CLAIM, 5, 15.4),
        (Indices(4.0, -0.4), 4, 158.0),
        (Indices(4.0, -0.4), 5, 814.0),
    ],
)
def test_the_papers_cascade_loses_a_factor_against_the_scaled_one(claim, depth, factor):
    found = dis.allowed_gain_product(claim) / dis.unscaled_gain_product(claim, depth)
    assert found == pytest.approx(factor, rel=0.01)


def test_the_sound_design_beats_theorem_4():
    sectors = [LEAKY, LEAKY, Sector.linear()]
    published = spectral_design(CLAIM, sectors, "dissipativity")
    sound = spectral_design(CLAIM, sectors)
    assert published.is_proved and sound.is_proved
    assert math.prod(sound.budgets) > 10 * math.prod(published.budgets)
