"""The generator knows every layer and every argument of Keras, or says why it leaves it out."""

import inspect

import keras
import numpy as np
import pytest
from soundness import catalogue, generator

L = keras.layers


def classes():
    """Every layer class of `keras.layers`, once, under the first of its names."""
    found = {}
    for name in sorted(dir(L), key=lambda n: (len(n), n)):
        kind = getattr(L, name)
        if inspect.isclass(kind) and issubclass(kind, keras.Layer):
            found.setdefault(kind, []).append(name)
    return {kind: {*names, kind.__name__} for kind, names in found.items()}


def test_every_layer_of_keras_is_generated_or_left_out_for_a_reason():
    known = {*catalogue.CATALOGUE, *catalogue.NEVER}
    missing = sorted(min(names) for names in classes().values() if not names & known)
    assert missing == []
    assert not set(catalogue.CATALOGUE) & set(catalogue.NEVER)
    assert all(catalogue.kind(name) is not None for name in known)


@pytest.mark.parametrize("name", sorted(catalogue.CATALOGUE))
def test_every_argument_of_a_layer_is_drawn_or_left_out_for_a_reason(name):
    entry = catalogue.CATALOGUE[name]
    drawn = {*entry.required, *entry.optional}
    arguments = set(inspect.signature(catalogue.kind(name).__init__).parameters)
    never = {*catalogue.NEVER_ARGUMENTS, *catalogue.NEVER_OF.get(name, ()), "dtype"}
    left = {a for a in arguments - drawn - never if not a.endswith(catalogue.NEVER_ENDINGS)}
    assert left == set()
    assert drawn <= arguments | {"trainable"}


def test_what_is_generated_covers_the_ways_to_use_a_layer():
    drawn = " ".join(generator.build(seed).described for seed in range(60))
    for word in ("wrapped", "changed", "nested", "ops", "inputs", "float16", "float64"):
        assert word in drawn
    assert {p.removeprefix("mixed_") for p in generator.POLICIES} == {
        *("float16", "bfloat16", "float32", "float64"),
    }


def test_layers_are_drawn_by_their_weights():
    names, share = catalogue.names_for(1)
    assert np.isclose(share.sum(), 1.0)
    assert share[names.index("Dense")] == share.max()
