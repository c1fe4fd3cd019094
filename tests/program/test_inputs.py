"""Inputs of a model: names, order, structure, and what is no set of arrays for them."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.program.inputs import Inputs


def two(structure):
    """A model of inputs b (3) and a (2), taken in a structure made from them."""
    b, a = keras.Input((3,), name="b"), keras.Input((2,), name="a")
    return keras.Model(structure(b, a), layers.Dense(2)(layers.Concatenate()([a, b])))


A, B = np.arange(8.0).reshape(4, 2), np.arange(12.0).reshape(4, 3)
LISTED = {"list": lambda b, a: [b, a], "tuple": lambda b, a: (b, a)}
STRUCTURES = {
    **LISTED,
    "dict": lambda b, a: {"b": b, "a": a},
    "sorted dict": lambda b, a: {"a": a, "b": b},
    "nested": lambda b, a: [b, {"inner": a}],
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_arrays_reach_the_inputs_that_keras_gives_them_to(name):
    model = two(STRUCTURES[name])
    inputs = Inputs.of(model)
    assert sorted(inputs.names) == ["a", "b"] and inputs.several
    x = STRUCTURES[name](B, A)
    flat = dict(zip(inputs.names, inputs.flat(x), strict=True))
    assert np.array_equal(flat["a"], A) and np.array_equal(flat["b"], B)
    order = [t.name for t in model.inputs]
    called = inputs.called([flat[n] for n in order])
    assert np.allclose(np.asarray(model(called)), model.predict(x, verbose=0), atol=1e-5)
    back = inputs.like(x, inputs.flat(x))
    assert type(back) is type(x)
    assert all(
        np.array_equal(p, q)
        for p, q in zip(keras.tree.flatten(back), keras.tree.flatten(x), strict=True)
    )


@pytest.mark.parametrize("name", LISTED)
def test_a_dict_by_the_names_of_the_layers_is_a_list_in_any_order(name):
    inputs = Inputs.of(two(LISTED[name]))
    assert inputs.names == ("b", "a")
    listed, named = inputs.flat([B, A]), inputs.flat({"a": A, "b": B})
    assert all(np.array_equal(p, q) for p, q in zip(listed, named, strict=True))
    assert list(inputs.like({"a": A, "b": B}, listed)) == ["a", "b"]


def test_a_list_for_a_dict_of_unsorted_keys_is_refused_as_keras_does():
    model = two(STRUCTURES["dict"])
    with pytest.raises(ValueError, match="Pass a dict with the keys"):
        Inputs.of(model).flat([B, A])
    with pytest.raises(ValueError):
        model.predict([B, A], verbose=0)
    in_order = Inputs.of(two(STRUCTURES["sorted dict"])).flat([A, B])
    assert np.array_equal(in_order[0], A)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([B], "1 arrays for 2 inputs"),
        ([B, A, A], "3 arrays for 2 inputs"),
        ([B, A[:3]], "equally many.*'a' \\(3, 2\\)"),
        ([B, 1.0], "equally many"),
        ({"b": B}, "missing 'a'"),
        ({"b": B, "a": A, "c": A}, "unknown 'c'"),
        ({"b": B, "x": A}, "missing 'a'; unknown 'x'"),
        ([B, [[1.0, 2.0], [3.0]]], "ragged"),
        ([B, [[object()] * 2] * 4], "no numbers"),
    ],
)
def test_what_is_no_array_for_every_input_is_refused(x, message):
    with pytest.raises(ValueError, match=message) as error:
        Inputs.of(two(LISTED["list"])).flat(x)
    assert "Received: " in str(error.value)


def test_one_array_or_none_for_several_inputs_is_refused():
    inputs = Inputs.of(two(LISTED["list"]))
    for x in (B, "ba", 3):
        with pytest.raises(TypeError, match=r"one array per input.*'b', 'a'"):
            inputs.flat(x)


def test_another_nesting_is_refused():
    with pytest.raises(ValueError, match="nested as the inputs of the model"):
        Inputs.of(two(STRUCTURES["nested"])).flat([B, A])


def test_perturbed_names_inputs_by_name_position_or_list():
    inputs = Inputs.of(two(LISTED["list"]))
    assert inputs.chosen(None) == (True, True) == inputs.chosen(["a", 0])
    assert inputs.chosen("a") == inputs.chosen(1) == inputs.chosen(-1) == (False, True)
    assert inputs.chosen_names(inputs.chosen(["b"])) == ("b",)
    assert inputs.chosen_names(inputs.chosen((0, 1))) is None
    for wrong in ("c", 2, -3, [], ["a", 1]):
        with pytest.raises(ValueError, match="`perturbed` must"):
            inputs.chosen(wrong)
    for wrong in (1.0, True, {"a"}):
        with pytest.raises(TypeError, match="`perturbed` must"):
            inputs.chosen(wrong)


def test_one_input_is_an_array_a_nested_list_or_a_dict_with_its_name():
    x = keras.Input((2,), name="a")
    inputs = Inputs.of(keras.Model(x, layers.Dense(1)(x)))
    for given in (A, A.tolist(), {"a": A}):
        assert np.array_equal(inputs.flat(given)[0], A) and not inputs.several
    with pytest.raises(ValueError, match="ragged"):
        inputs.flat([[1.0, 2.0], [3.0]])
    with pytest.raises(ValueError, match="unknown 'z'"):
        inputs.flat({"z": A})
