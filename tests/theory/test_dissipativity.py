"""System 2: layer rules, sound and published, and the scaled cascade; soundness by search."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tf_lyapunov.errors import DesignInfeasible
from tf_lyapunov.theory import dissipativity as dis
from tf_lyapunov.theory.cascade import _exact_cascade
from tf_lyapunov.theory.sectors import Indices, Sector

U = 2.0**-53
LEAKY = Sector(0.1, 1.0)
SECTORS = [LEAKY, Sector(0.0, 1.0), Sector.linear(), Sector(-0.13, 1.13), Sector(0.0, 0.25)]


def rounding(weight, indices):
    """Error of a supply rate of a unit vector in float64."""
    sigma = np.linalg.norm(weight, 2)
    size = sigma + abs(indices.delta) * sigma**2 + abs(indices.nu)
    return 100 * max(weight.shape) * U * size


def with_norm(rng, shape, sigma):
    weight = rng.normal(size=shape)
    kind = rng.integers(3)
    if kind == 1:  # all singular values equal
        u, _, vt = np.linalg.svd(weight, full_matrices=False)
        weight = u @ vt
    elif kind == 2:  # close to the worst case -tI
        weight = -np.eye(*shape) + 0.1 * weight
    return weight * (sigma / np.linalg.norm(weight, 2))


def sampled_supply(rng, weight, sector, indices, pairs=200):
    """Supply rates of random pairs through a random piecewise-linear activation of the sector."""
    dx = rng.normal(size=(pairs, weight.shape[1]))
    slopes = rng.choice([sector.alpha, sector.beta], size=(pairs, weight.shape[0]))
    dy = slopes * (dx @ weight.T)
    return dis.supply(dx, dy, indices) / np.sum(dx * dx, 1)


def exactly_semidefinite(claim, layers, weights):
    """M(p) ⪰ 0 by LDLᵀ in rational arithmetic: the oracle for the eigenvalue verdict."""
    size = len(layers) + 1
    m = [[Fraction(0)] * size for _ in range(size)]
    for (row, column), value in _exact_cascade(claim, layers, weights).items():
        m[row][column] = m[column][row] = value
    for pivot in range(size):
        if m[pivot][pivot] < 0 or (m[pivot][pivot] == 0 and any(m[pivot][pivot + 1 :])):
            return False
        for row in range(pivot + 1, size):
            if m[row][pivot]:
                factor = m[row][pivot] / m[pivot][pivot]
                for column in range(pivot, size):
                    m[row][column] -= factor * m[pivot][column]
    return True


def test_supply_pads_the_shorter_signal_with_zeros():
    rng = np.random.default_rng(0)
    dx, dy = rng.normal(size=(5, 2, 3)), rng.normal(size=(5, 4))
    indices = Indices(0.7, -0.3)
    padded = np.pad(dy, ((0, 0), (0, 2)))
    flat = dx.reshape(5, 6)
    expected = (flat * padded).sum(1) - 0.7 * (dy**2).sum(1) + 0.3 * (flat**2).sum(1)
    np.testing.assert_allclose(dis.supply(dx, dy, indices), expected, rtol=1e-14)
    with pytest.raises(ValueError, match="pairs"):
        dis.supply(dx, dy[:3], indices)


# Rule (2.1).


@settings(max_examples=60)
@given(
    st.integers(0, 10**6), st.floats(0.05, 20.0), st.floats(-5.0, -0.01), st.sampled_from(SECTORS)
)
def test_the_norm_rule_is_sound_for_random_weights_at_its_bound(seed, delta, nu, sector):
    rng = np.random.default_rng(seed)
    indices = Indices(delta, nu)
    sigma = dis.gain_budget(indices, sector)
    shape = tuple(rng.integers(1, 6, size=2))
    weight = with_norm(rng, shape, sigma)
    worst = dis.worst_supply(weight, sector, indices, draws=8, seed=seed)
    assert worst.supply >= -rounding(weight, indices)
    assert sampled_supply(rng, weight, sector, indices).min() >= -rounding(weight, indices)


@settings(max_examples=60)
@given(st.floats(0.05, 20.0), st.floats(-5.0, -0.01), st.sampled_from(SECTORS))
def test_the_norm_rule_is_tight(delta, nu, sector):
    indices = Indices(delta, nu)
    sigma = 1.01 * dis.gain_budget(indices, sector)
    worst = dis.worst_supply(-sigma * np.eye(2), sector, indices)
    assert worst.supply < -rounding(sigma * np.eye(2), indices)


def test_the_norm_rule_is_decided_without_rounding():
    indices = Indices(1.0, -6.0)  # δr² + r + ν = 0 at r = 2 exactly
    assert dis.gain_rule_holds(2.0, Sector.linear(), indices)
    assert not dis.gain_rule_holds(math.nextafter(2.0, 3.0), Sector.linear(), indices)


@pytest.mark.parametrize("indices", [Indices(1.0, 0.0), Indices(1.0, 0.2), Indices(0.0, -1.0)])
def test_no_norm_rule_exists_for_nu_not_negative(indices):
    with pytest.raises(ValueError, match="nu < 0"):
        dis.gain_budget(indices, Sector.linear())


@given(st.floats(1e-6, 1e3), st.floats(1e-3, 1e9))
def test_gain_indices_are_the_best_on_the_safe_side(gain, delta):
    indices = dis.gain_indices(gain, delta)
    assert dis.gain_rule_holds(gain, Sector.linear(), indices)
    larger = Indices(delta, math.nextafter(indices.nu, math.inf))
    exact = Fraction(delta) * Fraction(gain) ** 2 + Fraction(gain) + Fraction(indices.nu)
    assert exact == 0 or not dis.gain_rule_holds(gain, Sector.linear(), larger)


# Rule (2.2).


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.floats(0.05, 5.0),
    st.floats(-1.0, 0.9),
    st.sampled_from([LEAKY, Sector(0.5, 1.0), Sector.linear(), Sector(-0.05, 1.0)]),
)
def test_the_conic_rule_is_sound_in_its_whole_ball(seed, b, ratio, sector):
    assume(ratio > -0.99)
    rng = np.random.default_rng(seed)
    indices = Indices.from_slopes(ratio * b, b)
    try:
        center, radius = dis.conic_ball(indices, sector)
    except DesignInfeasible:
        return
    n = int(rng.integers(1, 5))
    weight = center * np.eye(n) + with_norm(rng, (n, n), radius) if radius else center * np.eye(n)
    worst = dis.worst_supply(weight, sector, indices, draws=8, seed=seed)
    assert worst.supply >= -rounding(weight, indices)
    assert dis.conic_margin(weight, sector, indices) >= -rounding(weight, indices)
    assert np.linalg.norm(weight, 2) <= (center + radius) * (1 + 100 * U)


def test_the_conic_rule_is_tight_for_linear_layers():
    indices = Indices.from_slopes(0.5, 1.5)
    center, radius = dis.conic_ball(indices, Sector.linear())
    for sign in (-1, 1):
        weight = (center + sign * 1.01 * radius) * np.eye(2)
        assert dis.worst_supply(weight, Sector.linear(), indices).supply < -1e-3


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([LEAKY, Sector(0.5, 1.0), Sector.linear()]))
def test_the_conic_margin_proves_layers_of_any_shape(seed, sector):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 5, size=2))
    weight = 0.3 * rng.normal(size=shape) + 0.7 * np.eye(*shape)
    indices = Indices.from_slopes(-0.6, 2.0)
    if dis.conic_margin(weight, sector, indices) >= 0:
        assert dis.worst_supply(weight, sector, indices).supply >= -rounding(weight, indices)


def test_padding_with_a_rectangular_identity_would_be_wrong():
    # Two inputs, one output, W = [c 0]: the rectangular distance is 0, yet the null input violates
    # every ν > 0. The full identity sees it.
    weight, indices = np.array([[1.0, 0.0]]), Indices.from_slopes(0.5, 1.5)
    rectangular = np.linalg.norm(weight - np.eye(1, 2), 2)
    assert rectangular <= (1.5 - 0.5) / 2
    assert dis.worst_supply(weight, Sector.linear(), indices).supply < 0
    assert dis.conic_margin(weight, Sector.linear(), indices) < 0


# Theorem 1 and Theorem 4, as published.


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.floats(0.05, 5.0),
    st.floats(-8.0, -0.6),
    st.floats(0.0, 0.9),
    st.booleans(),
)
def test_theorem_4_has_no_violation_within_its_assumptions(seed, delta, nu, alpha, use_s):
    rng = np.random.default_rng(seed)
    sector, indices = Sector(alpha, 1.0), Indices(delta, nu)
    n = int(rng.integers(1, 5))
    outputs = n if use_s else int(rng.integers(1, 5))
    weight = rng.normal(size=(outputs, n))
    if use_s:
        s = float(rng.uniform(0.0, 0.9))
        budget = dis.theorem_4_budget(indices, sector, s)
        assume(budget > s)
        u, _, vt = np.linalg.svd(weight)
        values = np.append(rng.uniform(s, budget, n - 1), budget)
        weight = u @ np.diag(values) @ vt
    else:
        budget = dis.theorem_4_budget(indices, sector)
        assume(budget > 0)
        weight = with_norm(rng, weight.shape, budget)
    # Only norms are proved, so the exact rule (2.1) must allow at least as much, also with s.
    assert budget <= dis.gain_budget(indices, sector) * (1 + 4 * U)
    worst = dis.worst_supply(weight, sector, indices, draws=8, seed=seed)
    assert worst.supply >= -rounding(weight, indices)
    # And the multiplier of the proof satisfies Theorem 1.
    lam = dis.theorem_4_multiplier(indices, sector, budget)
    matrix = dis.theorem_1_matrix(weight, sector, indices, lam)
    assert np.linalg.eigvalsh(matrix)[0] >= -1e3 * U * np.linalg.norm(matrix)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.0, 3.0))
def test_theorem_1_implies_the_supply_rate(seed, lam):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=tuple(rng.integers(1, 4, size=2)))
    indices = Indices(float(rng.uniform(0.0, 1.0)), -float(rng.uniform(0.0, 5.0)))
    multipliers = lam * rng.uniform(size=weight.shape[0])
    if np.linalg.eigvalsh(dis.theorem_1_matrix(weight, LEAKY, indices, multipliers))[0] >= 0:
        worst = dis.worst_supply(weight, LEAKY, indices)
        assert worst.supply >= -rounding(weight, indices)


@pytest.mark.parametrize(
    ("indices", "sector", "s", "broken"),
    [
        (Indices(0.2, 0.5), Sector(0.0, 1.0), 0.0, "delta > nu"),
        (Indices(1.0, -0.6), Sector.linear(), 1.0, "s\\*\\*2 < 1"),
        (Indices(0.5, -2.0), Sector(-0.5, 1.13), 0.0, "alpha >= 0"),
        (Indices(-0.1, -2.0), LEAKY, 0.0, "delta > 0"),
        (Indices(0.5, -2.0), Sector(0.0, 0.0), 0.0, "alpha \\+ beta > 0"),
    ],
)
def test_theorem_4_is_refused_outside_its_assumptions(indices, sector, s, broken):
    with pytest.raises(ValueError, match=broken):
        dis.theorem_4_budget(indices, sector, s)


def test_theorem_4_fails_for_relu_when_delta_is_below_nu():
    sector, indices = Sector(0.0, 1.0), Indices(0.2, 0.5)
    budget = dis.theorem_4_budget(indices, sector, check_assumptions=False)
    assert budget > 0.5
    assert dis.worst_supply(-0.5 * np.eye(2), sector, indices).supply < -0.1


def test_theorem_4_fails_for_linear_layers_when_p_s_squared_is_one():
    indices = Indices(1.0, -0.6)
    assert dis.theorem_4_budget(indices, Sector.linear(), 1.0, check_assumptions=False) == 1.0
    # σ = s = 1 meets the printed condition with W = -I.
    assert dis.worst_supply(-np.eye(2), Sector.linear(), indices).supply == pytest.approx(-1.4)


def test_theorem_4_fails_for_gelu():
    # α < 0: |p|s² is not a lower bound of p‖Wx‖².
    sector, s = Sector.of("gelu"), 1.5
    indices = Indices(0.5, -2.2)
    budget = dis.theorem_4_budget(indices, sector, s, check_assumptions=False)
    assert budget >= s
    worst = dis.worst_supply(-s * np.eye(2), sector, indices)
    assert worst.supply < -0.1


# Cascades.


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.05, 5.0), st.floats(-5.0, -0.05), st.integers(1, 6))
def test_gain_cascades_are_exact_up_to_their_reserve(seed, delta, nu, depth):
    claim = Indices(delta, nu)
    rng = np.random.default_rng(seed)
    gains = np.exp(rng.normal(size=depth))
    gains *= (dis.allowed_gain_product(claim) / np.prod(gains)) ** (1 / depth)
    layers, verdict = dis.gain_cascade(claim, gains * (1 - 1e-7) ** (1 / depth))
    assert verdict.holds
    assert exactly_semidefinite(claim, layers, verdict.weights)
    for gain, layer in zip(gains * (1 - 1e-7) ** (1 / depth), layers, strict=True):
        assert dis.gain_rule_holds(gain, Sector.linear(), layer)
    assert not dis.gain_cascade(claim, gains * (1 + 1e-7) ** (1 / depth))[1].holds


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.05, 5.0), st.floats(-5.0, -0.05), st.floats(-20.0, 0.0))
def test_gain_cascades_also_prove_much_smaller_gains(seed, delta, nu, logarithm):
    claim = Indices(delta, nu)
    depth = 1 + seed % 5
    gain = (dis.allowed_gain_product(claim) * math.exp(logarithm) * (1 - 1e-6)) ** (1 / depth)
    assert dis.gain_cascade(claim, [gain] * depth)[1].holds


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.05, 5.0), st.floats(-5.0, -0.05), st.integers(1, 4))
def test_proved_networks_satisfy_the_claim_and_the_bound_is_tight(seed, delta, nu, depth):
    claim = Indices(delta, nu)
    rng = np.random.default_rng(seed)
    gain = dis.allowed_gain_product(claim) ** (1 / depth)
    widths = rng.integers(1, 5, size=depth + 1)
    network = np.eye(widths[0])
    for inputs, outputs in itertools.pairwise(widths):
        slopes = rng.choice([0.1, 1.0], size=outputs)
        network = slopes[:, None] * with_norm(rng, (outputs, inputs), gain) @ network
    worst = dis.worst_supply(network, Sector.linear(), claim, draws=1)
    assert worst.supply >= -rounding(network, claim) * 10
    tight = -((1.01 * gain) ** depth) * np.eye(2)
    assert dis.worst_supply(tight, Sector.linear(), claim, draws=1).supply < 0


@settings(max_examples=40)
@given(st.lists(st.floats(0.02, 1.0), min_size=1, max_size=5), st.integers(0, 10**6))
def test_half_angles_of_acute_cones_add_exactly(shares, seed):
    rng = np.random.default_rng(seed)
    total = 0.9 * math.pi / 2
    angles = np.array(shares) / sum(shares) * total
    slopes = np.exp(rng.normal(size=len(angles)))

    def cone(angle, slope):
        low, high = math.tan(math.pi / 4 - angle / 2), math.tan(math.pi / 4 + angle / 2)
        return Indices.from_slopes(slope * low, slope * high)

    layers = [cone(*pair) for pair in zip(angles, slopes, strict=True)]
    weights = dis.cone_weights(layers)
    product = float(np.prod(slopes))
    assert dis.scaled_cascade(cone(total * (1 + 1e-5), product), layers, weights).holds
    assert not dis.scaled_cascade(cone(total * (1 - 1e-5), product), layers, weights).holds
    # Rotations by θ_l reach the boundary of every cone, and together that of the network's.
    rotation = product * np.array(
        [[math.cos(total), -math.sin(total)], [math.sin(total), math.cos(total)]]
    )
    narrower = cone(total * (1 - 1e-3), product)
    assert dis.worst_supply(rotation, Sector.linear(), narrower, draws=1).supply < 0


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_a_scaled_cascade_that_holds_is_semidefinite_and_implies_the_claim(seed, depth):
    rng = np.random.default_rng(seed)
    layers = [
        Indices(float(rng.uniform(0.2, 3.0)), -float(rng.uniform(0.05, 1.0))) for _ in range(depth)
    ]
    claim = Indices(float(rng.uniform(0.05, 1.0)), -float(rng.uniform(0.1, 6.0)))
    verdict = dis.scaled_cascade(claim, layers)
    papers = np.linalg.eigvalsh(-dis.cascade_matrix(claim, layers))[0]
    if papers > 1e-9:
        assert verdict.holds, "p = 1 works, so the search must find weights"
    if not verdict.holds:
        return
    assert exactly_semidefinite(claim, layers, verdict.weights)
    network = np.eye(2)
    for layer in layers:
        a, b = layer.slopes
        weight = with_norm(rng, (2, 2), (b - a) / 2) + (a + b) / 2 * np.eye(2)
        network = weight @ network
    assert dis.worst_supply(network, Sector.linear(), claim, draws=1).supply >= -1e-9


def test_unit_weights_lose_a_large_factor_against_scaled_ones():
    claim = Indices(0.4, -2.0)
    factors = [
        dis.allowed_gain_product(claim) / dis.unscaled_gain_product(claim, depth)
        for depth in (1, 2, 3)
    ]
    assert factors[0] == pytest.approx(1.0, abs=1e-6)
    assert factors[1] > 2.6
    assert all(later > 1.3 * before for before, later in itertools.pairwise(factors))


def test_a_residual_block_is_in_its_cone_and_no_smaller_one():
    rng = np.random.default_rng(0)
    for skip, gain in ((1.0, 0.5), (0.7, 0.69), (1.0, 2.0), (0.3, 0.0)):
        indices = dis.residual_indices(skip, gain)
        assert (indices.nu > 0) == (gain < skip)
        assert indices.slopes[1] == pytest.approx(skip + gain)
        for _ in range(20):
            weight = skip * np.eye(3) + (with_norm(rng, (3, 3), gain) if gain else 0.0)
            worst = dis.worst_supply(weight, Sector.linear(), indices, draws=1)
            assert worst.supply >= -rounding(weight, indices)
        beyond = (skip - 1.01 * gain - 1e-3) * np.eye(2)
        assert dis.worst_supply(beyond, Sector.linear(), indices, draws=1).supply < 0


@settings(max_examples=40)
@given(st.floats(0.05, 5.0), st.floats(-8.0, -0.6), st.integers(1, 6))
def test_automatic_indices_of_theorem_4_pass_the_papers_cascade(delta, nu, depth):
    claim = Indices(delta, nu)
    try:
        layers = dis.equal_diagonal_indices(claim, depth)
    except DesignInfeasible as refusal:
        (claim,) = refusal.nearest
        assert claim.nu < nu
        layers = dis.equal_diagonal_indices(claim, depth)
    assert np.linalg.eigvalsh(-dis.cascade_matrix(claim, layers))[0] >= -1e-12 * depth
    budgets = dis.theorem_4_budgets(layers, [LEAKY] * depth)
    assert min(budgets) > 0
    if depth < 2:
        return
    # No neighbour on the same diagonal has a larger product.
    d = math.cos(math.pi / (depth + 1))
    for index in range(1, depth):
        for factor in (0.9, 1.1):
            nus = [layer.nu for layer in layers]
            nus[index] *= factor
            if nus[index] >= -0.5:
                continue
            deltas = [d - after for after in nus[1:]] + [layers[-1].delta]
            moved = [Indices(*pair) for pair in zip(deltas, nus, strict=True)]
            product = math.prod(dis.theorem_4_budgets(moved, [LEAKY] * depth))
            assert product <= math.prod(budgets) * (1 + 1e-9)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.0, 3.0), st.floats(0.01, 1.0))
def test_fewer_outputs_than_inputs_never_satisfy_a_positive_nu(seed, delta, fraction):
    rng = np.random.default_rng(seed)
    nu = fraction * min(1.0, 0.25 / delta if delta > 0 else 1.0)
    outputs = int(rng.integers(1, 4))
    weight = rng.normal(size=(outputs, outputs + int(rng.integers(1, 4))))
    witness = dis.null_coordinate_counterexample(weight, LEAKY, Indices(delta, nu))
    assert witness.supply < 0
    assert dis.supply(witness.dx[None], witness.dy[None], Indices(delta, nu))[0] == witness.supply


def test_weights_of_the_cascade_must_be_positive_and_as_many_as_layers():
    layers = [Indices(1.0, -1.0)] * 2
    for weights in ([1.0], [1.0, 0.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="weights"):
            dis.scaled_cascade(Indices(0.5, -2.0), layers, weights)
    with pytest.raises(ValueError, match="layers"):
        dis.cascade_matrix(Indices(0.5, -2.0), [])
