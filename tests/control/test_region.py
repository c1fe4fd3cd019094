"""Regions of attraction: proved, attacked, compared with exact ones, refused."""

import keras
import numpy as np
import pytest
from loops_at_hand import FEEDBACK, network, pendulum, regulator

from tf_lyapunov.control import Plant, SectorGap, SineGap, region_of_attraction
from tf_lyapunov.errors import UnsupportedLayerError

pytest.importorskip("cvxpy")

SCALAR = Plant([[1.2]], [1.0])


@pytest.fixture(scope="module")
def found():
    return region_of_attraction(pendulum(), regulator(), [2.5, 6.0])


@pytest.fixture(scope="module")
def scalar():
    return region_of_attraction(SCALAR, network([[[1.0]], [[-1.0]]]), [10.0], radius=4.0)


def test_the_pendulum_has_a_region_inside_its_box_that_no_trajectory_leaves(found):
    assert found and np.all(found.half_widths <= [2.5, 6.0]) and 0 < found.rate < 1
    attacked = found.attack(2000, steps=200)
    assert not np.any(attacked.left) and attacked.rate <= found.rate
    values = np.einsum("ij,jk,ik->i", attacked.starts, found.matrix, attacked.starts)
    np.testing.assert_allclose(values, 1.0, rtol=1e-12)
    rng = np.random.default_rng(0)
    inside = rng.uniform(-1, 1, (4000, 2)) * found.half_widths
    inside = inside[found.contains(inside)]
    from tf_lyapunov.control import simulation

    again = simulation.attack(
        found.plant, found._control(), found.matrix, found.rate, found.box, inside, 200
    )
    assert len(inside) > 2000 and not np.any(again.left)
    assert "left 0" in repr(attacked) and "PROVED" in repr(found) and "exact" in found.explain()


@pytest.mark.slow
def test_no_trajectory_of_a_hundred_thousand_leaves(found):
    assert not np.any(found.attack(100_000, steps=300).left)


@pytest.mark.parametrize("seed", [0, 2, 9])
def test_what_a_solver_finds_at_its_tolerance_is_looked_for_again_with_more_room(seed):
    """Stabilising lane keepers, of which the first candidate's inequality cannot be verified."""
    lane = Plant(
        [[1, 0.02, 0, 0], [0, 0.90274594, 2.72311377, 0.02359491], [0, 0, 1, 0.02],
         [0, 0.01876357, -0.52538, 0.85651442]],
        [[0], [1.47532934], [0], [1.16150571]],
    )  # fmt: skip
    gain = np.array([[0.20063337, 0.05771352, 1.25833264, 0.10555406]])
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(4, 8)) * [[0.1], [0.1], [0.3], [0.1]] * 10 ** rng.uniform(-1.5, 0)
    last = np.linalg.lstsq(first, -gain.T, rcond=None)[0]
    assert np.max(np.abs(np.linalg.eigvals(lane.state - lane.input @ gain))) < 1
    region = region_of_attraction(lane, network([first.T, last.T]), [2.0, 3.0, 0.4, 2.0])
    assert region and not np.any(region.attack(500, steps=200).left)


def test_the_region_is_half_of_what_simulations_see_in_the_box(found):
    compared = found.compare(4000)
    assert np.all(compared.stayed[compared.inside]) and 0.5 <= compared.share <= 1


def test_the_volume_and_the_inner_ball_are_those_of_the_matrix(found):
    values = np.linalg.eigvalsh(found.matrix)
    assert found.volume == pytest.approx(np.pi / np.sqrt(np.prod(values)))
    assert found.radius <= 1 / np.sqrt(values[-1]) <= found.radius * (1 + 1e-9)
    assert found.contains([found.radius * 0.999, 0.0]) and not found.contains([2.4, 5.9])


def test_a_scalar_loop_comes_close_to_its_exact_region(scalar):
    # 1.2x - tanh x = x at the unstable equilibrium x = 5 tanh x.
    limit = 5.0
    for _ in range(50):
        limit = 5 * np.tanh(limit)
    assert 0.9 * limit < scalar.half_widths[0] < limit
    assert scalar.radius == pytest.approx(scalar.half_widths[0])
    assert not np.any(scalar.attack(50).left)


def test_a_claimed_ball_is_proved_or_the_nearest_is_named(scalar):
    assert scalar.verdict == "PROVED" and scalar.radius >= 4.0
    model = network([[[1.0]], [[-1.0]]])
    short = region_of_attraction(SCALAR, model, [5.5], radius=6.0)
    assert short.verdict == "NOT_PROVED" and "radius 6" in short.reason
    assert f"radius={short.radius:.3f}"[:-1] in short.nearest


def test_a_controller_that_does_not_stabilise_is_told_so():
    weak = region_of_attraction(SCALAR, network([[[1.0]], [[-0.1]]]), [1.0])
    assert not weak and "spectral radius 1.1" in weak.reason and weak.matrix is None
    assert weak.volume == 0 and not weak.contains([0.0]) and "NOT_PROVED" in repr(weak)
    with pytest.raises(ValueError, match="needs a region"):
        weak.attack()


def test_sectors_that_are_too_wide_name_how_wide_they_may_be():
    # The two units are one line, which sectors of each alone cannot know.
    loose = region_of_attraction(SCALAR, network([[[1.0], [-1.0]], [[-1.2, 1.2]]], "relu"), [1.0])
    assert not loose and "Nearest feasible claim" in loose.nearest and "%" in loose.nearest


def test_linear_controllers_and_plants_have_their_whole_ellipsoid():
    found = region_of_attraction(Plant([[1.2, 0], [0, 0.5]], [1.0, 0]), network([[[-1.0, 0.0]]]),
                                 [2.0, 3.0])  # fmt: skip
    np.testing.assert_allclose(found.half_widths, [2.0, 3.0], rtol=1e-3)
    assert found.rate < 0.26  # 0.5² of the slower state


def test_stated_sectors_are_assumptions_and_end_at_their_width():
    gap = SectorGap([1.0], [0.1], low=0.0, high=1.0, width=3.0, function=np.tanh)
    model = network([[[1.0]], [[-1.0]]])
    found = region_of_attraction(Plant([[1.2]], [1.0], gaps=[gap]), model, [4.0])
    assert found and "stated sector" in found.explain() and not np.any(found.attack(20).left)
    assert found.half_widths[0] <= 3.0


def test_an_offset_is_refused_or_taken_off():
    model = network([[[1.0]], [[-1.0]]], biases=[[0.1], [0.0]])
    with pytest.raises(ValueError, match=r"π\(0\)"):
        region_of_attraction(SCALAR, model, [10.0])
    found = region_of_attraction(SCALAR, model, [10.0], trim=True)
    assert found and found.offset == pytest.approx(np.tanh(0.1)) and "taken off" in found.explain()
    assert not np.any(found.attack(20).left)


def test_a_saturated_input_is_part_of_the_controller():
    # sat(-x) = relu(-x + 1; 2) - 1.
    layers = [keras.layers.Dense(1), keras.layers.ReLU(max_value=2.0), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((1,)), *layers])
    model.set_weights([np.array([[-1.0]]), np.ones(1), np.ones((1, 1)), -np.ones(1)])
    found = region_of_attraction(SCALAR, model, [10.0])
    assert found and 4.5 < found.half_widths[0] < 5.0  # 1.2x - 1 = x


@pytest.mark.parametrize(
    ("box", "why"),
    [
        ([1.0, 2.0], "positive finite half widths"),
        ([-1.0], "positive finite half widths"),
        ([np.nan], "positive finite half widths"),
        (([0.5], [1.0]), "must hold the equilibrium"),
        (([np.nan], [1.0]), "must hold the equilibrium"),
        (([-1.0, -1.0], [1.0, 1.0]), "one interval per state"),
    ],
)
def test_boxes_without_the_equilibrium_are_refused(box, why):
    with pytest.raises(ValueError, match=why):
        region_of_attraction(SCALAR, network([[[1.0]], [[-1.0]]]), box)


def test_an_uneven_box_is_cut_to_its_even_part():
    model = network([[[1.0]], [[-1.0]]])
    found = region_of_attraction(SCALAR, model, ([-1.0], [3.0]))
    assert found.box.tolist() == [1.0] and found.half_widths[0] <= 1


@pytest.mark.parametrize(
    ("change", "kind", "why"),
    [
        (dict(rate=1.0), ValueError, "between 0 and 1"),
        (dict(radius=-1.0), ValueError, "must be positive"),
        (dict(solver="structured"), ValueError, "must be 'clarabel'"),
        (dict(plant=None), TypeError, "must be a `Plant`"),
        (dict(plant=Plant(np.eye(2), [0, 1])), ValueError, "2 states and 1 inputs"),
    ],
)
def test_other_arguments_are_refused(change, kind, why):
    given = dict(plant=SCALAR, controller=network([[[1.0]], [[-1.0]]]), box=[1.0]) | change
    with pytest.raises(kind, match=why):
        if change.get("plant") is not None:
            given["box"] = [1.0, 1.0]
        region_of_attraction(**given)


def test_layers_that_are_no_chain_are_refused_by_name():
    inputs = keras.Input((1,))
    hidden = keras.layers.Dense(1, name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Add(name="sum")([hidden, inputs]))
    with pytest.raises(UnsupportedLayerError, match="sum"):
        region_of_attraction(SCALAR, model, [1.0])
    broken = network([[[np.nan]], [[-1.0]]])
    with pytest.raises(ValueError, match=r"hidden|NaN|finite"):
        region_of_attraction(SCALAR, broken, [1.0])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Plant([[1.0, 2.0]], [1.0]), "square"),
        (lambda: Plant([[np.inf]], [1.0]), "finite"),
        (lambda: Plant([[1.0]], [1.0, 2.0]), "with 1 rows"),
        (lambda: Plant([[1.0]], [1.0], gaps=[SineGap([1, 0], [0, 1])]), "reads and enters 1"),
        (lambda: SineGap([], [1.0]), "one per state"),
        (lambda: SectorGap([1], [1], low=1, high=0), "low` ≤ `high"),
        (lambda: SectorGap([1], [1], low=0, high=1, width=0), "width"),
        (lambda: SectorGap([1], [1], low=0, high=0.5, function=np.tanh), "leaves the sector"),
    ],
)
def test_plants_that_are_none_are_refused(make, why):
    with pytest.raises(ValueError, match=why):
        make()


def test_a_figure_shows_the_region(found):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    axes = found.plot()
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [
        "proved region of attraction", "box",
    ]  # fmt: skip
    assert FEEDBACK.shape == (1, 2)
