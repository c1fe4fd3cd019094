"""Checkpoints hold everything, detect damage, and fall back."""

import keras
import numpy as np
import pytest

from tf_lyapunov.errors import RunDirectoryError
from tf_lyapunov.experiments.checkpoints import (
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
    restore,
    snapshot,
    training_variables,
    write_checkpoint,
)


def a_checkpoint(epoch=1):
    return Checkpoint(
        epoch=epoch,
        variables=[np.arange(6.0, dtype="float32").reshape(2, 3), np.array(7)],
        names=["dense/kernel", "adam/iteration"],
        history=[{"epoch": i + 1, "loss": 0.1 + i, "nan": float("nan")} for i in range(epoch)],
        state={"callbacks": [{"step": np.asarray(3), "v/a": np.ones(2), "plain": [1, "x", None]}]},
        identity={"training": {"seed": 0}},
    )


def a_model(optimizer="adam", units=3, dropout=0.5):
    inputs = keras.Input((4,))
    x = keras.layers.Dense(units, name="dense")(inputs)
    x = keras.layers.Dropout(dropout, seed=1)(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(x))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_a_checkpoint_is_read_back_as_it_was(tmp_path):
    path = write_checkpoint(tmp_path, a_checkpoint())
    back = read_checkpoint(path)
    assert back.epoch == 1 and back.names == a_checkpoint().names
    assert all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in zip(back.variables, a_checkpoint().variables, strict=True)
    )
    assert back.history[0]["loss"] == 0.1 and np.isnan(back.history[0]["nan"])
    state = back.state["callbacks"][0]
    assert int(state["step"]) == 3 and state["plain"] == [1, "x", None]
    assert np.array_equal(state["v/a"], np.ones(2))


def test_only_the_newest_two_are_kept(tmp_path):
    for epoch in range(1, 5):
        write_checkpoint(tmp_path, a_checkpoint(epoch))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-000003.npz", "epoch-000004.npz"]


@pytest.mark.parametrize("position", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_is_used(tmp_path, position, damage):
    write_checkpoint(tmp_path, a_checkpoint(1))
    path = write_checkpoint(tmp_path, a_checkpoint(2))
    content = bytearray(path.read_bytes())
    at = int(position * len(content))
    if damage == "truncate":
        del content[at:]
    else:
        content[at : at + 64] = bytes(b ^ 0xFF for b in content[at : at + 64])
    path.write_bytes(bytes(content))
    checkpoint, messages = newest_checkpoint(tmp_path)
    assert checkpoint.epoch == 1
    assert len(messages) == 1 and "corrupt" in messages[0] and "before it" in messages[0]


def test_a_consistent_archive_with_changed_numbers_is_noticed(tmp_path):
    """The zip checksums are right; only the digest inside can tell."""
    path = write_checkpoint(tmp_path, a_checkpoint())
    with np.load(path) as file:
        arrays = dict(file)
    arrays["array_00000"] = arrays["array_00000"] + 1
    np.savez(path, **arrays)
    with pytest.raises(RunDirectoryError, match="SHA-256"):
        read_checkpoint(path)


def test_without_an_intact_checkpoint_there_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "missing") == (None, [])
    (tmp_path / "epoch-000001.npz").write_bytes(b"")
    checkpoint, messages = newest_checkpoint(tmp_path)
    assert checkpoint is None and len(messages) == 1


def test_a_pickle_is_never_executed(tmp_path):
    np.savez(tmp_path / "epoch-000001.npz", header=np.array([{"a": 1}], dtype=object))
    checkpoint, messages = newest_checkpoint(tmp_path)
    assert checkpoint is None and "corrupt" in messages[0]


def test_the_state_includes_seeds_and_the_optimizer():
    model = a_model()
    names = [variable.path for variable in training_variables(model)]
    assert any("seed_generator_state" in name for name in names)
    assert any("iteration" in name for name in names)
    assert sum("momentum" in name for name in names) == 4
    assert len({id(v) for v in training_variables(model)}) == len(names)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_restored_model_takes_the_same_next_step(tmp_path, optimizer):
    if optimizer == "sgd":
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        other = keras.optimizers.SGD(0.1, momentum=0.9)
    else:
        other = optimizer
    x, y = np.random.default_rng(0).normal(size=(8, 4)).astype("float32"), np.arange(8) % 2
    first, second = a_model(optimizer), a_model(other)
    for _ in range(3):
        first.train_on_batch(x, y)
    write_checkpoint(tmp_path, snapshot(first, 1, [], {}, {}))
    restore(second, newest_checkpoint(tmp_path)[0])
    for model in (first, second):
        for _ in range(3):
            model.train_on_batch(x, y)
    pairs = zip(first.get_weights(), second.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_without_the_seed_state_dropout_would_differ(tmp_path):
    """Negative control: the test above can tell."""
    x, y = np.ones((8, 4), "float32"), np.arange(8) % 2
    first, second = a_model(), a_model()
    first.train_on_batch(x, y)
    checkpoint = snapshot(first, 1, [], {}, {})
    restore(second, checkpoint)
    for variable in second.variables:
        if "seed_generator_state" in variable.path:
            variable.assign(variable.value * 0 + 12345)
    for model in (first, second):
        model.train_on_batch(x, y)
    pairs = zip(first.get_weights(), second.get_weights(), strict=True)
    assert not all(np.array_equal(a, b) for a, b in pairs)


def test_a_snapshot_does_not_change_when_training_goes_on():
    model = a_model()
    x, y = np.ones((8, 4), "float32"), np.arange(8) % 2
    checkpoint = snapshot(model, 1, [], {}, {})
    before = [value.copy() for value in checkpoint.variables]
    model.train_on_batch(x, y)
    assert all(np.array_equal(a, b) for a, b in zip(before, checkpoint.variables, strict=True))


@pytest.mark.parametrize("other", [{"units": 5}, {"optimizer": "sgd"}])
def test_a_checkpoint_of_another_model_is_refused(other):
    checkpoint = snapshot(a_model(), 1, [], {}, {})
    with pytest.raises(RunDirectoryError, match="another model or optimizer"):
        restore(a_model(**other), checkpoint)
