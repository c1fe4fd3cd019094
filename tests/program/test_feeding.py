"""Inputs in blocks: the same inputs and labels in the same order, whatever they came in."""

import threading

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_lyapunov import certify
from tf_lyapunov.certification import proofs
from tf_lyapunov.program import feeding
from tf_lyapunov.program.inputs import Inputs


def model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])


def fed(x, y=None, **sizes):
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(feeding, name, size)
        return list(feeding.blocks(x, y, Inputs.of(model())))


@given(
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    smallest=st.integers(1, 200),
    largest=st.integers(24, 400),
    labelled=st.booleans(),
)
def test_blocks_hold_what_batches_hold_in_order(cuts, smallest, largest, labelled):
    count = sum(cuts)
    x, y = np.arange(3.0 * count).reshape(count, 3), np.arange(count)
    ends = np.cumsum(cuts)
    batches = [
        (x[e - c : e], y[e - c : e])[: 1 + labelled] for c, e in zip(cuts, ends, strict=True)
    ]
    sizes = {"SMALLEST_BLOCK": smallest, "LARGEST_BLOCK": largest}
    for source, labels in ((iter(batches), None), (x, y if labelled else None)):
        found = fed(source, labels, **sizes)
        np.testing.assert_array_equal(np.concatenate([b[0][0] for b in found]), x)
        if labelled:
            np.testing.assert_array_equal(np.concatenate([b[1] for b in found]), y)
        else:
            assert all(b[1] is None for b in found)
        row = x[0].nbytes
        assert all(b[0][0].nbytes <= max(largest, row) for b in found)
    joined = fed(iter(batches), SMALLEST_BLOCK=smallest, LARGEST_BLOCK=2**30)
    assert all(b[0][0].nbytes >= smallest for b in joined[:-1])


def test_an_array_in_one_block_is_not_copied():
    x = np.zeros((5, 3), "float32")
    ((found, _),) = fed(x)
    assert found[0] is x or found[0].base is x


def test_batches_of_other_shapes_and_dtypes_are_given_as_they_came():
    parts = [np.zeros((2, 3)), np.zeros((2, 3), "float32"), np.zeros((2, 4))]
    found = fed(iter(parts))
    assert [(b[0][0].dtype, b[0][0].shape) for b in found] == [(p.dtype, p.shape) for p in parts]


def test_labels_too_many_or_few_are_refused_whatever_the_blocks(monkeypatch):
    monkeypatch.setattr(feeding, "LARGEST_BLOCK", 24)
    x = np.random.default_rng(0).normal(size=(5, 3))
    for y in (np.zeros(6), np.zeros(4)):
        with pytest.raises(ValueError, match=r"`y` must have shape \(5,\)"):
            certify(model(), x, y)


@pytest.mark.parametrize("smallest", [1, 2**23])
def test_labels_of_one_batch_are_not_taken_for_those_of_another(monkeypatch, smallest):
    monkeypatch.setattr(feeding, "SMALLEST_BLOCK", smallest)
    x, y = np.random.default_rng(0).normal(size=(10, 3)), np.zeros(10, int)
    shifted = ((x[:4], y[:6]), (x[4:], y[:4]))  # 10 of both, and none of the second where it is
    lone = ((row, 0) for row in x)
    for source in (iter(shifted), lone):
        with pytest.raises(ValueError, match="Every batch must have one label per input"):
            certify(model(), source)
    with pytest.raises(ValueError, match="`y` must have one label per input"):
        certify(model(), x, 1)


def test_a_certificate_does_not_depend_on_how_its_inputs_came(monkeypatch):
    net, rng = model(), np.random.default_rng(0)
    x, y = rng.normal(size=(50, 3)).astype("float32"), rng.integers(0, 2, 50)
    # In float64: backends sum up float32 in an order that depends on the number of rows.
    whole = certify(net, x, y, precision="float64")
    for smallest, largest in ((1, 24), (100, 200), (2**30, 2**30)):
        monkeypatch.setattr(feeding, "SMALLEST_BLOCK", smallest)
        monkeypatch.setattr(feeding, "LARGEST_BLOCK", largest)
        for source, labels in (
            ((((x[i : i + 7], y[i : i + 7])) for i in range(0, 50, 7)), None),
            (x, y),
        ):
            found = certify(net, source, labels, precision="float64")
            np.testing.assert_allclose(found.radius, whole.radius, rtol=1e-6)
            np.testing.assert_array_equal(found.predictions, whole.predictions)
            np.testing.assert_array_equal(found.proof.inputs, x)


def test_what_is_too_large_to_keep_is_let_go_while_it_streams(monkeypatch, tmp_path):
    monkeypatch.setattr(proofs, "LARGEST_STREAM", 100)
    monkeypatch.setattr(feeding, "SMALLEST_BLOCK", 1)
    net, x = model(), np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
    streamed = certify(net, (x[i : i + 4] for i in range(0, 40, 4)))
    assert streamed.proof.inputs is None
    with pytest.raises(ValueError, match="MB of a data set"):
        streamed.save(tmp_path / "proof.npz")
    kept = proofs.KeptInputs(is_array=False)
    for start in range(0, 40, 4):
        kept.add([x[start : start + 4]])
    assert kept._parts is None and kept.joined() is None
    certify(net, x).save(tmp_path / "proof.npz")  # an array is in memory anyway


def test_samples_without_a_batch_axis_are_named_as_they_came():
    net = keras.Sequential([keras.Input((37,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"Received: shape \(37,\)"):
        certify(net, (np.zeros(37, "float32") for _ in range(6)))


class Pipeline:
    """What `blocks` knows a tf.data pipeline by."""

    element_spec = None

    def __init__(self, batches):
        self.batches, self.threads = batches, []

    def cardinality(self):
        return -2  # unknown

    def __iter__(self):
        for batch in self.batches:
            self.threads.append(threading.current_thread())
            if isinstance(batch, Exception):
                raise batch
            yield batch


def test_a_pipeline_is_read_in_another_thread_one_block_ahead():
    x = np.arange(30.0).reshape(10, 3)
    source, seen = Pipeline([x[i : i + 2] for i in range(0, 10, 2)]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeding, "SMALLEST_BLOCK", 1)
        for (block,), labels in feeding.blocks(source, None, Inputs.of(model())):
            assert labels is None
            seen.append(block)
            # What is ahead is one block, however long this one takes.
            assert len(source.threads) <= len(seen) + 1
    assert np.array_equal(np.concatenate(seen), x) and len(seen) == 5
    assert threading.current_thread() not in source.threads


def test_errors_of_a_pipeline_come_through_and_whoever_stops_early_ends_its_thread():
    x = np.ones((2, 3))
    found = feeding.blocks(Pipeline([x, OSError("gone")]), None, Inputs.of(model()))
    with pytest.raises(OSError, match="gone"):
        list(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeding, "SMALLEST_BLOCK", 1)
        some = feeding.blocks(source := Pipeline([x] * 9), None, Inputs.of(model()))
        next(some)
        some.close()
    assert len(source.threads) <= 3
    assert not any(thread.is_alive() for thread in source.threads)
