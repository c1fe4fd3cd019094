"""Layer rules for minimal perturbations: sound ones hold, published ones have counterexamples."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov.theory import perturbation as rules
from tf_lyapunov.theory.operators import LinearMap, convolution_matrix

UNIT = 2.0**-53
FUNCTIONS = {
    "tanh": np.tanh,
    "sigmoid": lambda a: 0.5 * (1 + np.tanh(a / 2)),
    "softplus": lambda a: np.logaddexp(0, a),
    "log_sigmoid": lambda a: -np.logaddexp(0, -a),
}
SLOPES = {
    "tanh": lambda a: 1 - np.tanh(a) ** 2,
    "sigmoid": lambda a: FUNCTIONS["sigmoid"](a) * FUNCTIONS["sigmoid"](-a),
    "softplus": lambda a: FUNCTIONS["sigmoid"](a),
    "log_sigmoid": lambda a: FUNCTIONS["sigmoid"](-a),
}


def stack(seed, name, scale=1.0):
    rng = np.random.default_rng(seed)
    sizes = [int(v) for v in rng.integers(1, 6, rng.integers(2, 5))]
    weights = [scale * rng.normal(size=(b, a)) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    biases = [rng.normal(size=len(w)) for w in weights]
    return rng, weights, biases, [rules.Curvature.of(name)] * len(weights)


def evaluate(x, weights, biases, name):
    """Value and Jacobian."""
    jacobian = np.eye(len(x))
    for weight, bias in zip(weights, biases, strict=True):
        a = weight @ x + bias
        jacobian = SLOPES[name](a)[:, None] * (weight @ jacobian)
        x = FUNCTIONS[name](a)
    return x, jacobian


@pytest.mark.parametrize("name", FUNCTIONS)
def test_curvatures_bound_the_derivatives_and_are_reached(name):
    a = np.linspace(-8, 8, 200001)
    bend = np.abs(np.gradient(SLOPES[name](a), a)).max()
    curvature = rules.Curvature.of(name)
    assert SLOPES[name](a).max() <= curvature.slope * (1 + 4 * UNIT)
    # Central differences of step h fall short by O(h²).
    assert bend <= curvature.bend <= bend * (1 + 1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_no_point_moves_the_output_further_than_the_smooth_rule_allows(name, seed):
    rng, weights, biases, curvatures = stack(seed, name)
    x = rng.normal(size=weights[0].shape[1])
    hessians, lipschitz = rules.hessian_norm_bounds(weights, curvatures)
    value, jacobian = evaluate(x, weights, biases, name)
    norm = np.linalg.norm(jacobian, 2)
    for step in np.geomspace(1e-3, 10, 9):
        direction = rng.normal(size=len(x))
        if step < 0.1:  # the steepest direction comes nearest to the bound
            direction = np.linalg.svd(jacobian)[2][0]
        r = step * direction / np.linalg.norm(direction)
        moved = np.linalg.norm(evaluate(x + r, weights, biases, name)[0] - value)
        bound = rules.smooth_lower_bound(moved, norm, np.linalg.norm(hessians), lipschitz)
        assert bound <= step * (1 + 1e-9)  # `moved` itself is rounded
    assert np.linalg.norm(evaluate(x, weights, biases, name)[1], 2) <= lipschitz


def test_the_smooth_rule_is_tight_for_small_changes():
    weights, curvatures = [np.diag([2.0, 1.0])], [rules.Curvature.of("tanh")]
    hessians, lipschitz = rules.hessian_norm_bounds(weights, curvatures)
    kappa = 1e-6
    bound = rules.smooth_lower_bound(kappa, 2.0, np.linalg.norm(hessians), lipschitz)
    assert math.isclose(bound, kappa / 2, rel_tol=1e-5)
    assert rules.smooth_lower_bound(0.3, 0.0, 0.0, 0.0) == math.inf
    assert rules.smooth_lower_bound(0.0, 0.0, 0.0, 0.0) == 0.0


def test_the_output_rule_is_exact():
    rng = np.random.default_rng(0)
    weights, bias, h = rng.normal(size=(4, 3)), rng.normal(size=3), rng.normal(size=4)
    logits = h @ weights + bias
    label = int(np.argmax(logits))
    kappa = rules.output_lower_bound(logits[None], weights, [label])[0]
    found = []
    for other in set(range(3)) - {label}:
        w = weights[:, other] - weights[:, label]
        found.append(w * (logits[label] - logits[other]) / (w @ w))
    r = min(found, key=np.linalg.norm)
    assert math.isclose(kappa, np.linalg.norm(r), rel_tol=1e-11)
    assert kappa <= np.linalg.norm(r)
    moved = (h + r * (1 + 1e-9)) @ weights + bias
    assert np.argmax(moved) != label
    assert rules.output_lower_bound(logits[None], weights, [(label + 1) % 3])[0] == 0


@given(
    window=st.integers(1, 4), stride=st.integers(1, 4), dilation=st.integers(1, 3),
    seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_overlap_times_the_frobenius_norm_bounds_every_convolution(window, stride, dilation, seed):
    if stride > 1 and dilation > 1:
        stride = 1 if seed % 2 else stride
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(window, window, 1, 2))
    if seed % 3 == 0:
        kernel = np.ones_like(kernel)
    shape = (13, 13, 1)
    geometry = LinearMap(
        "conv", shape, strides=(stride,) * 2, dilation=(dilation,) * 2, padding="valid"
    )
    matrix = convolution_matrix(kernel, geometry).toarray()
    norm = np.linalg.norm(matrix, 2)
    assert norm <= rules.convolution_gain_bound(kernel, stride, dilation)


def test_the_published_convolution_rule_is_false():
    kernel, shape = np.ones((5, 5, 1, 1)), (28, 28, 1)
    geometry = LinearMap("conv", shape, strides=(1, 1), dilation=(1, 1), padding="valid")
    matrix = convolution_matrix(kernel, geometry).toarray()
    assert round(np.linalg.norm(matrix, 2) / np.linalg.norm(kernel), 2) == 4.86
    ones = matrix @ np.ones(28 * 28)
    assert round(np.linalg.norm(ones) / (np.linalg.norm(kernel) * 28), 2) == 4.29
    moved = np.linalg.norm(ones)
    assert rules.convolution_bound_as_published(moved, kernel) > 28  # yet r = 1 has norm 28
    assert moved / rules.convolution_gain_bound(kernel, 1) <= 28


def test_the_published_batch_normalization_rule_is_false():
    setting = {"gamma": [1.0, 0.01], "beta": [0.0, 0.0], "mean": [0.0, 0.0]}
    variance, epsilon, kappa = [1.0, 1.0], 0.0, 0.5
    claimed = rules.batch_normalization_bound_as_published(
        kappa, [1.0, 1.0], **setting, variance=variance, epsilon=epsilon
    )
    assert round(claimed) == 78
    # r = (0.5, 0) moves the output by exactly κ.
    gain = rules.batch_normalization_gain(setting["gamma"], variance, epsilon)
    assert math.isclose(kappa / gain, 0.5, rel_tol=1e-11) and kappa / gain <= 0.5


def test_the_published_pooling_rules_are_loose_or_false():
    # Max pooling: t × t outputs without overlap need no factor t.
    assert rules.pooling_bound_as_published(1.0, 12) == 1 / 12
    # Lp pooling with p = 1 over one window of 4 cells: x = 1 + r moves the output by 2‖r‖.
    assert rules.pooling_bound_as_published(1.0, 1, window=2, p=1) == 0.25
    assert math.isclose(1.0 / rules.lp_pooling_gain(1, 4, 1.0), 0.5, rel_tol=1e-11)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_the_lp_pooling_gain_is_reached_by_one_window(p):
    x = np.ones(4)
    gradient = np.abs(x) ** (p - 1) * np.sum(np.abs(x) ** p) ** (1 / p - 1)
    one = np.zeros(4)
    one[0] = 1.0  # for p ≥ 2 the steepest point
    slope = np.linalg.norm(gradient) if p < 2 else np.linalg.norm(one)
    assert math.isclose(rules.lp_pooling_gain(1, 4, p), slope, rel_tol=1e-11)


def response_jacobian(a, k, alpha, beta, half):
    """Jacobian of local response normalization over channels."""
    n = len(a)
    near = np.abs(np.arange(n)[:, None] - np.arange(n)[None]) <= half
    s = k + alpha * near @ a**2
    jacobian = -2 * alpha * beta * near * (a * s ** (-beta - 1))[:, None] * a[None]
    jacobian[np.diag_indices(n)] += s**-beta
    return jacobian, a * s**-beta


@given(
    seed=st.integers(0, 10**6), k=st.floats(0.5, 3), alpha=st.floats(0, 5),
    beta=st.floats(0.1, 2), half=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_jacobian_of_response_normalization_exceeds_its_gain(seed, k, alpha, beta, half):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=7) * 10 ** rng.uniform(-1, 1.5)
    norm = np.linalg.norm(response_jacobian(a, k, alpha, beta, half)[0], 2)
    window = 2 * half + 1
    assert norm <= rules.response_normalization_gain(k, alpha, beta, window) * (1 + 50 * UNIT)
    largest = np.abs(a).max()
    assert norm <= rules.response_normalization_gain(k, alpha, beta, window, largest)


def test_response_normalization_of_small_signals_reaches_its_gain():
    norm = np.linalg.norm(response_jacobian(np.full(5, 1e-6), 2.0, 1e-4, 0.75, 2)[0], 2)
    assert math.isclose(
        norm, rules.response_normalization_gain(2.0, 1e-4, 0.75, 5, 1e-6), rel_tol=1e-9
    )


def test_the_published_response_normalization_rule_is_false():
    # One large and one small channel: the claim comes from the small one, the output moves by the
    # large one.
    k, alpha, beta, window = 1.0, 1e-4, 0.75, 1
    a = np.array([30.0, 1e-3])
    output = response_jacobian(a, k, alpha, beta, 0)[1]
    r = np.array([1.0, 0.0])
    moved = response_jacobian(a + r, k, alpha, beta, 0)[1]
    kappa = np.linalg.norm(moved - output)
    claimed = rules.response_normalization_bound_as_published(kappa, a, k, alpha, beta, window)
    assert claimed > np.linalg.norm(r)
    assert kappa / rules.response_normalization_gain(k, alpha, beta, window) <= np.linalg.norm(r)


def test_entrywise_second_derivatives_do_not_imply_the_published_dense_theorem():
    # h(x) = (Σ x_i)²/2 has second derivatives 1 and a Hessian of norm d.
    d = 9
    r = np.full(d, 0.1)
    kappa = r.sum() ** 2 / 2
    assert rules.dense_bound_as_published(kappa, 0.0, 1.0, 1) > 2.9 * np.linalg.norm(r)
    assert rules.smooth_lower_bound(kappa, 0.0, float(d)) <= np.linalg.norm(r)


def test_the_published_curvature_of_tanh_is_half_the_true_one():
    _, bend = rules.CURVATURES_AS_PUBLISHED["tanh"]
    assert math.isclose(2 * bend, rules.Curvature.of("tanh").bend, rel_tol=1e-11)
    weights, x, r = [np.eye(1)], -1.0, 0.6
    kappa, slope = np.tanh(x + r) - np.tanh(x), 1 - np.tanh(x) ** 2
    m = rules.second_derivative_bound_as_published(weights, [(1.0, bend)])
    assert rules.dense_bound_as_published(kappa, slope, m, 1) > r
    assert rules.smooth_lower_bound(kappa, slope, rules.Curvature.of("tanh").bend) <= r


def test_the_published_curvature_of_relu_is_no_bound():
    x, r = -1e-9, 0.5  # slope 0 here, 1 behind the kink
    m = rules.second_derivative_bound_as_published([np.eye(1)], [(1.0, 1.0)])
    assert rules.dense_bound_as_published(max(x + r, 0), 0.0, m, 1) > 1.9 * r
    with pytest.raises(ValueError, match="No bound on the second derivative"):
        rules.Curvature.of("relu")


@pytest.mark.parametrize("name", ["sigmoid", "softplus"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_algorithm_4_1_bounds_hessian_norms_where_its_constants_are_right(name, seed):
    _, weights, _, curvatures = stack(seed, name)
    published = [rules.CURVATURES_AS_PUBLISHED[name]] * len(weights)
    bends, _ = rules.hessian_norm_bounds(weights, curvatures)
    assert bends.max() <= rules.second_derivative_bound_as_published(weights, published) * (
        1 + 1e-9
    )
