"""Designs: what is proved, for which weights, and what is refused."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov.design import Design, equal_gain_design, spectral_design
from tf_lyapunov.errors import DesignInfeasible
from tf_lyapunov.theory import dissipativity as dis
from tf_lyapunov.theory.sectors import Indices, Sector

U = 2.0**-53
LEAKY = Sector(0.1, 1.0)
RELU = Sector(0.0, 1.0)


def random_network(rng, sectors, weights):
    """Product of the layers' linear pieces with random slopes: one Jacobian of a network."""
    network = np.eye(weights[0].shape[1])
    for sector, weight in zip(sectors, weights, strict=True):
        slopes = rng.choice([sector.alpha, sector.beta], size=weight.shape[0])
        network = slopes[:, None] * weight @ network
    return network


def worst(network, claim):
    return dis.worst_supply(network, Sector.linear(), claim, draws=1).supply


def scaled_to(weight, sigma):
    return weight * (sigma / np.linalg.norm(weight, 2))


claims = st.builds(Indices, st.floats(0.05, 20.0), st.floats(-20.0, -0.01))
sector_lists = st.lists(
    st.sampled_from([LEAKY, RELU, Sector.linear(), Sector(-0.13, 1.13)]), min_size=1, max_size=6
)


@settings(max_examples=40)
@given(claims, sector_lists, st.integers(0, 10**6))
def test_sound_designs_are_proved_use_the_whole_product_and_hold(claim, sectors, seed):
    design = spectral_design(claim, sectors)
    assert design.is_proved and design.verdict == "PROVED" and design.rule == "sound"
    gains = [b * s.magnitude for b, s in zip(design.budgets, sectors, strict=True)]
    allowed = dis.allowed_gain_product(claim)
    assert allowed * (1 - 1e-6) <= math.prod(gains) < allowed
    assert design.check(design.budgets).holds
    rng = np.random.default_rng(seed)
    widths = rng.integers(1, 5, size=len(sectors) + 1)
    weights = [
        scaled_to(rng.normal(size=(o, i)), budget)
        for i, o, budget in zip(widths[:-1], widths[1:], design.budgets, strict=True)
    ]
    network = random_network(rng, sectors, weights)
    assert worst(network, claim) >= -1e3 * U * (1 + claim.delta + abs(claim.nu)) * allowed**2 - (
        1e3 * U * (1 + abs(claim.nu))
    )


@settings(max_examples=30)
@given(claims, sector_lists)
def test_budgets_one_percent_larger_admit_a_violating_network(claim, sectors):
    design = spectral_design(claim, sectors)
    factor = 1.01 ** (1 / len(sectors))
    sigmas = [factor * budget for budget in design.budgets]
    assert not design.check(sigmas).holds
    assert design.check(sigmas).margin < 0
    steepest = math.prod(s.magnitude * b for s, b in zip(sectors, sigmas, strict=True))
    assert worst(-steepest * np.eye(2), claim) < 0


def test_weights_split_the_product():
    design = spectral_design(
        Indices(0.4, -2.0), [LEAKY, RELU, Sector(0.0, 0.25)], weights=[4, 2, 1]
    )
    gains = [b * s.magnitude for b, s in zip(design.budgets, design.sectors, strict=True)]
    assert gains[0] / gains[1] == pytest.approx(2.0)
    assert gains[1] / gains[2] == pytest.approx(2.0)
    assert math.prod(gains) == pytest.approx(dis.allowed_gain_product(design.claim), rel=1e-6)
    for weights in ([1, 1], [1, 1, 0], [1, 1, math.nan]):
        with pytest.raises(ValueError, match="weights"):
            spectral_design(Indices(0.4, -2.0), [RELU] * 3, weights=weights)


def test_deep_designs_are_proved_too():
    design = spectral_design(Indices(0.4, -2.0), [RELU] * 60)
    assert design.is_proved
    product = math.prod(design.budgets)
    assert product == pytest.approx(dis.allowed_gain_product(design.claim), rel=1e-5)


# Cones.


@settings(max_examples=30)
@given(
    st.floats(0.05, 5.0),
    st.floats(0.0, 0.9),
    st.lists(st.floats(0.7, 1.0), min_size=1, max_size=4),
    st.integers(0, 10**6),
)
def test_conic_designs_are_sound_for_weights_on_the_spheres(delta, fraction, alphas, seed):
    claim = Indices(delta, fraction * 0.25 / delta)
    sectors = [Sector(alpha, 1.0) for alpha in alphas]
    try:
        design = spectral_design(claim, sectors)
    except DesignInfeasible as refusal:
        assert refusal.nearest
        return
    assert design.rule == "conic" and design.is_proved
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 4))
    weights = []
    for (center, radius), budget in zip(design.balls, design.budgets, strict=True):
        assert budget >= center + radius
        weights.append(center * np.eye(n) + scaled_to(rng.normal(size=(n, n)), 1.0) * radius)
    for _ in range(10):
        network = random_network(rng, sectors, weights)
        size = 1 + delta * np.linalg.norm(network, 2) ** 2 + np.linalg.norm(network, 2)
        assert worst(network, claim) >= -1e3 * U * size
    check = design.check(design.budgets, distances=[radius for _, radius in design.balls])
    assert check.holds and check.gain_upper_bound <= design.gain


def test_conic_designs_fill_the_claims_angle():
    # Linear layers turned by their whole half-angle reach the claim's boundary.
    claim = Indices.from_slopes(0.2, 2.0)
    design = spectral_design(claim, [Sector.linear()] * 3)
    network = np.eye(2)
    for center, radius in design.balls:
        # The tangent point of the cone: W = √(c²-v²)·rotation.
        angle, size = math.asin(radius / center), math.sqrt(center**2 - radius**2)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        assert np.linalg.norm(size * turn - center * np.eye(2), 2) <= radius * (1 + 1e-12)
        network = size * turn @ network
    assert 0 <= worst(network, claim) <= 1e-9
    narrower = Indices(claim.delta, claim.nu * 1.001)
    assert worst(network, narrower) < 0


def test_conic_claims_need_distances():
    design = spectral_design(Indices.from_slopes(0.1, 2.0), [Sector(0.8, 1.0)] * 2)
    small = design.check([0.1, 0.1])
    assert not small.holds and "distances" in small.reason
    assert small.gain_upper_bound == pytest.approx(0.01)
    radii = [radius for _, radius in design.balls]
    assert design.check(design.budgets, distances=radii).holds
    outside = [radii[0] * 1.001, radii[1]]
    assert not design.check(design.budgets, distances=outside).holds
    assert design.check(design.budgets, distances=outside).margin < 0
    assert not design.check(design.budgets, [2.0, 1.0], distances=radii).holds


@pytest.mark.parametrize(
    ("claim", "sectors"),
    [
        (Indices(0.89, 0.28), [RELU]),
        (Indices(0.89, 0.28), [LEAKY, LEAKY, Sector.linear()]),
        (Indices(0.89, 0.0), [RELU, RELU]),
        (Indices(0.89, 0.2), [Sector(0.7, 1.0)] * 4),
        (Indices(0.5, 0.5), [Sector.linear()] * 2),
    ],
)
def test_infeasible_cones_are_refused_with_feasible_neighbours(claim, sectors):
    with pytest.raises(DesignInfeasible, match="Nearest") as refusal:
        spectral_design(claim, sectors)
    assert refusal.value.nearest
    for neighbour in refusal.value.nearest:
        assert spectral_design(neighbour, sectors).is_proved


def test_unequal_widths_are_refused_for_nu_not_negative():
    with pytest.raises(DesignInfeasible, match="width") as refusal:
        spectral_design(Indices(1.0, 0.1), [Sector.linear()] * 2, widths=[4, 4, 2])
    for neighbour in refusal.value.nearest:
        assert spectral_design(neighbour, [Sector.linear()] * 2, widths=[4, 4, 2]).is_proved
    assert spectral_design(Indices(1.0, 0.1), [Sector.linear()] * 2, widths=[4, 4, 4]).is_proved


# Plain gains.


@settings(max_examples=20)
@given(st.floats(1e-3, 1e3), sector_lists)
def test_plain_gains_are_proved_by_the_product(gain, sectors):
    design = equal_gain_design(gain, sectors)
    assert design.is_proved and design.gain == gain
    product = math.prod(b * s.magnitude for b, s in zip(design.budgets, sectors, strict=True))
    assert gain * (1 - 1e-6) <= product <= gain * (1 + 10 * U)
    assert design.gain_upper_bound <= gain
    assert design == spectral_design(gain=gain, sectors=sectors)
    check = design.check(design.budgets)
    assert check.holds and check.margin >= 0 and check.gain_upper_bound <= gain
    assert not design.check([1.01 * b for b in design.budgets]).holds


def test_post_gains_count():
    design = equal_gain_design(1.0, ["relu", "linear"])
    assert design.check([0.5, 1.0], [2.0, 1.0]).holds
    assert not design.check([0.5, 1.1], [2.0, 1.0]).holds
    assert design.check([0.5, 1.0], [2.0, 1.0]).gain_upper_bound == 1.0


# Checks.


@settings(max_examples=60)
@given(claims, st.lists(st.floats(0.0, 3.0), min_size=3, max_size=3))
def test_a_check_holds_exactly_when_the_product_is_small_enough(claim, sigmas):
    design = spectral_design(claim, [LEAKY, RELU, Sector.linear()])
    check = design.check(sigmas)
    product, allowed = math.prod(sigmas), dis.allowed_gain_product(claim)
    assert check.gain_upper_bound >= min(product, claim.gain) * (1 - 10 * U)
    if product > allowed * (1 + 1e-12):
        assert not check.holds and check.margin < 0
    elif product < allowed * (1 - 1e-6) and min(sigmas) > 1e-6:
        assert check.holds and check.margin > 0
    for sigma, layer in zip(sigmas, check.indices, strict=True):
        assert dis.gain_rule_holds(sigma, Sector.linear(), layer)


@pytest.mark.parametrize(
    "sigmas", [[1.0], [1.0, math.nan], [1.0, math.inf], [1.0, -0.1], [1.0, 1.0, 1.0]]
)
def test_bad_measurements_are_refused(sigmas):
    with pytest.raises(ValueError, match="Received"):
        spectral_design(Indices(0.4, -2.0), [LEAKY] * 2).check(sigmas)


def test_untrained_layers_of_zeros_satisfy_gain_claims():
    assert spectral_design(Indices(0.4, -2.0), [LEAKY] * 2).check([0.0, 1.0]).holds


# Published rules.


def test_theorem_4_designs_are_proved_and_explained():
    design = spectral_design(Indices(0.4, -2.0), [LEAKY, LEAKY, Sector.linear()], "dissipativity")
    assert design.is_proved and design.variant == "theorem_4"
    assert design.cascade_margin >= 0
    sound = spectral_design(design.claim, design.sectors)
    assert math.prod(design.budgets) < math.prod(sound.budgets)
    assert "PROVED" in design.explain()


@pytest.mark.parametrize("s", [0.0, 0.3, 0.6])
def test_singular_values_enlarge_theorem_4_but_never_beyond_the_norm_rule(s):
    layers, sectors = [Indices(0.5, -1.9)], [Sector(0.5, 1.0)]
    design = spectral_design(
        Indices(0.5, -1.9),
        sectors,
        "dissipativity",
        layer_indices=layers,
        smallest_singular_values=[s],
    )
    plain = spectral_design(Indices(0.5, -1.9), sectors, "dissipativity", layer_indices=layers)
    assert design.is_proved and design.layer_proofs == ("norm rule (2.1)",)
    assert (design.budgets[0] > plain.budgets[0]) == (s > 0)
    assert s < design.budgets[0] <= dis.gain_budget(layers[0], sectors[0])
    with pytest.raises(DesignInfeasible):  # s above the bound it leads to
        spectral_design(
            Indices(0.5, -1.9),
            sectors,
            "dissipativity",
            layer_indices=layers,
            smallest_singular_values=[1.3],
        )


def test_get_indexes_designs_are_never_called_proved_by_their_formula():
    claim, layers = Indices(0.525, -0.476), [Indices(0.525, -0.476)]
    design = spectral_design(
        claim, [LEAKY], "dissipativity", variant="get_indexes", layer_indices=layers
    )
    assert design.budgets[0] == pytest.approx(1.454, abs=1e-3)
    assert not design.is_proved and design.layer_proofs == (None,)
    assert worst(-design.budgets[0] * np.eye(2), claim) < 0
    with pytest.raises(DesignInfeasible):
        spectral_design(
            Indices(0.4, -2.0), [Sector.linear()], "dissipativity", variant="get_indexes"
        )


@pytest.mark.parametrize("variant", ["closed_form", "remark_4"])
def test_lyapunov_designs_are_not_proved(variant):
    claim = Indices(0.89, 0.28) if variant == "closed_form" else Indices(0.89, -2.0)
    design = spectral_design(claim, [LEAKY] * 3, "lyapunov", variant=variant)
    assert design.verdict == "NOT_PROVED"
    assert "converse" in design.explain()
    assert not design.check(design.budgets).holds
    rooted = spectral_design(claim, [LEAKY] * 3, "lyapunov", variant=variant, square_root=True)
    np.testing.assert_allclose(np.square(rooted.budgets), design.budgets, rtol=1e-12)


def test_small_published_budgets_are_proved_by_their_product():
    # Theorem 2's budgets happen to be small enough here; the proof does not use Theorem 2.
    claim = Indices(0.05, -30.0)
    design = spectral_design(
        claim, [LEAKY] * 2, "lyapunov", layer_indices=[Indices(3.0, -1.0), Indices(3.0, -1.0)]
    )
    assert math.prod(design.budgets) < dis.allowed_gain_product(claim)
    assert design.is_proved


@pytest.mark.parametrize(
    ("rule", "claim", "options"),
    [
        ("lyapunov", Indices(0.5, -0.1), {}),
        ("lyapunov", Indices(0.5, 0.1), {"variant": "remark_4"}),
        ("dissipativity", Indices(0.5, -0.3), {}),
        ("dissipativity", Indices(0.5, 0.1), {}),
    ],
)
def test_published_rules_refuse_with_claims_that_they_accept(rule, claim, options):
    with pytest.raises(DesignInfeasible) as refusal:
        spectral_design(claim, [LEAKY] * 3, rule, **options)
    assert refusal.value.nearest
    for neighbour in refusal.value.nearest:
        spectral_design(neighbour, [LEAKY] * 3, rule, **options)


def test_explicit_indices_of_the_sound_rule_are_checked_not_trusted():
    layers = [Indices(1.0, -0.6)] * 2
    proved = spectral_design(Indices(0.2, -1.0), [LEAKY] * 2, layer_indices=layers)
    assert proved.is_proved
    assert proved.budgets == pytest.approx((dis.gain_budget(layers[0], LEAKY),) * 2)
    lost = spectral_design(Indices(0.2, -0.1), [LEAKY] * 2, layer_indices=layers)
    assert lost.verdict == "NOT_PROVED"
    with pytest.raises(DesignInfeasible, match="nu >= 0") as refusal:
        spectral_design(Indices(0.2, -1.0), [LEAKY], layer_indices=[Indices(1.0, 0.1)])
    for neighbour in refusal.value.nearest:
        assert spectral_design(neighbour, [LEAKY]).is_proved


# Bad input and files.


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((Indices(0.0, -1.0), [LEAKY]), {}, "positive"),
        ((Indices(0.4, -2.0), []), {}, "at least one"),
        ((Indices(0.4, -2.0), [LEAKY], "magic"), {}, "rule"),
        ((Indices(0.4, -2.0), [LEAKY] * 3), {"layer_indices": [Indices(1.0, -1.0)]}, "per layer"),
        ((Indices(0.4, -2.0), [LEAKY], "lyapunov"), {"weights": [1.0]}, "weights"),
        ((Indices(0.4, -2.0), [LEAKY]), {"variant": "closed_form"}, "variant"),
        ((Indices(0.4, -2.0), [LEAKY]), {"gain": 1.0}, "not both"),
        ((None, [LEAKY]), {"gain": -1.0}, "positive"),
        ((Indices(0.4, -2.0), [Sector(0.0, 0.0)]), {}, "constant"),
        ((Indices(0.4, -2.0), [LEAKY], "conic"), {}, "nu >= 0"),
        ((Indices(0.4, -2.0), [Sector(-0.1, 1.0)], "dissipativity"), {}, "Layer 1"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        spectral_design(*arguments, **options)


@pytest.mark.parametrize(
    "design",
    [
        spectral_design(Indices(0.4, -2.0), [LEAKY, RELU]),
        spectral_design(Indices.from_slopes(0.1, 2.0), [Sector(0.8, 1.0)] * 2),
        spectral_design(Indices(0.89, 0.28), [LEAKY] * 3, "lyapunov"),
        spectral_design(Indices(0.4, -2.0), [LEAKY] * 3, "dissipativity"),
        equal_gain_design(1.31, [RELU] * 3),
    ],
    ids=lambda design: design.rule,
)
def test_designs_survive_json_bit_for_bit(design):
    again = Design.from_json(design.to_json())
    assert again == design
    assert again.verdict == design.verdict
    assert again.scaled_margin == design.scaled_margin
    assert again.to_json() == design.to_json()
    assert np.array_equal(again.cascade_matrix, design.cascade_matrix)


@pytest.mark.parametrize("rule", ["sound", "conic", "gain"])
def test_a_verdict_in_a_file_is_never_believed(rule):
    design = {
        "sound": lambda: spectral_design(Indices(0.4, -2.0), [LEAKY, RELU]),
        "conic": lambda: spectral_design(Indices.from_slopes(0.1, 2.0), [Sector(0.8, 1.0)] * 2),
        "gain": lambda: equal_gain_design(1.0, [RELU] * 2),
    }[rule]()
    record = json.loads(design.to_json())
    if rule == "conic":
        record["balls"][0][1] *= 1.01
    else:
        record["budgets"][0] *= 1.01
    assert record["derived"]["verdict"] == "PROVED"
    assert Design.from_json(json.dumps(record)).verdict == "NOT_PROVED"


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "tf_lyapunov.design/1"}'])
def test_files_that_are_no_designs_are_refused(text):
    with pytest.raises(ValueError, match="design"):
        Design.from_json(text)


def test_the_cascade_matrix_of_a_design_cannot_be_changed():
    design = spectral_design(Indices(0.4, -2.0), [LEAKY])
    with pytest.raises(ValueError, match="read-only"):
        design.cascade_matrix[0, 0] = 1.0
