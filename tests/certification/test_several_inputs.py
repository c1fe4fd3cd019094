"""Certificates of models with several inputs: all perturbed together, or a chosen one."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import tf_lyapunov as tfl
from tf_lyapunov.certification import Certificate, certify
from tf_lyapunov.errors import UnfaithfulReading, UnsupportedLayerError
from tf_lyapunov.sealing import unseal

RNG = np.random.default_rng
CHOICES = {None: slice(None), "a": slice(0, 3), "b": slice(3, 7), 1: slice(3, 7)}


def sample(n=24, seed=0):
    rng = RNG(seed)
    a, b = rng.normal(size=(n, 3)), rng.normal(size=(n, 4))
    return a.astype("float32"), b.astype("float32")


def joined(classes=5):
    """Dense layer on the concatenation, and its matrix (7, classes)."""
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    dense = layers.Dense(classes)
    model = keras.Model([a, b], dense(layers.Concatenate()([a, b])))
    return model, weights_of(dense)


def summed(classes=5):
    """Sum of a dense layer for each input, and the matrix of both."""
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    first, second = layers.Dense(classes), layers.Dense(classes)
    model = keras.Model({"a": a, "b": b}, layers.Add()([second(b), first(a)]))
    return model, np.concatenate([weights_of(first), weights_of(second)])


def subtracted(classes=5):
    """Behind flattening, casts and a softmax; one input is an image."""
    a, b = keras.Input((3, 1), name="a"), keras.Input((2, 2), name="b")
    first, second = layers.Dense(classes), layers.Dense(classes)
    difference = layers.Subtract()([first(layers.Flatten()(a)), second(layers.Flatten()(b))])
    model = keras.Model([a, b], layers.Softmax()(difference))
    return model, np.concatenate([weights_of(first), -weights_of(second)])


def weights_of(layer):
    return np.asarray(keras.ops.convert_to_numpy(layer.kernel), np.float64)


LINEAR = {"joined": joined, "summed": summed, "subtracted": subtracted}


def margins_over_distance(matrix, x, rows):
    """Exact minimal perturbation of a linear classifier in the coordinates `rows`."""
    logits = x.astype(np.float64) @ matrix
    found = []
    for row in logits:
        best = np.argmax(row)
        distance = np.linalg.norm(matrix[rows][:, [best]] - matrix[rows], axis=0)
        others = np.arange(len(row)) != best
        found.append(np.min((row[best] - row[others]) / distance[others]))
    return np.array(found)


@pytest.mark.parametrize("perturbed", CHOICES)
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_model_has_its_exact_radius_from_both_sides(name, perturbed):
    model, matrix = LINEAR[name]()
    a, b = sample()
    exact = margins_over_distance(matrix, np.concatenate([a, b], axis=1), CHOICES[perturbed])
    shapes = [(-1, *t.shape[1:]) for t in model.inputs]
    shaped = {"a": a.reshape(shapes[0]), "b": b.reshape(shapes[1])}
    proof = certify(model, shaped, perturbed=perturbed, precision="float64")
    # Below by the rounding allowance alone, never above by more than the reference's own rounding.
    assert np.all(proof.radius <= exact * (1 + 1e-12))
    assert np.all(proof.radius >= exact * (1 - 1e-6) - 1e-9)
    bound = tfl.minimal_perturbation_lower_bound(model, shaped, perturbed=perturbed).bound
    assert np.all(bound <= exact * (1 + 1e-12))


def test_one_logit_of_two_inputs_is_exact():
    model, matrix = joined(classes=1)
    a, b = sample()
    logit = np.concatenate([a, b], axis=1) @ matrix[:, 0]
    for perturbed, rows in CHOICES.items():
        proof = certify(model, [a, b], perturbed=perturbed, precision="float64")
        exact = np.abs(logit) / np.linalg.norm(matrix[rows])
        assert np.all(proof.radius <= exact * (1 + 1e-6))
        assert np.all(proof.radius >= exact * (1 - 1e-5) - 1e-6)


def towers(shared=False, seed=0):
    """Two towers (or one, called twice), then layers that mix them, and a way past them for a."""
    keras.utils.set_random_seed(seed)
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    first = layers.Dense(6, activation="tanh", name="first")
    second = first if shared else layers.Dense(6, activation="tanh", name="second")
    h = layers.Concatenate()([first(a), second(b)])
    h = layers.Dense(8, activation="tanh", name="mix")(h)
    past = layers.Dense(8, name="past")(a)
    return keras.Model([a, b], layers.Dense(3, name="logits")(layers.Add()([h, past])))


def jacobian(model, a, b):
    """∂logits/∂(a, b), (3, 8), by the chain rule on the weights in float64."""
    kernels = {n: weights_of(model.get_layer(n)) for n in ("first", "mix", "past", "logits")}
    names = [layer.name for layer in model.layers]
    kernels["second"] = kernels["first"]
    if "second" in names:
        kernels["second"] = weights_of(model.get_layer("second"))
    inner = [np.tanh(a @ kernels["first"]), np.tanh(b @ kernels["second"])]  # biases are zero
    mixed = np.tanh(np.concatenate(inner) @ kernels["mix"])
    towers = [(1 - h**2)[:, None] * kernels[n].T
              for h, n in zip(inner, ("first", "second"), strict=True)]  # fmt: skip
    block = np.zeros((12, 8))
    block[:6, :4], block[6:, 4:] = towers
    slope = (1 - mixed**2)[:, None] * (kernels["mix"].T @ block)
    slope[:, :4] += kernels["past"].T
    return kernels["logits"].T @ slope


@pytest.mark.parametrize("method", ["composition", "lipsdp", "liplt"])
@pytest.mark.parametrize("shared", [False, True])
def test_gains_bound_the_jacobian_of_what_is_perturbed(method, shared):
    model, rng = towers(shared=shared), RNG(3)
    slopes = [jacobian(model, *(rng.normal(size=(2, 4)) * s)) for s in (0.0, 0.3, 1.0)]
    found = {}
    for perturbed, columns in ((None, slice(None)), ("a", slice(0, 4)), ("b", slice(4, 8))):
        bound = tfl.lipschitz_upper_bound(model, perturbed=perturbed, method=method)
        found[perturbed] = bound.gain_upper_bound
        largest = max(np.linalg.norm(s[:, columns], 2) for s in slopes)
        assert largest <= found[perturbed] * (1 + 1e-12) and found[perturbed] <= 5 * largest
        assert bound.perturbed == (None if perturbed is None else (perturbed,))
    assert max(found["a"], found["b"]) <= found[None] * (1 + 1e-9)
    assert found[None] <= np.hypot(found["a"], found["b"]) * (1 + 1e-9)


def test_an_input_that_is_used_twice_counts_twice():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    eye = layers.Dense(4, kernel_initializer="identity", use_bias=False)
    model = keras.Model([a, b], layers.Add()([eye(a), a, eye(b)]))
    found = {p: tfl.lipschitz_upper_bound(model, perturbed=p).gain_upper_bound
             for p in (None, "a", "b")}  # fmt: skip
    # The map is 2a + b: its norms are 2, 1 and, together, √5.
    assert 2.0 <= found["a"] <= 2.0 * (1 + 1e-12) and 1.0 <= found["b"] <= 1 + 1e-12
    assert np.sqrt(5) <= found[None] <= np.sqrt(5) * (1 + 1e-12)


def test_a_path_from_a_held_input_adds_no_gain_but_rounding():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    steep = layers.Dense(3)(layers.Dense(50, activation="relu")(b))
    model = keras.Model([a, b], layers.Add()([layers.Dense(3)(a), steep]))
    x, z = RNG(0).normal(size=(2, 30, 4)).astype("float32")
    near = certify(model, [x, z], perturbed="a", precision="model")
    far = certify(model, [x, 1000 * z], perturbed="a", precision="model")
    assert near.gain_upper_bound == far.gain_upper_bound
    assert far.float_allowance > 100 * near.float_allowance > 0
    alone = tfl.lipschitz_upper_bound(model, perturbed="a")
    assert alone.gain_upper_bound == near.gain_upper_bound


def test_an_input_that_reaches_nothing_may_change_at_will():
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    model = keras.Model([a, b], layers.Dense(3, activation="tanh")(a))
    x, z = sample()
    for method in ("composition", "auto"):
        proof = certify(model, [x, z], perturbed="b", method=method)
        assert proof.gain_upper_bound == 0 and np.all(np.isinf(proof.radius))
    lower = tfl.minimal_perturbation_lower_bound(model, [x, z], perturbed="b")
    assert np.all(np.isinf(lower.bound))
    both = certify(model, [x, z])
    assert np.array_equal(both.radius, certify(model, [x, z], perturbed="a").radius)


@pytest.mark.parametrize(("perturbed", "shared"), [(None, True), ("a", False), ("b", True)])
def test_no_attack_flips_inside_the_radius_and_one_does_outside(perturbed, shared):
    model = towers(shared=shared)
    x = list(RNG(1).normal(size=(2, 40, 4)).astype("float32"))
    proof = certify(model, x, perturbed=perturbed)
    lower = tfl.minimal_perturbation_lower_bound(model, x, perturbed=perturbed).bound
    radius = np.maximum(proof.radius, lower)
    assert np.all(radius > 0)
    attack = tfl.attacks.PGD(tfl.L2(radius * (1 - 1e-6)), steps=15, loss="margin")
    assert not attack(model, x, perturbed=perturbed).success.any()
    # tanh saturates: what is held may decide alone.
    found = tfl.attacks.MinimalFGV()(model, x, perturbed=perturbed)
    assert found.success.mean() > 0.5
    assert np.all(found.distance[found.success] > radius[found.success])


def test_lists_tuples_dicts_and_batches_give_the_same_certificate():
    model = towers()
    a, b = RNG(2).normal(size=(2, 12, 4)).astype("float32")
    y = np.arange(12) % 3
    expected = certify(model, [a, b], y, perturbed="b")

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            rows = slice(4 * i, 4 * i + 4)
            return {"b": b[rows], "a": a[rows]}, y[rows]

    parts = [((a[i : i + 5], b[i : i + 5]), y[i : i + 5]) for i in (0, 5, 10)]
    for x, labels in (((a, b), y), ({"b": b, "a": a}, y), (Batches(), None), (iter(parts), None)):
        proof = certify(model, x, labels, perturbed=1)
        assert np.allclose(proof.radius, expected.radius, rtol=1e-3, atol=1e-6)
        assert np.array_equal(proof.labels, expected.labels)


def test_a_certificate_says_saves_and_digests_what_was_perturbed(tmp_path):
    model = towers()
    x = list(RNG(2).normal(size=(2, 6, 4)).astype("float32"))
    proofs = {p: certify(model, x, perturbed=p) for p in (None, "a", "b")}
    assert len({p.model_digest for p in proofs.values()}) == 3
    assert proofs[None].model_digest == tfl.lipschitz_upper_bound(model).model_digest
    assert proofs["a"].model_digest == tfl.lipschitz_upper_bound(model, perturbed=0).model_digest
    assert proofs["a"].perturbed == ("a",) and proofs[None].perturbed is None
    assert "'a' alone, the other inputs held fixed" in proofs["a"].explain()
    assert any("concatenation of all 2 inputs" in text for text in proofs[None].assumptions)
    proofs["a"].save(tmp_path / "a.json")
    loaded = Certificate.load(tmp_path / "a.json")
    assert loaded.perturbed == ("a",) and np.array_equal(loaded.radius, proofs["a"].radius)
    old = unseal(json.loads(proofs[None].to_json()))
    del old["perturbed"]
    assert Certificate.from_json(json.dumps(old)).perturbed is None
    for wrong in ("a", [], ["a", "a"], [1]):
        with pytest.raises(ValueError, match="`perturbed` must hold names"):
            Certificate.from_json(json.dumps({**old, "perturbed": wrong}))
    for proof in proofs.values():
        with pytest.raises(ValueError, match="model with one input"):
            proof.save(tmp_path / "proof.npz")
    assert not (tmp_path / "proof.npz").exists()
    with pytest.raises(ValueError, match=r"about 'a' alone"):
        from tf_lyapunov.matlab import export_mat

        export_mat(tmp_path / "a.mat", certificate=proofs["a"])


def test_a_proof_file_is_refused_for_a_model_of_several_inputs(tmp_path):
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    x = RNG(0).normal(size=(5, 4)).astype("float32")
    certify(plain, x, perturbed=0).save(tmp_path / "proof.npz")  # the only input: all of it
    assert tfl.verification.verify(tmp_path / "proof.npz", plain).holds
    with pytest.raises(UnsupportedLayerError, match="one input"):
        tfl.verification.verify(tmp_path / "proof.npz", towers())


def test_the_only_input_may_be_named():
    model = keras.Sequential([keras.Input((4,), name="pixels"), layers.Dense(3)])
    x = RNG(0).normal(size=(5, 4)).astype("float32")
    whole, named = certify(model, x), certify(model, {"pixels": x}, perturbed="pixels")
    assert named.perturbed is None and named.model_digest == whole.model_digest
    assert np.array_equal(whole.radius, named.radius)


def test_held_integers_are_read_and_those_that_wrap_are_refused():
    a, code = keras.Input((3,), name="a"), keras.Input((2,), dtype="uint8", name="code")
    scaled = layers.Rescaling(1 / 255)(code)
    model = keras.Model([a, code], layers.Dense(3)(layers.Concatenate()([a, scaled])))
    x, _ = sample()
    held = RNG(0).integers(0, 256, size=(len(x), 2))
    proof = certify(model, [x, held], perturbed="a")
    assert proof.verdict == "PROVED"
    attack = tfl.attacks.FGM(tfl.L2(proof.radius * 50))(model, [x, held], perturbed="a")
    assert attack.success.any() and np.array_equal(attack.x_adv[1], held)
    for wrong in (held + 256, held - 300, held + 0.5):
        with pytest.raises(ValueError, match=r"`x\['code'\]` must hold (numbers|whole numbers)"):
            certify(model, [x, wrong], perturbed="a")
        with pytest.raises(ValueError, match=r"`x\['code'\]` must hold whole numbers"):
            tfl.attacks.FGM(tfl.L2(1.0))(model, [x, wrong], perturbed="a")
    with pytest.raises(ValueError, match="Hold it fixed"):
        tfl.attacks.FGM(tfl.L2(1.0))(model, [x, held])


def test_float64_inputs_are_held_as_the_model_holds_them():
    model, matrix = joined()
    rng = RNG(5)
    a, b = rng.normal(size=(20, 3)), rng.normal(size=(20, 4))  # not float32 numbers
    proof = certify(model, [a, b], perturbed="a", precision="float64")
    cast = np.concatenate([a.astype("float32"), b.astype("float32")], axis=1)
    exact = margins_over_distance(matrix, cast, slice(0, 3))
    shift = np.linalg.norm(a - a.astype("float32"), axis=1)
    assert np.all(proof.radius <= (exact - shift) * (1 + 1e-12))
    assert np.all(proof.radius >= exact * (1 - 1e-6) - 2 * shift - 1e-9)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda a, b: [a, b * np.nan], r"`x\['b'\]` must be finite"),
        (lambda a, b: [b, a], r"`x\['a'\]` must have the model's input shape \(None, 3\)"),
        (lambda a, b: [a, b.astype(str)], r"`x\['b'\]` must hold real numbers"),
        (lambda a, b: [a[:0], b[:0]], r"`x\['a'\]` must hold at least one input"),
        (lambda a, b: [a], "1 arrays for 2 inputs"),
        (lambda a, b: {"a": a, "c": b}, "missing 'b'; unknown 'c'"),
        (lambda a, b: [a, b[:5]], "equally many"),
    ],
)
def test_bad_inputs_are_named(bad, message):
    model, _ = joined()
    with pytest.raises(ValueError, match=message) as error:
        certify(model, bad(*sample()))
    assert "Received: " in str(error.value)


def test_local_slopes_and_subclassed_models_are_refused_by_name():
    model, _ = joined()
    with pytest.raises(UnsupportedLayerError, match=r"needs a model with one input.*'a', 'b'"):
        certify(model, list(sample()), method="local")

    class Sub(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(keras.ops.concatenate([x["a"], x["b"]], axis=-1))

    sub, (a, b) = Sub(), sample()
    sub({"a": a, "b": b})
    with pytest.raises(TypeError, match="Wrap it"):
        certify(sub, {"a": a, "b": b})


def test_a_reading_with_the_inputs_swapped_is_caught():
    """Validation feeds every input to its own step: what is swapped shows."""
    from tf_lyapunov.certification import read_network
    from tf_lyapunov.program.validation import validate

    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    model = keras.Model([a, b], layers.Add()([layers.Dense(3)(a), layers.Dense(3)(b)]))
    other = keras.Model([b, a], model.outputs[0])
    network = read_network(model)
    x = list(RNG(0).normal(size=(2, 8, 4)).astype("float32"))
    validate(network, x)
    object.__setattr__(network, "model", other)
    with pytest.raises(UnfaithfulReading):
        validate(network, x)
