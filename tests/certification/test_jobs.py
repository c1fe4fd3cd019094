"""One certificate, whether one process or several searched around the inputs, or several."""

import itertools

import joblib
import keras
import numpy as np
import pytest
from keras import layers
from small_networks import network_of

from tf_lyapunov.certification import Certificate, certify, register_gain
from tf_lyapunov.errors import DistributionError, OutputFileError
from tf_lyapunov.local import linear, radii, slopes
from tf_lyapunov.local.boxes import Effort
from tf_lyapunov.local.recording import Record

N = 6


@pytest.fixture(scope="module", autouse=True)
def short_searches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(radii, "_SMALL", (Effort(1, (0.0, 0.3), 4, (0.0, 0.1)),) * 2)
        patch.setattr(radii, "_ENOUGH", 0)
        patch.setattr(radii, "_MANY", 0)
        yield


@pytest.fixture(scope="module")
def model(short_searches):
    return network_of("dense")


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(N, 5)).astype("float32")


@pytest.fixture(scope="module")
def alone(model, x):
    return certify(model, x, method="linear")


def same(first, second):
    """Whether nothing differs but the seconds that words mention."""
    for name in ("radius", "margins", "labels", "predictions"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert len(first.assumptions) == len(second.assumptions)
    words = zip(first.assumptions, second.assumptions, strict=True)
    assert all(a == b or (" s. " in a and a[:40] == b[:40]) for a, b in words)
    assert first.gain_upper_bound == second.gain_upper_bound
    return True


def threads(jobs=2):
    return joblib.parallel_config(backend="threading", n_jobs=jobs)


class Counting:
    """Counts the searches, and stops before number `stop`."""

    def __init__(self, monkeypatch, search, stop=None, error=KeyboardInterrupt):
        self.count, whole = 0, search.__call__

        def counted(this, task):
            if self.count == stop:
                raise error
            self.count += 1
            return whole(this, task)

        monkeypatch.setattr(search, "__call__", counted)


@pytest.mark.parametrize("jobs", [2, None])
def test_several_workers_prove_what_one_proves_bit_for_bit(model, x, alone, tmp_path, jobs):
    assert np.all(alone.radius > 0) and alone.proof.records
    with threads():
        found = certify(model, x, method="linear", jobs=jobs)
    assert same(found, alone) and found.to_json() == alone.to_json()
    for name, proof in (("alone", alone), ("found", found)):
        proof.save(tmp_path / f"{name}.npz")
    files = [(tmp_path / f"{name}.npz").read_bytes() for name in ("alone", "found")]
    assert files[0] == files[1]


@pytest.mark.parametrize("norm, bounds", [("linf", None), ("l1", None), ("l2", (-4.0, 4.0))])
def test_so_they_do_in_other_norms_and_within_bounds(model, x, norm, bounds):
    kwargs = dict(method="linear", norm=norm, bounds=bounds)
    with threads():
        assert same(certify(model, x, jobs=2, **kwargs), certify(model, x, **kwargs))


@pytest.mark.parametrize("method", ["auto", "local", "lipsdp", "composition"])
def test_so_they_do_by_every_method(x, method):
    keras.utils.set_random_seed(0)
    chain = keras.Sequential(
        [keras.Input((5,)), layers.Dense(6, activation="relu"), layers.Dense(3)]
    )
    with threads():
        found = certify(chain, x, method=method, jobs=2)
    assert same(found, certify(chain, x, method=method))


def test_a_step_that_only_keras_evaluates_is_evaluated_here(x):
    class Halved(layers.Layer):
        def call(self, inputs):
            return keras.ops.sin(inputs) / 2

    register_gain(Halved, lambda layer: 0.5, assumption="The slope of sin is at most 1.")
    inner = layers.Dense(4, kernel_initializer="orthogonal", activation="relu")
    model = keras.Sequential([keras.Input((5,)), inner, Halved(), layers.Dense(3)])
    alone = certify(model, x, method="linear")
    assert any("by their gain alone" in text for text in alone.assumptions)
    with threads():
        assert same(certify(model, x, method="linear", jobs=2), alone)


# States -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "local"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_call_continues_from_its_file(x, method, jobs, tmp_path, monkeypatch):
    keras.utils.set_random_seed(0)
    chain = keras.Sequential(
        [keras.Input((5,)), layers.Dense(6, activation="relu"), layers.Dense(3)]
    )
    alone = certify(chain, x, method=method)
    search = linear.Search if method == "linear" else slopes.Slopes
    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        Counting(patch, search, stop=4)
        with pytest.raises(KeyboardInterrupt, match=f"4 of {N} inputs are finished and kept in"):
            certify(chain, x, method=method, state=state)
    counting = Counting(monkeypatch, search)
    with threads():
        found = certify(chain, x, method=method, state=state, jobs=jobs)
    assert counting.count == N - 4 and same(found, alone)
    with threads():
        again = certify(chain, x, method=method, state=state, jobs=jobs)
    assert counting.count == N - 4 and same(again, alone)
    if method == "linear":
        for name, proof in (("alone", alone), ("again", again)):
            proof.save(tmp_path / f"{name}.npz")
        assert (tmp_path / "alone.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()


def test_lost_workers_leave_what_is_finished(model, x, alone, tmp_path, monkeypatch):
    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        Counting(patch, linear.Search, stop=3, error=DistributionError("Workers were lost."))
        with pytest.raises(DistributionError, match=f"lost. 3 of {N} inputs are finished and kept"):
            certify(model, x, method="linear", state=state)
        with pytest.raises(DistributionError, match=r"are finished and lost. Pass `state="):
            certify(model, x, method="linear")
    counting = Counting(monkeypatch, linear.Search)
    assert same(certify(model, x, method="linear", state=state), alone)
    assert counting.count == N - 3


@pytest.fixture(scope="module")
def finished(model, x, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "state"
    certify(model, x, method="linear", state=path)
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=lambda x: x + 1), "other inputs"),
        (dict(x=lambda x: x[:-1]), "other inputs"),
        (dict(y=[1] * N), "other labels"),
        (dict(norm="linf"), "other settings: norm='l2' there, 'linf' here"),
        (dict(bounds=(-9, 9)), r"other settings: bounds=None there, \[-9.0, 9.0\] here"),
        (dict(method="auto"), "other settings: method='linear' there, 'auto' here"),
        (dict(precision="float64"), "logits of another precision"),
        (dict(model=lambda: network_of("residual")), "another model"),
        (dict(method="composition"), "`state` keeps searches around inputs"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(model, x, finished, change, message):
    before = finished.read_bytes()
    given = dict(model=model, x=x, method="linear", state=finished) | change
    given["x"] = given["x"](x) if callable(given["x"]) else x
    if "model" in change:
        given["model"] = change["model"]()
        given["x"] = x[:, : given["model"].input_shape[1]]
    with pytest.raises(ValueError, match=f"{message}.*Received: "):
        certify(given.pop("model"), given.pop("x"), **given)
    assert finished.read_bytes() == before


def damaged(data):
    """The file cut short, one bit of it changed at many places, and other files."""
    yield data[:-100]
    yield b""
    yield b"no archive"
    for place in np.linspace(0, len(data) - 1, 25).astype(int):
        yield data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


def test_a_damaged_file_is_refused_or_says_the_same(model, x, alone, finished, tmp_path):
    refused = 0
    for i, data in enumerate(damaged(finished.read_bytes())):
        path = tmp_path / str(i)
        path.write_bytes(data)
        try:
            found = certify(model, x, method="linear", state=path)
        except ValueError as error:
            refused += "is damaged" in str(error)
        else:
            assert same(found, alone)  # bytes of an archive that mean nothing
    assert refused >= 20


def test_what_time_cut_short_is_done_again(model, x, alone, tmp_path, monkeypatch):
    state, clock = tmp_path / "state", itertools.count()
    whole = linear.Search.__call__

    def late(self, task):
        finding = whole(self, task)
        cut = next(clock) % 2 == 1
        return finding if not cut else type(finding)(finding.start, finding.start, None, False)

    with monkeypatch.context() as patch:
        patch.setattr(linear.Search, "__call__", late)
        first = certify(model, x, method="linear", state=state)
    assert np.all(first.radius <= alone.radius) and np.any(first.radius < alone.radius)
    counting = Counting(monkeypatch, linear.Search)
    assert same(certify(model, x, method="linear", state=state), alone)
    assert counting.count == N // 2


def test_records_that_are_too_large_are_neither_kept_nor_missed(
    model, x, alone, tmp_path, monkeypatch
):
    state = tmp_path / "state"
    size = next(iter(alone.proof.records.values())).nbytes
    monkeypatch.setattr(linear, "LARGEST_RECORDS", 3 * size)
    for _ in range(2):
        found = certify(model, x, method="linear", state=state)
        assert np.array_equal(found.radius, alone.radius) and found.proof.records is None
    assert state.stat().st_size < 5000


def test_records_come_back_as_they_were(model, x, alone, finished):
    again = certify(model, x, method="linear", state=finished)
    assert again.proof.records.keys() == alone.proof.records.keys()

    def flat(value):
        if isinstance(value, np.ndarray):
            return [value.dtype.str, value.shape, value.tobytes()]
        if hasattr(value, "__dataclass_fields__"):
            return [type(value).__name__, *(flat(getattr(value, k)) for k in vars(value))]
        if isinstance(value, dict):
            return [(k, flat(v)) for k, v in value.items()]
        return [flat(v) for v in value] if isinstance(value, (list, tuple)) else value

    for i, record in alone.proof.records.items():
        assert isinstance(again.proof.records[i], Record)
        assert flat(again.proof.records[i]) == flat(record)


def test_a_place_that_cannot_be_written_is_refused_before_the_search(model, x, tmp_path):
    for path in (tmp_path, tmp_path / "none" / "state"):
        with pytest.raises(OutputFileError, match="Received"):
            certify(model, x, method="linear", state=path)


def test_a_disk_that_fills_up_meanwhile_ends_no_search(model, x, alone, tmp_path, monkeypatch):
    from tf_lyapunov.certification import state as states

    written, whole = [], states.write_bytes

    def full(path, data):
        if written:
            raise OutputFileError("The file cannot be written: no space. Received: it.")
        written.append(whole(path, data))

    monkeypatch.setattr(states, "write_bytes", full)
    with pytest.warns(UserWarning, match="could not be kept"):
        found = certify(model, x, method="linear", state=tmp_path / "state")
    assert isinstance(found, Certificate) and same(found, alone)


@pytest.mark.parametrize("jobs", [0, 1.5, True])
def test_jobs_are_checked_before_anything_is_done(model, x, jobs):
    with pytest.raises((TypeError, ValueError), match=f"Received: jobs={jobs}"):
        certify(model, x, jobs=jobs)
