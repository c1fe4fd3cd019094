"""The inequality of regions of attraction against its definition, its sectors, its files."""

import functools

import numpy as np
import pytest
from forging import array, forged

from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.verification import loopfiles, loops, verify
from tf_lyapunov.verification.around.chords import chords
from tf_lyapunov.verification.network import Network, Step
from tf_lyapunov.verification.operations import Activation, Linear

FUNCTIONS = [
    ("tanh", {}), ("relu", {}), ("relu", {"max_value": 2.0}),
    ("leaky_relu", {"negative_slope": 0.2}),
    ("elu", {}), ("selu", {}), ("gelu", {}), ("sigmoid", {}), ("silu", {}), ("softplus", {}),
    ("softsign", {}), ("mish", {}), ("hard_sigmoid", {}), ("linear", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), FUNCTIONS)
def test_chords_hold_all_chords_from_the_point(name, parameters):
    rng, operation, count = np.random.default_rng(0), Activation(name, parameters), 200
    point = rng.normal(size=count) * 2
    point[:40] = 0
    below, above = 10.0 ** rng.uniform(-2, 1, (2, count))
    below[40:60], above[60:80] = 0, 0
    doubt = np.where(rng.random(count) < 0.3, 1e-9, 0.0)
    low, high = point - below, point + above
    alpha, beta = chords(operation, point, doubt, low, high)
    least, largest = operation.slopes()
    assert np.all(alpha >= least) and np.all(beta <= largest)
    t = low + (high - low) * np.linspace(0, 1, 2001)[:, None]
    value = lambda v: operation.forward(v, np.zeros_like(v))[0]  # noqa: E731
    far = np.abs(t - point) > 1e-3 * (high - low)
    for at in (point, point + doubt):
        slope = np.divide(value(t) - value(at[None]), t - at, out=np.zeros_like(t), where=far)
        # Float64 differences over steps of 1e-5 at least.
        assert np.all(np.where(far, slope, np.inf) >= alpha - 1e-9)
        assert np.all(np.where(far, slope, -np.inf) <= beta + 1e-9)


def test_chords_of_tanh_are_narrower_than_its_slopes():
    one = np.ones(1)
    alpha, beta = chords(Activation("tanh", {}), 0 * one, 0 * one, -one, one)
    assert np.tanh(1) - 1e-3 < alpha[0] <= np.tanh(1) and beta[0] == 1.0


def chain_of(*sizes, seed=0, activation="tanh"):
    rng = np.random.default_rng(seed)
    steps = [Step("in", (), (sizes[0],), None)]
    for k, (n, m) in enumerate(zip(sizes, sizes[1:], strict=False)):
        dense = Linear(rng.normal(size=(m, n)) / np.sqrt(n), 0.3 * rng.normal(size=m))
        steps.append(Step(f"dense{k}", (steps[-1].name,), (m,), dense))
        if k < len(sizes) - 2:
            steps.append(Step(f"act{k}", (steps[-1].name,), (m,), Activation(activation, {})))
    return loops.controller_of(Network(tuple(steps), steps[-1].name, ()))


def plant_of(n, inputs, rng, kinds=(loops.SINE,)):
    count = len(kinds)
    return loops.Plant(
        rng.normal(size=(n, n)) / n, rng.normal(size=(n, inputs)), rng.normal(size=(n, count)),
        rng.normal(size=(count, n)), np.array(kinds), np.tile([0.0, 2.0, np.inf], (count, 1)),
    )  # fmt: skip


def signals(chain, x):
    """`(v - v⁰, w - w⁰)` of all units, and u, of states (m, n)."""
    moved, ins, outs = x, [], []
    for weight, operation, rest in zip(
        chain.weights[:-1], chain.activations, chain.rests, strict=True
    ):
        ins.append(moved @ weight.T)
        at = np.broadcast_to(rest, ins[-1].shape)
        value = lambda v, f=operation: f.forward(v, np.zeros_like(v))[0]  # noqa: E731
        moved = value(at + ins[-1]) - value(at)
        outs.append(moved)
    return np.concatenate(ins, 1), np.concatenate(outs, 1), moved @ chain.weights[-1].T


@pytest.mark.parametrize("activation", ["tanh", "gelu", "elu"])
@pytest.mark.parametrize("sizes", [(2, 5, 1), (3, 4, 6, 2), (2, 3, 4, 3, 1)])
def test_the_form_is_that_of_its_definition_and_sectors_hold_on_the_set(sizes, activation):
    rng = np.random.default_rng(1)
    n = sizes[0]
    chain = chain_of(*sizes, activation=activation)
    plant = plant_of(n, sizes[-1], rng, (loops.SINE, loops.STATED))
    box = rng.uniform(0.3, 1.5, n)
    first = rng.uniform(0.1, 0.8, sizes[1])
    form = loops.form_on(plant, chain, box, first, np.full(2, np.inf))
    x = rng.uniform(-1, 1, (4000, n)) * box
    x = x[np.all(np.abs(x @ chain.weights[0].T) <= form.widths[n:-2], axis=1)]
    assert len(x) > 20
    v, w, u = signals(chain, x)
    s = x @ plant.reads.T
    q = s - np.sin(s)
    xi = np.concatenate([x, w, q], axis=1)
    after = x @ plant.a.T + u @ plant.b.T + q @ plant.enters.T
    np.testing.assert_allclose(xi @ form.motion.T, after, atol=1e-12)
    np.testing.assert_allclose(xi @ form.signal.T, v, atol=1e-12)
    sector = (w - form.alpha * v) * (form.beta * v - w)
    assert np.min(sector) >= -1e-12
    gaps = (q - form.low * s) * (form.high * s - q)
    assert np.min(gaps) >= -1e-12
    shape = np.cov(rng.normal(size=(n, 9)))
    lam, mu = rng.random(w.shape[1]), rng.random(2)
    matrix, error = form.matrix(shape, 0.9, lam, mu)
    value = lambda y: np.einsum("ij,jk,ik->i", y, shape, y)  # noqa: E731
    wanted = 0.9 * value(x) - value(after) - sector @ lam - gaps @ mu
    got = np.einsum("ij,jk,ik->i", xi, matrix, xi)
    np.testing.assert_allclose(got, wanted, atol=1e-11)
    assert np.all(error >= 0) and np.max(error) < 1e-10


def test_the_sine_has_its_sector_on_every_width():
    for width in [1e-6, 1e-3, 0.5, 2.0, 3.0, 3.1, 4.0, 100.0]:
        one = np.eye(1)
        plant = loops.Plant(one, one, one, one, np.array([loops.SINE]), np.ones((1, 3)))
        low, high = plant.sectors_on([width])
        s = np.linspace(-width, width, 20_001)
        s = s[np.abs(s) > 1e-4 * width]
        # s - sin s of small arguments by its series, where the difference cancels.
        slope = np.where(np.abs(s) < 1e-2, s * s / 6 - s**4 / 120, 1 - np.sin(s) / s)
        assert low[0] <= np.min(slope) and np.max(slope) <= high[0] <= np.max(slope) * 1.5 + 1e-12
    assert high[0] == pytest.approx(1.217233628, abs=1e-5)


def test_zero_biases_leave_no_doubt_about_the_value_at_rest():
    chain = chain_of(2, 3, 1)
    assert loopfiles.offset_of(chain)[1]
    for name in ("tanh", "relu", "gelu"):
        dense = [Linear(np.ones((2, 2)), np.zeros(2)), Linear(np.ones((1, 2)), np.zeros(1))]
        steps = (
            Step("in", (), (2,), None), Step("a", ("in",), (2,), dense[0]),
            Step("b", ("a",), (2,), Activation(name, {})), Step("c", ("b",), (1,), dense[1]),
        )  # fmt: skip
        assert loopfiles.offset_of(loops.controller_of(Network(steps, "c", ()))) == (0.0, False)


# Files ------------------------------------------------------------------------------------------


@functools.cache
def loop():
    pytest.importorskip("cvxpy")
    import keras

    from tf_lyapunov.control import Plant, SineGap, region_of_attraction

    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(2, "tanh", use_bias=False),
            keras.layers.Dense(1, use_bias=False),
        ]
    )
    model.set_weights([np.array([[0.9, 0.3], [0.1, 0.4]]), np.array([[-1.0], [-0.5]])])
    plant = Plant([[1.1, 0.1], [0.0, 0.9]], [1.0, 0.3], gaps=[SineGap([1, 0], [0.0, 0.1])])
    return model, region_of_attraction(plant, model, [2.0, 2.0])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("loops") / "region.npz"
    loop()[1].save(path)
    return path


def test_a_region_is_written_and_verified(file):
    found = verify(file, loop()[0])
    assert found.holds and "VERIFIED: region of attraction" in str(found)
    assert found.radius == loop()[1].radius and found.fields()["rate"] == loop()[1].rate
    assert verify(file, loop()[0]).claim.shape.shape == (2, 2)


@pytest.mark.parametrize(
    "change",
    [
        array("shape", lambda p: p * 0.9),
        array("shape", lambda p: np.diag(np.diag(p)) * 0.5),
        array("rate", lambda r: r * 0.9),
        array("lam", lambda v: v * 0),
        array("lam", lambda v: v[:-1]),
        array("mu", lambda v: v * 100),
        array("plant_a", lambda a: a * 1.2),
        array("plant_b", lambda b: -b),
        array("box", lambda b: b * 0.5),
        array("first", lambda d: d * 0.5),
        array("first", lambda d: d[:-1]),
    ],
)
def test_other_regions_do_not_hold(file, change):
    assert forged(file, lambda h, a: None, loop()[0]).holds
    found = forged(file, change, loop()[0])
    assert not found.holds and found.reasons and "NOT VERIFIED" in str(found) and found.radius == 0


@pytest.mark.parametrize(
    "change",
    [
        array("shape", lambda p: p * np.nan),
        array("shape", lambda p: p + np.triu(np.ones((2, 2)), 1)),
        array("rate", lambda r: r + 1),
        array("lam", lambda v: -v),
        array("box", lambda b: b * np.inf),
        array("trim", lambda t: t + 2),
        array("plant_kinds", lambda k: k + 5),
        array("plant_a", lambda a: a[:1]),
        array("plant_sectors", lambda s: s[:, ::-1] - 9),
    ],
)
def test_files_of_another_form_are_refused(file, change):
    with pytest.raises(ProofFileError):
        forged(file, change, loop()[0])


def test_another_controller_is_refused(file):
    model = loop()[0]
    kept = model.get_weights()
    model.set_weights([w * 0.5 for w in kept])
    try:
        assert not verify(file, model).holds
        with pytest.raises(ValueError, match="may have changed"):
            loop()[1].save(file)
    finally:
        model.set_weights(kept)
