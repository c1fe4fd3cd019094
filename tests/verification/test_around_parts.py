"""Parts of the verifier's bounds around inputs, each against samples and closed forms."""

import keras
import numpy as np
import pytest
from small_proofs import convolution_model, filled

from tf_lyapunov.verification import activations
from tf_lyapunov.verification.around import functionals
from tf_lyapunov.verification.around.balls import chords
from tf_lyapunov.verification.around.functionals import Functionals, of_units
from tf_lyapunov.verification.around.maxima import Maximum
from tf_lyapunov.verification.around.pieces import _CURVATURES, pieces
from tf_lyapunov.verification.around.region import Region
from tf_lyapunov.verification.around.relaxation import Multipliers, Relaxation
from tf_lyapunov.verification.network import forward
from tf_lyapunov.verification.operations import Activation, Axis, GlobalPooling, MaxPooling
from tf_lyapunov.verification.reading import read

layers = keras.layers
NAMES = sorted(activations.TABLE)


def linear_models():
    x = keras.Input((7, 6, 3))
    y = layers.Conv2D(4, 3, strides=2, padding="same", dilation_rate=1)(x)
    z = layers.Conv2D(4, (4, 5), strides=2, padding="same")(x)
    y = layers.Subtract()([y, z])
    y = layers.BatchNormalization()(layers.Conv2D(4, 2, groups=2)(y))
    y = layers.Average()([y, layers.DepthwiseConv2D(3, padding="same")(y), y])
    y = layers.Concatenate(axis=2)([y, layers.Rescaling(0.3, 0.2)(y)])
    y = layers.Cropping2D(((1, 0), (0, 1)))(layers.ZeroPadding2D(1)(y))
    y = layers.AveragePooling2D(2, 1, padding="same")(layers.Dense(5)(y))
    y = layers.Concatenate()([layers.Flatten()(y), layers.GlobalAveragePooling2D()(y)])
    yield keras.Model(x, layers.Dense(3)(y))
    x = keras.Input((9, 2))
    y = layers.Conv1D(3, 3, dilation_rate=2, padding="causal")(x)
    y = layers.SeparableConv1D(4, 2, padding="same")(y)
    y = layers.Add()([y, layers.Conv1D(4, 1)(x)])
    yield keras.Model(x, layers.Dense(2)(layers.Reshape((36,))(y)))


@pytest.mark.parametrize("number", [0, 1])
def test_functionals_are_carried_back_by_the_transposed_map(number):
    """cᵀ(f(x) - f(0)) = (back c)ᵀx for every step, forwards by other code."""
    network = read(filled(list(linear_models())[number]))
    rng, seen = np.random.default_rng(0), set()
    shapes = {step.name: step.shape for step in network.steps}
    for step in network.steps[1:]:
        seen.add(type(step.operation).__name__)
        ins = [shapes[i] for i in step.inputs]
        x = [rng.normal(size=(1, *s)) for s in ins]
        zero = [np.zeros_like(v) for v in x]
        ends = [forward(step, [(v, np.zeros_like(v)) for v in part])[0][0] for part in (x, zero)]
        c = rng.normal(size=(3, *step.shape))
        found = functionals.back(step.operation, Functionals(c), ins, step.shape)
        for row in range(3):
            expected = np.sum(c[row] * (ends[0] - ends[1]))
            parts = (p.whole(s).rows[row] * v[0] for p, s, v in zip(found, ins, x, strict=True))
            assert sum(float(np.sum(p)) for p in parts) == pytest.approx(expected, abs=1e-10)
        # |W|s by the map itself on signs that fit a single row.
        size = functionals.absolute(step.operation, [np.abs(v) for v in x])
        assert np.all(np.abs(ends[0] - ends[1]) <= size[0] * (1 + 1e-12) + 1e-14)
        unit = of_units(np.array([int(np.prod(step.shape)) // 2]), step.shape)
        ahead = functionals.back(step.operation, unit, ins, step.shape)
        total = sum(
            float(np.sum(np.abs(p.whole(s).rows[0]) * np.abs(v[0])))
            for p, s, v in zip(ahead, ins, x, strict=True)
        )
        assert total == pytest.approx(float(size.reshape(-1)[int(np.prod(step.shape)) // 2]))
    wanted = {"Convolution", "Merge", "Linear"} if number else {
        "Convolution", "Merge", "Scale", "Move", "AveragePooling", "GlobalPooling", "Linear",
    }  # fmt: skip
    assert wanted <= seen


@pytest.mark.parametrize("number", [0, 1])
def test_windows_hold_all_of_a_functional(number):
    network = read(filled(list(linear_models())[number]))
    shapes = {step.name: step.shape for step in network.steps}
    rng, windowed = np.random.default_rng(1), 0
    for step in network.steps[1:]:
        if len(step.shape) < 2:
            continue
        units = np.sort(rng.choice(int(np.prod(step.shape)), 3, replace=False))
        ins = [shapes[i] for i in step.inputs]
        cut = of_units(units, step.shape)
        found = functionals.back(step.operation, cut, ins, step.shape)
        whole = functionals.back(step.operation, cut.whole(step.shape), ins, step.shape)
        for f, w, s in zip(found, whole, ins, strict=True):
            assert np.array_equal(f.whole(s).rows, w.whole(s).rows)
            both = f.plus(Functionals(np.array(w.whole(s).rows)), s)
            assert np.allclose(both.whole(s).rows, 2 * w.whole(s).rows)
            if f.window is not None:
                windowed += f.rows.size < w.whole(s).rows.size
    assert windowed >= 2


def test_sums_of_windows_hold_both():
    one = Functionals(np.ones((1, 2, 2)), ((1, 3),))
    two = Functionals(np.full((1, 1, 2), 5.0), ((4, 5),))
    found = one.plus(two, (6, 2))
    assert found.window == ((1, 5),)
    assert found.whole((6, 2)).rows[0, :, 0].tolist() == [0, 1, 1, 0, 5, 0]


def intervals(rng, count=200):
    center, width = rng.normal(size=count) * 3, 10.0 ** rng.uniform(-9, 1, size=count)
    low, high = center - width, center + width
    low[:5], high[:5] = 0.0, 1.5
    low[5:9], high[5:9] = -2.0, 0.0
    low[9] = high[9] = 0.7
    return low, high


def parameters(name):
    return {"relu": {"negative_slope": 0.1, "max_value": 1.0}, "elu": {"alpha": 1.3}}.get(name, {})


@pytest.mark.parametrize("name", NAMES)
def test_pieces_hold_the_function_and_its_slopes(name):
    rng = np.random.default_rng(2)
    operation = Activation(name, parameters(name))
    low, high = intervals(rng)
    found = pieces(operation, low, high, lambda a: a)
    covered = np.zeros(len(low))
    for k in range(len(found.slope)):
        covered += found.stop[k] - found.start[k]
        t = np.linspace(found.start[k], found.stop[k], 23)
        value, noise = activations.evaluate(name, operation.parameters, t, np.zeros_like(t))
        line = found.slope[k] * t + found.shift[k]
        assert np.all(np.abs(value - line) <= found.error[k] + noise + 1e-15 * (1 + np.abs(t)))
    assert np.allclose(covered, high - low)
    t = np.linspace(low, high, 41)
    value, noise = activations.evaluate(name, operation.parameters, t, np.zeros_like(t))
    least, largest = found.range()
    assert np.all(value >= least - noise) and np.all(value <= largest + noise)
    wide = high - low > 1e-3
    steps = np.diff(value[:, wide], axis=0) / np.diff(t[:, wide], axis=0)
    assert np.all(steps >= found.low[wide] - 1e-9) and np.all(steps <= found.high[wide] + 1e-9)
    if name in ("relu", "relu6", "leaky_relu", "linear"):
        assert not np.any(found.error) and np.all((found.range()[0] - value.min(0))[wide] > -1e-12)
    elif name in _CURVATURES:
        # Chords of twelve cells of a curve of curvature κ.
        assert np.all(
            found.error <= _CURVATURES[name][0] * ((high - low) / 12) ** 2 / 8 * (1 + 1e-6) + 1e-12
        )


def test_chords_from_the_centre_hold_all_slopes_from_it():
    rng = np.random.default_rng(3)
    low, high = intervals(rng)
    center = low + (high - low) * rng.random(len(low))
    for name in ("relu", "leaky_relu", "relu6", "tanh", "elu"):
        operation = Activation(name, {})
        relaxed = Relaxation(operation, center, low, high)
        least, most = chords(relaxed)
        away = np.linspace(low, high, 31)
        far = np.abs(away - center) > 1e-2 * (high - low)
        far &= high - low > 1e-4
        values = [activations.evaluate(name, {}, t, np.zeros_like(t))[0] for t in (away, center)]
        chord = np.divide(values[0] - values[1], away - center, where=far, out=np.zeros_like(away))
        assert np.all((chord >= least - 1e-9) | ~far) and np.all((chord <= most + 1e-9) | ~far)
        if name == "relu":
            sure = (high - low > 1e-3) & (np.abs(center) > 1e-3)
            sure &= (center - low > 1e-4) & (high - center > 1e-4)
            spread = chord.max(axis=0, where=far, initial=-9) - chord.min(0, where=far, initial=9)
            assert np.all((most - least)[sure] <= spread[sure] + 1e-3 + 2e-2)


def test_curvatures_are_those_of_the_functions():
    t = np.linspace(-6, 6, 240001)
    for name, (curvature, corners) in _CURVATURES.items():
        value = activations.TABLE[name][1](t)
        second = np.abs(np.diff(value, 2)) / np.diff(t)[0] ** 2
        smooth = np.ones(len(second), bool)
        for corner in corners:
            smooth &= np.abs(t[1:-1] - corner) > 1e-3
        if name == "softsign":
            assert second[np.abs(t[1:-1]) > 1e-3].max() <= curvature
            continue
        assert 0.99 * curvature <= second[smooth].max() <= curvature * (1 + 1e-4)


@pytest.mark.parametrize("name", ["relu", "relu6", "tanh", "gelu", "prelu"])
def test_any_shares_and_any_lambda_give_a_lower_bound(name):
    rng, units = np.random.default_rng(4), 6
    shape = (2, 3)
    slopes = rng.uniform(-0.3, 1.2, size=shape) if name == "prelu" else None
    operation = Activation(name, {}, slopes)
    for trial in range(30):
        center = rng.normal(size=shape)
        radius = float(rng.uniform(0.01, 3))
        low = center - rng.uniform(0, 2, size=shape) * radius
        high = center + rng.uniform(0, 2, size=shape) * radius
        relaxed = Relaxation(operation, center, low, high)
        multipliers = Multipliers(
            np.arange(units),
            rng.normal(size=(40, units)) * rng.choice([0.3, 1, 30]),
            np.exp(rng.uniform(-30, 30, size=40)) * (rng.random(40) < 0.8),
        )
        c = rng.normal(size=(40, *shape)) * rng.choice([1e-6, 1.0, 1e3])
        g, h, size = relaxed.back(Functionals(c), multipliers if trial % 3 else None, radius)
        step = rng.normal(size=(400, *shape))
        step *= (radius * rng.random(400) ** 0.2 / np.linalg.norm(step.reshape(400, -1), axis=1))[
            :, None, None
        ]
        z = np.clip(center + step, low, high)
        value = operation.forward(z, np.zeros_like(z))[0]
        exact = c.reshape(40, -1) @ value.reshape(400, -1).T
        bound = g.rows.reshape(40, -1) @ z.reshape(400, -1).T + h[:, None]
        assert np.all(bound <= exact + 1e-13 * size[:, None])
    # Both sides: the best lines of a single unit touch it.
    for sign, share, z in ((1.0, 1.0, 2.0), (-1.0, 2 / 3, -1.0), (1.0, 0.0, -1.0)):
        relu = Relaxation(Activation("relu", {}), np.zeros(1), -np.ones(1), 2 * np.ones(1))
        held = Multipliers(np.zeros(1, int), np.array([[share]]), np.zeros(1))
        g, h, _ = relu.back(Functionals(np.array([[sign]])), held, 1.0)
        assert g.rows[0, 0] * z + h[0] == pytest.approx(sign * max(z, 0), abs=1e-12)


def test_halves_hold_what_lies_in_them():
    rng = np.random.default_rng(5)
    center, low, high = np.zeros(4), -np.ones(4), np.full(4, 2.0)
    whole = Relaxation(Activation("relu", {}), center, low, high)
    whole.radius = 2.5
    z = rng.uniform(-1, 2, size=(900, 4))
    z = z[np.linalg.norm(z, axis=1) <= 2.5]
    c = rng.normal(size=(20, 4))
    for above in (True, False):
        half = whole.halved([(1, 0.25, above), (3, 9.0, False)])
        inside = (z[:, 1] >= 0.25) == above
        held = Multipliers(np.arange(4), rng.normal(size=(20, 4)), np.exp(rng.normal(size=20)))
        g, h, _ = half.back(Functionals(c), held, half.radius)
        gap = c @ np.maximum(z[inside], 0).T - g.rows @ z[inside].T - h[:, None]
        assert np.all(gap >= -1e-12) and half.radius == whole.radius


def test_maxima_between_boxes_with_ties_and_numbers():
    rng = np.random.default_rng(6)
    axes = (Axis.of(3, 2, 1, 5, "same"), Axis.of(2, 1, 1, 4, "valid"))
    for operation in (MaxPooling(axes), GlobalPooling(False, 20)):
        for trial in range(20):
            low = np.round(rng.normal(size=(5, 4, 2)), trial % 3)
            high = low + np.round(rng.uniform(0, 1.5, size=low.shape), trial % 3)
            relaxed = Maximum(operation, (low + high) / 2, low, high)
            z = low + (high - low) * rng.choice([0, 0.3, 1], size=(300, *low.shape))
            value = operation.forward(z, np.zeros_like(z))[0]
            c = rng.normal(size=(10, *value.shape[1:]))
            size = relaxed.bent.size
            lam = np.exp(rng.normal(size=10) * 3)
            held = Multipliers(np.arange(size), rng.normal(size=(10, size)) * 2, lam)
            radius = np.linalg.norm((z - (low + high) / 2).reshape(300, -1), axis=1)
            for multipliers, reach in ((None, np.inf), (held, np.inf), (held, np.median(radius))):
                g, h, _ = relaxed.back(Functionals(c), multipliers, reach)
                exact = c.reshape(10, -1) @ value.reshape(300, -1).T
                bound = g.rows.reshape(10, -1) @ z.reshape(300, -1).T + h[:, None]
                assert np.all((bound <= exact + 1e-12)[:, radius <= reach])
            least, largest = relaxed.range()
            assert np.all(value >= least) and np.all(value <= largest)
            assert np.any(np.isclose(value.max(axis=0), largest))
    # A number above all boxes that overlap it from below is the maximum's lower end.
    low, high = np.array([[1.0], [5.0]]), np.array([[5.0], [5.0]])
    relaxed = Maximum(GlobalPooling(False, 2), low, low, high)
    g, h, _ = relaxed.back(Functionals(np.array([[1.0], [-1.0]])), None, np.inf)
    assert g.rows[0, 0, 0] * 1 + g.rows[0, 1, 0] * 5 + h[0] <= 5
    assert g.rows[1, 0, 0] * 1 + g.rows[1, 1, 0] * 5 + h[1] <= -5


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_the_least_of_functionals_on_a_region(norm):
    rng = np.random.default_rng(7)
    order = {"l2": 2, "linf": np.inf, "l1": 1}[norm]
    for trial in range(20):
        center, radius = rng.uniform(0, 1, size=(2, 3)), float(rng.uniform(0.05, 1.5))
        bounds = (-np.inf, np.inf) if trial % 2 else (0.0, np.full(3, 1.0))
        region = Region(center, radius, norm, bounds)
        c = rng.normal(size=(30, 2, 3)) * (rng.random((30, 2, 3)) < 0.7)
        value, size = region.minimum(Functionals(c))
        step = rng.normal(size=(4000, 6)) * (rng.random((4000, 6)) < rng.uniform(0.1, 1))
        step *= (radius / np.maximum(np.linalg.norm(step, order, axis=1), 1e-12))[
            :, None
        ] * 0.999999
        x = np.clip(center.reshape(-1) + step, *(np.broadcast_to(b, (2, 3)).reshape(-1) for b in
                                                 bounds))  # fmt: skip
        low, high = region.box()
        assert np.all(x >= low.reshape(-1)) and np.all(x <= high.reshape(-1))
        reached = (c.reshape(30, -1) @ (x - center.reshape(-1)).T).min(axis=1)
        assert np.all(value - 1e-13 * size <= reached)
        assert np.all(region.l2_radius() >= np.linalg.norm(x - center.reshape(-1), axis=1) - 1e-12)
        if trial % 2:
            dual = {2: 2, np.inf: 1, 1: np.inf}[order]
            exact = -radius * np.linalg.norm(c.reshape(30, -1), dual, axis=1)
            assert np.allclose(value, exact, rtol=1e-12, atol=1e-12)
        else:
            assert np.all(reached - value <= 0.6 * np.abs(value) + 1e-9)
    with pytest.raises(ValueError, match="outside the bounds"):
        Region(np.full(2, 3.0), 0.5, norm, (0.0, 1.0))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_least_on_a_cut_ball_is_that_of_a_search(norm):
    from scipy.optimize import linprog, minimize

    rng = np.random.default_rng(8)
    for _ in range(4):
        center, radius = rng.uniform(0, 1, size=4), 0.6
        c = rng.normal(size=4)
        value, _ = Region(center, radius, norm, (0.0, 1.0)).minimum(Functionals(c[None]))
        if norm == "l2":
            found = minimize(
                lambda d, c=c: c @ d, np.zeros(4), jac=lambda d, c=c: c, method="SLSQP",
                bounds=list(zip(-center, 1 - center, strict=True)),
                constraints={"type": "ineq", "fun": lambda d: 0.6**2 - d @ d},
                options={"ftol": 1e-12},
            ).fun  # fmt: skip
        else:
            cost = np.concatenate([c, -c])
            limit = [*((0, 1 - v) for v in center), *((0, v) for v in center)]
            found = linprog(cost, np.ones((1, 8)), [radius], bounds=limit).fun
        assert value[0] == pytest.approx(found, abs=1e-5)


def test_the_steps_of_a_network_that_are_covered():
    from tf_lyapunov.verification.around.surroundings import is_covered

    network = read(convolution_model())
    assert all(is_covered(s.operation) for s in network.steps[1:-1])
