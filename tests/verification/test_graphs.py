"""Proof files of networks whose branches meet: as one inequality, or block by block."""

import functools
import itertools

import keras
import numpy as np
import pytest
from forging import forged
from keras import layers
from small_proofs import filled, inputs_of

from tf_lyapunov import certify
from tf_lyapunov.bounds import graphs as searched_graphs
from tf_lyapunov.verification import archive, graphs, verify
from tf_lyapunov.verification.inequalities import Multipliers
from tf_lyapunov.verification.reading import read

WHOLE, BLOCKS = 2500, 1


def block(x, kind):
    h = layers.Dense(5)(layers.Dense(5, kind)(x))
    return layers.Activation("tanh")(layers.Add()([x, h]))


def _residual(x):
    return block(block(layers.Dense(5, "elu")(x), "relu"), "sigmoid")


def _wide(x):  # more inputs than the first layer has units
    return _residual(layers.Dense(4)(layers.Concatenate()([x, x, x])))


def _joined(x):
    first, second = layers.Dense(3, "relu")(x), layers.Dense(2, "elu")(x)
    both = layers.Concatenate()([second, layers.PReLU()(first), second])
    mean = layers.Average()([both, layers.Dense(7, "softplus")(x)])
    return layers.Subtract()([mean, layers.Dense(7)(first)])


def _images(x):
    x = layers.Conv2D(2, 3, strides=2, activation="relu")(layers.Reshape((5, 5, 1))(x))
    rows = [x, layers.Conv2D(2, 3, padding="same")(x)]
    high = layers.Concatenate(axis=1)([layers.BatchNormalization()(x), layers.Add()(rows)])
    x = layers.Activation("silu")(layers.AveragePooling2D(2)(layers.ZeroPadding2D(1)(high)))
    return layers.Flatten()(x)


def _linear(x):
    return layers.Add()([layers.Dense(4)(x), layers.Dense(4)(x)])


def _falling(x):  # slopes from -1 to 0
    down = layers.PReLU(alpha_initializer="zeros")(layers.Dense(4)(x))
    return layers.Subtract()([layers.Dense(4)(x), down])


KINDS = {
    "residual": (_residual, 5, WHOLE), "blocks": (_residual, 5, BLOCKS), "wide": (_wide, 6, WHOLE),
    "joined": (_joined, 4, WHOLE),
    "images": (_images, 25, WHOLE),
    "linear": (_linear, 3, WHOLE), "falling": (_falling, 3, WHOLE),
}  # fmt: skip


@functools.cache
def model(kind):
    make, size, _ = KINDS[kind]
    inputs = keras.Input((size,))
    return filled(keras.Model(inputs, layers.Dense(3)(make(inputs))), seed=len(kind))


@functools.cache
def certified(kind):
    largest = KINDS[kind][2]
    seconds = 2 if largest == WHOLE else 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searched_graphs, "LARGEST_SIGNALS", largest)
        return certify(model(kind), inputs_of(model(kind), 8), method="lipsdp", time_budget=seconds)


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """`(kind, certificate, path of its file)`."""
    found = certified(request.param)
    path = tmp_path_factory.mktemp("graphs") / "proof.npz"
    found.save(path)
    return request.param, found, path


def test_files_of_branches_are_written_and_verified(saved):
    kind, found, path = saved
    header, arrays = archive.read(path)
    assert header["parts"] and "part0_squared" in arrays
    if kind == "blocks":
        ends = [end for _, end in header["parts"]]
        assert sum(end.startswith("add") for end in ends) == 2
    assert verify(path, model(kind)).holds
    claimed = header["certificate"]["gain_upper_bound"]
    assert found.gain_upper_bound <= claimed <= found.gain_upper_bound * (1 + 1e-5)
    composed = certify(model(kind), inputs_of(model(kind), 8), method="composition")
    # The multipliers are needed: without them the file would not hold.
    assert claimed < 0.99 * composed.gain_upper_bound


def test_without_its_parts_or_with_a_smaller_gain_a_file_does_not_hold(saved):
    kind, _, path = saved

    def bare(header, arrays):
        for name in [n for n in arrays if n.startswith("part")]:
            del arrays[name]
        del header["parts"]

    assert not forged(path, bare, model(kind)).holds

    def smaller(header, arrays):
        for name in [n for n in arrays if n.startswith("part") and n.endswith("squared")]:
            arrays[name] = arrays[name] * 0.95
        header["certificate"]["gain_upper_bound"] *= 0.98

    found = forged(path, smaller, model(kind))
    assert not found.holds


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_between_two_steps_is_what_the_model_computes(kind):
    """f(x) - f(x') = Σ C_j(z_j - z_j') for the values of the model's own steps."""
    network = read(model(kind))
    start = network.steps[0].name
    graph = graphs.read(network, start, network.logits)
    x = inputs_of(model(kind), 2, seed=3).astype(np.float64)
    values = {}
    for step in network.steps:
        values[step.name] = x if step.operation is None else None
        if step.operation is not None:
            given = [(values[name], np.zeros_like(values[name])) for name in step.inputs]
            if len(given) > 1 or type(step.operation).__name__ == "Merge":
                given = [([v for v, _ in given], [e for _, e in given])]
            values[step.name] = step.operation.forward(*given[0])[0]
    flat = {name: (v[0] - v[1]).reshape(-1) for name, v in values.items()}
    signals = [flat[name] for name in (start, *graph.names)]
    if graph.sizes[0] < signals[0].size:
        pytest.skip("the first layer is replaced by a factor of the same Gram matrix")
    entering = {s.name: flat[s.inputs[0]] for s in network.steps if s.name in graph.names}
    for form, expected in [
        *zip(graph.reads, (entering[name] for name in graph.names), strict=True),
        (graph.outputs, flat[network.logits]),
    ]:
        total = sum(matrix @ signals[k] for k, (matrix, _) in form.items())
        np.testing.assert_allclose(total, expected, rtol=0, atol=1e-12)


def test_a_linear_part_is_bounded_by_its_norm_from_both_sides():
    network = read(model("linear"))
    graph = graphs.read(network, network.steps[0].name, network.logits)
    held = [np.asarray(w, np.float64) for w in model("linear").get_weights()]
    norm = np.linalg.norm((held[0] + held[2]) @ held[4], 2)
    for factor, proves in ((1 + 1e-9, True), (1 - 1e-9, False)):
        assert graphs.proves_gain(graph, Multipliers((norm * factor) ** 2, (), ())) == proves


def test_branches_that_cancel_are_seen_to():
    """x - relu(x) is no longer than x; one part in 10⁹ less is not proved."""
    inputs = keras.Input((2,))
    whole = layers.Subtract()([inputs, layers.ReLU()(inputs)])
    end = layers.Dense(2, use_bias=False, kernel_initializer="identity")
    network = read(keras.Model(inputs, end(whole)))
    graph = graphs.read(network, network.steps[0].name, network.logits)
    for squared, proves in ((1 + 1e-9, True), (1 - 1e-9, False)):
        lam = Multipliers(squared, (np.full(2, 2.0),), ((0.0, 1.0),))
        assert graphs.proves_gain(graph, lam) == proves


def _named(start, end=None):
    def change(header, arrays):
        header["parts"] = [[start, end or header["parts"][0][1]]]

    return change


def _moved_pairs(header, arrays):
    arrays["part0_pairs_index"] = arrays["part0_pairs_index"] + 1


def _narrow_sector(header, arrays):
    arrays["part0_sectors"] = arrays["part0_sectors"] * 0.5


def _negative(header, arrays):
    arrays["part0_values"] = -arrays["part0_values"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_named("nowhere"), "not in the model"),
        (_named("input", "nowhere"), "no results of the part"),
        (_moved_pairs, "There is no pair"),
        (_narrow_sector, "outside the sector"),
        (_negative, "negative"),
        (lambda header, arrays: header.update(parts=[]), "that no proof has"),
        (lambda header, arrays: header.update(parts=[["a"]]), ""),
        (lambda header, arrays: header.update(parts="a"), "no list"),
        (lambda header, arrays: header.update(parts=[["a", "b"]] * 300), "more than 256"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, why, tmp_path):
    path = tmp_path / "proof.npz"
    certified("residual").save(path)
    try:
        found = forged(path, change, model("residual"))
    except Exception as error:
        assert type(error).__name__ == "ProofFileError" and why in str(error)
    else:
        assert not found.holds and why in str(found)


def test_a_part_that_something_leads_around_is_none():
    network = read(model("residual"))
    names = [step.name for step in network.steps]
    inner = next(s.name for s in network.steps if "relu" in s.name)
    with pytest.raises(ValueError, match=r"passes .* by"):
        graphs.read(network, inner, network.logits)
    with pytest.raises(ValueError, match="is not after"):
        graphs.read(network, names[3], names[3])
    with pytest.raises(ValueError, match=r"passes .* by"):
        graphs.read(network, network.logits, names[2])


def test_random_edits_are_caught_or_true(tmp_path):
    """What still verifies after random changes of the parts claims no more than holds."""
    path = tmp_path / "proof.npz"
    certified("joined").save(path)
    own, rng = model("joined"), np.random.default_rng(0)
    x = rng.normal(size=(400, 4)).astype("float32") * 2
    y = (x + 1e-2 * rng.normal(size=x.shape)).astype("float32")
    change = keras.ops.convert_to_numpy(own(y)) - keras.ops.convert_to_numpy(own(x))
    slope = np.max(np.linalg.norm(change, axis=1) / np.linalg.norm(y - x, axis=1))
    held = 0
    names = ("squared", "values", "sectors", "pairs_squared", "pairs_values", "pairs_sectors")
    for name, factor in itertools.product(names, (0.5, 0.999, 1.001, np.nan)):

        def edit(header, arrays, name=f"part0_{name}", factor=factor):
            changed = np.array(arrays[name])
            changed.flat[rng.integers(changed.size)] *= factor
            arrays[name] = changed

        try:
            found = forged(path, edit, own)
        except Exception as error:
            assert type(error).__name__ == "ProofFileError", error
            continue
        if found.holds:
            held += 1
            header, _ = archive.read(path.with_name("forged.npz"))
            assert header["certificate"]["gain_upper_bound"] >= slope * (1 - 1e-3)
    assert held  # multipliers may grow
