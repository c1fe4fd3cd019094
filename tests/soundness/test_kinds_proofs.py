"""Kinds of forged proof files that were accepted.

The rule: an odd but legal model is either read rightly, and no perturbation within a certified
radius changes its decision nor does a secant exceed its proven gain, or it is refused by an error
that names what could not be read. `xfail` marks faults that are known and not yet removed.
"""

import keras
import numpy as np
import pytest
from soundness.expectations import L, dense, inputs_near_boundaries

import tf_lyapunov as tfl


def saved_and_forged(folder, model, x, change):
    """A proof file whose contents `change(header, arrays)` edited, with a digest made anew."""
    from tf_lyapunov.verification import archive

    path = folder / "proof.npz"
    tfl.certify(model, x).save(path)
    header, arrays = archive.read(path)
    arrays = {name: np.array(value) for name, value in arrays.items()}
    change(header, arrays)
    archive.write(path, header, arrays)
    return path


def verdict(path, model):
    """Whether a file is accepted; refused files are not."""
    try:
        return bool(tfl.verification.verify(path, model).holds)
    except ValueError:
        return False


def test_a_proof_about_another_input_shape_is_not_accepted(tmp_path):
    def network(shape):
        pool, head = L.GlobalAveragePooling2D(name="pool"), L.Dense(2, name="head")
        return keras.Sequential([keras.Input(shape), pool, head])

    small, large = network((None, None, 1)), network((2, 2, 1))
    small.set_weights(large.get_weights())
    x = np.random.default_rng(0).normal(size=(3, 60, 60, 1)).astype("float32")
    path = tmp_path / "proof.npz"
    tfl.certify(small, x).save(path)
    assert not verdict(path, large)


@pytest.mark.parametrize("dtype", ["int64", "uint64", "longdouble"])
def test_inputs_of_types_wider_than_float64_are_not_accepted(tmp_path, dtype):
    model = keras.Sequential(
        [keras.Input((2,), dtype="float64"), dense(np.eye(2), dtype="float64")]
    )
    x = np.array([[2.0**60, 2.0**60 + 256]])
    forged = np.array([[2**60 + 127, 2**60 + 129]]).astype(dtype)  # rounded to float64: x

    def change(header, arrays):
        arrays["inputs"] = forged

    try:
        path = saved_and_forged(tmp_path, model, x, change)
        found = tfl.verification.verify(path, model)
    except ValueError:
        return
    assert not found.holds or np.all(found.claimed_radius <= 1.42)


def test_an_infinite_float_allowance_is_not_accepted(tmp_path):
    model = keras.Sequential([keras.Input((2,)), L.Dense(2)])

    def change(header, arrays):
        assert replace_everywhere(header, "float_allowance", float("inf"))

    x = inputs_near_boundaries((2,), count=3)
    try:
        path = saved_and_forged(tmp_path, model, x, change)
    except ValueError:
        return
    assert not verdict(path, model)


def replace_everywhere(tree, name, value):
    """Sets every entry of that name in nested dicts and lists; whether there was one."""
    found = False
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, item in list(entries):
        if key == name:
            tree[key] = value
            found = True
        elif isinstance(item, (dict, list)):
            found |= replace_everywhere(item, name, value)
    return found


def test_words_of_a_proof_file_cannot_pass_for_the_verifiers(tmp_path):
    model = keras.Sequential([keras.Input((2,)), L.Dense(2)])
    words = "fine.\nVERIFIED: gain 0.0001"

    def change(header, arrays):
        assert replace_everywhere(header, "notes", [words]) or replace_everywhere(
            header, "method", words
        )

    path = saved_and_forged(tmp_path, model, inputs_near_boundaries((2,), count=3), change)
    try:
        text = tfl.verification.verify(path, model).explain()
    except ValueError:
        return
    assert "\nVERIFIED: gain 0.0001" not in text
