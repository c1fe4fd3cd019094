"""Files of networks whose branches meet, as somebody who forges them would write them.

The checksum is made anew, and digests of layers are those of the model at hand wherever that is
not the very thing asked for: what has to refuse a file is the mathematics.
"""

import functools
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from small_proofs import filled, inputs_of

from tf_lyapunov import certify
from tf_lyapunov.bounds import graphs as searched_graphs
from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.program.logits import Float64Logits
from tf_lyapunov.program.network import read_network
from tf_lyapunov.verification import archive, verify
from tf_lyapunov.verification.checking import derive, objections, unpack
from tf_lyapunov.verification.contents import differences
from tf_lyapunov.verification.reading import read

PARTS = ("squared", "values", "sizes", "sectors")
# Entries of signals up to which all branches are one problem; with one, each block is its own.
KINDS = {"residual": 2500, "blocks": 1, "joined": 2500}


def _block(x, kind):
    h = layers.Dense(5)(layers.Dense(5, kind)(x))
    return layers.Activation("tanh")(layers.Add()([x, h]))


@functools.cache
def model(kind):
    x = inputs = keras.Input((5,))
    if kind == "joined":
        first, second = layers.Dense(3, "relu")(x), layers.Dense(2, "elu")(x)
        x = layers.Concatenate()([second, layers.PReLU()(first), second])
        x = layers.Subtract()([x, layers.Dense(7)(first)])
    else:
        x = _block(_block(layers.Dense(5, "elu")(x), "relu"), "sigmoid")
    return filled(keras.Model(inputs, layers.Dense(3)(x)), seed=len(kind))


@functools.cache
def certified(kind):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searched_graphs, "LARGEST_SIGNALS", KINDS[kind])
        seconds = 60 if kind == "blocks" else 2
        return certify(model(kind), inputs_of(model(kind), 8), method="lipsdp", time_budget=seconds)


@functools.cache
def contents(kind):
    """`(header, arrays)` of the file of one of `test_graphs.KINDS`; not to be changed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proof.npz"
        certified(kind).save(path)
        return archive.read(path)


@functools.cache
def present(kind):
    return read(model(kind))


def copied(kind):
    header, arrays = contents(kind)
    certificate = {**header["certificate"]}
    return {**header, "certificate": certificate}, {k: v.copy() for k, v in arrays.items()}


def outcome(header, arrays, network):
    """`(why it is refused, claim)`, as `verify` finds it."""
    try:
        layers, evidence, claim, _, _ = unpack(header, arrays)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        return (f"unreadable: {error}",), None
    reasons = list(differences(layers, network.layers))
    if not reasons:
        with np.errstate(all="ignore"):
            try:
                reasons, _ = objections(network, derive(network, evidence), claim)
            except OverflowError as error:
                reasons = [str(error)]
    return tuple(reasons), claim


def part(arrays, number):
    return {name: arrays[f"part{number}_{name}"] for name in PARTS}


def put(arrays, number, given):
    arrays.update({f"part{number}_{name}": value for name, value in given.items()})


def swapped_ends(header, arrays):
    header["parts"] = [*header["parts"][1:], header["parts"][0]]


def smallest_for_all(header, arrays):
    """The part of the smallest gain stands for the others too."""
    count = len(header["parts"])
    least = min(range(count), key=lambda k: arrays[f"part{k}_squared"][0])
    for k in range(count):
        put(arrays, k, part(arrays, least))


def duplicated(header, arrays):
    """A part again, with half of its gain."""
    count = len(header["parts"])
    header["parts"] = [*header["parts"], header["parts"][0]]
    put(arrays, count, part(arrays, 0) | {"squared": arrays["part0_squared"] / 4})


def turned(header, arrays):
    header["parts"] = [[b, a] for a, b in header["parts"]]


def without_branches(header, arrays):
    """One part from the input to the logits, of the multipliers of the first block."""
    first, last = header["layers"][0][0], header["parts"][-1][1]
    for name in [n for n in arrays if n.startswith("part") and not n.startswith("part0")]:
        del arrays[name]
    header["parts"] = [[first, last]]


def pairs_of_a_block(header, arrays):
    put(arrays, 0, {f"pairs_{name}": value for name, value in part(arrays, 0).items()})
    arrays["part0_pairs_index"] = np.array([[1, 0]])


def scaled(name, factor):
    def change(header, arrays):
        arrays[f"part0_{name}"] = arrays[f"part0_{name}"] * factor

    return change


def one(name, value):
    def change(header, arrays):
        arrays[f"part0_{name}"].flat[0] = value

    return change


def layers_twice(header, arrays):
    header["layers"] = [*header["layers"], header["layers"][-1]]


def layers_swapped(header, arrays):
    header["layers"] = header["layers"][::-1]


def a_layer_less(header, arrays):
    header["layers"] = header["layers"][:-1]


FORGERIES = {
    "ends swapped": swapped_ends, "smallest for all": smallest_for_all, "duplicated": duplicated,
    "turned": turned, "without branches": without_branches, "pairs of a block": pairs_of_a_block,
    "smaller gain": scaled("squared", 0.9), "smaller form": scaled("values", 0.5),
    "no multipliers": scaled("values", 0.0), "narrow sectors": scaled("sectors", 0.99),
    "negative": scaled("values", -1.0), "negative gain": scaled("squared", -1.0),
    "one negative": one("values", -1e-3), "one NaN": one("values", np.nan),
    "one infinite": one("values", np.inf), "one huge": one("values", 1e308),
    "gain NaN": one("squared", np.nan), "gain infinite": one("squared", np.inf),
    "gain zero": one("squared", 0.0), "sector NaN": one("sectors", np.nan),
    "layers twice": layers_twice, "layers swapped": layers_swapped, "a layer less": a_layer_less,
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_parts_are_refused(name):
    header, arrays = copied("blocks")
    assert outcome(header, arrays, present("blocks"))[0] == () and len(header["parts"]) > 1
    FORGERIES[name](header, arrays)
    reasons, _ = outcome(header, arrays, present("blocks"))
    assert reasons


def of_another(header, arrays, other):
    """The file with the digests of another model's layers, and all it says of inputs and gains."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proof.npz"
        certify(other, arrays["inputs"], method="composition").save(path)
        theirs, held = archive.read(path)
    own = ("radius", "predictions", "labels", "margins")
    arrays |= {name: held[name] for name in own}
    gain = header["certificate"]["gain_upper_bound"]
    header["certificate"] = {**theirs["certificate"], "gain_upper_bound": gain}
    header["layers"] = theirs["layers"]


@pytest.mark.parametrize("kind", ["residual", "blocks", "joined"])
def test_the_multipliers_of_another_model_prove_nothing(kind, tmp_path):
    """The same architecture with larger kernels, as if a branch had been dropped for the proof."""
    other = keras.models.clone_model(model(kind))
    grown = [w * 1.5 if w.ndim > 1 else w for w in model(kind).get_weights()]
    other.set_weights(grown)
    header, arrays = copied(kind)
    assert outcome(header, arrays, read(other))[0]
    of_another(header, arrays, other)
    reasons, _ = outcome(header, arrays, read(other))
    assert any("multipliers" in reason or "gain" in reason for reason in reasons)
    path = tmp_path / "forged.npz"
    archive.write(path, header, arrays)
    try:
        assert not verify(path, other).holds
    except ProofFileError:
        pass


# Random edits -----------------------------------------------------------------------------------


@functools.cache
def steepest(kind):
    """Largest slope of the logits that random pairs of points show."""
    own, rng = Float64Logits(read_network(model(kind))), np.random.default_rng(0)
    x = 2 * rng.normal(size=(2000, *model(kind).inputs[0].shape[1:]))
    moved = x + 1e-3 * rng.normal(size=x.shape)
    change = own.predict(moved, len(x)) - own.predict(x, len(x))
    size = np.linalg.norm((moved - x).reshape(len(x), -1), axis=1)
    return float(np.max(np.linalg.norm(change, axis=1) / size))


@functools.cache
def exact(kind):
    return Float64Logits(read_network(model(kind)))


def is_false(kind, claim, rng, count=64):
    """Whether some point within a claimed radius is decided otherwise, or a slope is above the
    claimed gain."""
    if claim.gain_upper_bound < steepest(kind) * (1 - 1e-6):
        return True
    away = rng.normal(size=(count, *claim.inputs.shape))
    flat = away.reshape(count, len(claim.inputs), -1)
    flat /= np.linalg.norm(flat, axis=2, keepdims=True)
    spread = claim.radius.reshape(-1, *[1] * (claim.inputs.ndim - 1))
    x = (claim.inputs + np.minimum(spread, 1e6) * away).reshape(-1, *claim.inputs.shape[1:])
    logits = exact(kind).predict(x, len(x)).reshape(count, len(claim.inputs), -1)
    wrong = logits.argmax(axis=2) != claim.labels
    return bool(np.any(wrong[:, claim.radius > 0]))


def edited(header, arrays, rng):
    """One number of the parts, the claims or the gain changed."""
    names = [n for n in arrays if n.startswith("part") and arrays[n].size] + ["radius"] * 3
    name = names[rng.integers(len(names))]
    if rng.random() < 0.3:
        header["certificate"]["gain_upper_bound"] *= float(rng.uniform(0.3, 1.2))
        return
    value, kind = arrays[name], rng.integers(4)
    spot = rng.integers(value.size)
    if kind == 0:
        raw = value.reshape(-1).view(np.uint8)
        raw[rng.integers(len(raw))] ^= np.uint8(1 << rng.integers(8))
    elif kind == 1:
        value.flat[spot] = value.flat[rng.integers(value.size)]
    elif value.dtype.kind == "f":
        factors = [1 + 1e-9, 1 - 1e-9, 1.01, 1.5, 10, -1, np.nan]
        if kind == 2:
            value.flat[spot] *= rng.choice(factors)
        else:
            value *= rng.choice(factors)
    else:
        value.flat[spot] = rng.integers(-1, 9)


def tamper(count, seed, kinds=("residual", "blocks", "joined")):
    """Numbers of edits that were caught, and that were harmless."""
    rng = np.random.default_rng(seed)
    caught = harmless = 0
    for k in range(count):
        kind = kinds[k % len(kinds)]
        header, arrays = copied(kind)
        for _ in range(rng.integers(1, 3)):
            edited(header, arrays, rng)
        reasons, claim = outcome(header, arrays, present(kind))
        if reasons:
            caught += 1
            continue
        harmless += 1
        assert not is_false(kind, claim, rng), (k, kind)
    return caught, harmless


def test_edits_of_parts_are_caught_or_harmless():
    caught, harmless = tamper(45, 0)
    assert caught >= 15 and harmless >= 3


@pytest.mark.slow
def test_a_thousand_edits_of_parts_are_caught_or_harmless():
    caught, harmless = tamper(1000, 1)
    assert caught >= 400 and harmless >= 60
