"""No sampled input contradicts `unsat`, and every `sat` stands up to rational arithmetic."""

from fractions import Fraction

import keras
import numpy as np
import pytest

from tf_lyapunov.vnnlib.deciding import decide
from tf_lyapunov.vnnlib.reading import parse
from tf_lyapunov.vnnlib.subjects import subject_of

DECLARED = "".join(f"(declare-const {v} Real)\n" for v in ("X_0", "X_1", "Y_0", "Y_1"))


def exact(weights, x):
    """The network in rational arithmetic."""
    first, a, second, b = ([[Fraction(float(v)) for v in np.ravel(r)] for r in np.atleast_2d(w)]
                           for w in weights)  # fmt: skip
    hidden = [
        max(sum(x[i] * first[i][k] for i in range(2)) + a[0][k], Fraction(0)) for k in range(5)
    ]
    return [sum(h * second[k][j] for k, h in enumerate(hidden)) + b[0][j] for j in range(2)]


def test_answers_stand_up_to_samples_and_to_rational_arithmetic():
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(5, "relu"), keras.layers.Dense(2)]
    )
    subject, answers = subject_of(model), []
    for seed in range(16):
        rng = np.random.default_rng(seed)
        weights = [rng.normal(size=w.shape).astype("float32") for w in model.get_weights()]
        model.set_weights(weights)
        low, width = rng.uniform(-1, 0, 2).round(2), rng.uniform(0.1, 1, 2).round(2)
        box = "".join(
            f"(assert (>= X_{i} {low[i]:.2f})) (assert (<= X_{i} {low[i] + width[i]:.2f}))"
            for i in range(2)
        )
        ends = [[Fraction(f"{v:.2f}") for v in end] for end in (low, low + width)]
        x = [[a + Fraction(int(rng.integers(0, 65)), 64) * (b - a)
              for a, b in zip(*ends, strict=True)] for _ in range(150)]  # fmt: skip
        y = [exact(weights, point) for point in x]
        # A threshold next to the largest sampled output: half of them just below, half above.
        highest = max(v[0] for v in y)
        shift = Fraction(1, 20) if seed % 2 else Fraction(-1, 20)
        bound = float(highest + shift)
        condition = f"(or (>= Y_0 {bound:.17f}) (and (< Y_1 Y_0) (>= Y_1 {bound:.17f})))"
        query = parse(f"{DECLARED}{box}(assert {condition})")
        found = decide(subject, query, timeout=20)
        answers.append(found.answer)
        if found.answer == "unsat":
            assert not any(query.holds(p, v) for p, v in zip(x, y, strict=True)), seed
        if found.answer == "sat":
            assert query.holds(found.x, found.y)
            assert query.holds(found.x, exact(weights, [Fraction(float(v)) for v in found.x]))
    assert answers.count("unsat") >= 3 and answers.count("sat") >= 6, answers


@pytest.mark.parametrize("dtype, answer", [("float64", "sat"), ("float16", "sat")])
def test_counterexamples_are_of_the_networks_own_type(dtype, answer):
    if dtype == "float64" and keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow computes in float64 unasked")
    keras.config.set_dtype_policy(dtype)
    try:
        layers = [keras.Input((2,), dtype=dtype), keras.layers.Dense(2, "relu")]
        model = keras.Sequential(layers)
    finally:
        keras.config.set_dtype_policy("float32")
    model.set_weights([np.eye(2), np.zeros(2)])
    text = DECLARED + "".join(f"(assert (<= X_{i} 0.1)) (assert (>= X_{i} 0))" for i in range(2))
    query = parse(f"{text}(assert (>= Y_0 0.09))")
    found = decide(subject_of(model), query, timeout=20)
    assert found.answer == answer and found.x.dtype == dtype and query.holds(found.x, found.y)


def test_other_types_are_refused():
    given = keras.Input((2,), dtype="int32")
    model = keras.Model(given, keras.layers.Dense(1)(keras.ops.cast(given, "float32")))
    with pytest.raises(ValueError, match="inputs of the types float16"):
        subject_of(model)


def test_behind_a_softmax_the_probabilities_are_meant():
    layers = [keras.Input((2,)), keras.layers.Dense(2, "softmax")]
    model = keras.Sequential(layers)
    model.set_weights([np.eye(2), np.zeros(2)])
    text = DECLARED + "".join(f"(assert (<= X_{i} 1)) (assert (>= X_{i} 0))" for i in range(2))
    # 1 / (1 + e^-1) = 0.73106 is the largest probability.
    for bound, answer in (("0.75", "unsat"), ("0.7", "sat")):
        query = parse(f"{text}(assert (>= Y_0 {bound}))")
        assert decide(subject_of(model), query, timeout=20).answer == answer
