"""Scaling rules, padded batches, precision and compilation: in one process."""

import warnings

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_lyapunov import datasets, losses
from tf_lyapunov.data.arrays import Batches
from tf_lyapunov.errors import ConfigError, DistributionError, RunDirectoryError
from tf_lyapunov.experiments import distribution, execution, files, shares, training
from tf_lyapunov.experiments.distribution import Padded, scaled
from tf_lyapunov.experiments.execution import Execution
from tf_lyapunov.experiments.opening import open_distribution
from tf_lyapunov.experiments.reading import parse_config
from tf_lyapunov.experiments.shares import InOrder, read_ahead
from tf_lyapunov.modelfile import load_model

CONFIG = """
name: small
dataset: {name: blobs}
model: {name: mlp, widths: [8]}
layers: {budgets: [0.9, 1.1]}
training:
  epochs: 2
  batch_size: 20
  optimizer: {name: %s, learning_rate: 0.1}
  loss: {name: cross_entropy, temperature: 0.2}
"""


def config(optimizer="sgd"):
    return parse_config(CONFIG % optimizer)


@pytest.mark.parametrize(
    ("optimizer", "scaling", "rate"),
    [
        ("sgd", "auto", 0.4),
        ("adam", "auto", 0.2),
        ("rmsprop", "auto", 0.2),
        ("adam", "linear", 0.4),
        ("sgd", "sqrt", 0.2),
    ],
)
def test_the_global_batch_and_the_rate_grow_by_rule(optimizer, scaling, rate):
    found = scaled(config(optimizer), 4, scaling).training
    assert found.batch_size == 80 and found.optimizer.learning_rate == pytest.approx(rate)


def test_without_scaling_or_with_one_replica_nothing_changes():
    assert scaled(config(), 4, "none") == config() == scaled(config(), 1, "linear")
    # A scaled run is another run: it is not continued with the old batch.
    assert scaled(config(), 4).training_identity() != config().training_identity()


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 10**6))
def test_the_mean_over_padded_shares_is_the_mean_over_the_batch(count, replicas, seed):
    losses = np.random.default_rng(seed).normal(size=count)
    rows = datasets.Batches(losses, np.zeros(count), batch_size=count, shuffle=False)
    parts = [Padded(rows, replicas, (k, replicas))[0] for k in range(replicas)]
    assert len({len(x) for x, _, _ in parts}) == 1
    means = [np.mean(x * weights.astype(float)) for x, _, weights in parts]
    # The weights are rounded to float32.
    tolerance = np.finfo("float32").eps * np.abs(losses).mean() + 1e-15
    assert abs(np.mean(means) - losses.mean()) <= tolerance
    whole = np.concatenate([x for x, _, _ in parts])
    assert np.array_equal(whole[:count], losses)


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([1, 2, 3, 8]), st.integers(0, 2**31))
def test_validation_counts_every_example_once(count, batch_size, replicas, seed):
    size = -(-batch_size // replicas) * replicas
    values = np.random.default_rng(seed).normal(size=count)
    batches = Padded(InOrder(values, values, size), replicas)
    means, sizes = [], []
    for x, _, weights in batches:
        means.append(np.sum(weights * x) / len(x))
        sizes.append(len(x))
    before = {"loss": np.average(means[:-1], weights=sizes[:-1])} if means[1:] else {}
    logs = {"loss": np.average(means, weights=sizes)}
    found = shares.without_padding(logs, before, batches)["loss"]
    assert found == pytest.approx(values.mean(), abs=1e-5)


def test_losses_of_whole_batches_count_no_copies_that_fill_a_batch_up():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    even, uneven = (Batches(np.zeros((20, 2)), np.zeros(20), batch_size=n) for n in (10, 5))
    tail = Batches(np.zeros((21, 2)), np.zeros(21), batch_size=10)
    for loss in (losses.KR(), losses.HKR(), losses.MulticlassHKR(), losses.MulticlassSoftHKR()):
        model.compile("sgd", loss)
        distribution._check_loss(model, uneven, 1)
        distribution._check_loss(model, even, 2)
        for batches, size in ((uneven, 5), (tail, 1)):
            with pytest.raises(ConfigError, match=f"{type(loss).__name__} on a batch of {size} "):
                distribution._check_loss(model, batches, 2)
    for loss in (losses.MulticlassHinge(), losses.LseHKR()):
        model.compile("sgd", loss)
        distribution._check_loss(model, uneven, 2)


@pytest.mark.parametrize(("batch_size", "warns"), [(4, False), (5, True), (8, True)])
def test_padding_that_enters_normalizations_is_said(batch_size, warns):
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(name="norm")])
    rows = Batches(np.zeros((20, 2)), np.zeros(20), batch_size=batch_size)
    replicas = 4 if batch_size < 8 else 8
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shares.warn_of_padding(model, rows, replicas)
        shares.warn_of_padding(model, rows, 1)
    assert ["'norm'" in str(w.message) for w in caught] == [True] * warns


def test_workers_that_differ_are_told_so():
    assert distribution._same(np.array([3, 3]), "epochs done") == 3
    with pytest.raises(DistributionError, match=r"epochs done. Received: \[3, 0\]"):
        distribution._same(np.array([3, 0]), "epochs done")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "parameter_server"}, "`strategy` must be one of"),
        ({"strategy": "none", "devices": 2}, "Several devices need a strategy"),
        ({"strategy": "mirrored", "devices": 0}, "`devices` must be positive"),
        ({"strategy": "multiworker", "timeout": float("inf")}, "`timeout` must be seconds"),
    ],
)
def test_impossible_distributions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        open_distribution(**arguments)


def test_torch_trains_on_one_device_and_says_what_does_more(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(ValueError, match=r"KERAS_BACKEND=torch. Use tensorflow"):
        open_distribution("mirrored")


def test_xla_under_a_strategy_is_refused():
    replicated = distribution.Replicated("mirrored", None, 2)
    assert replicated.jit_compile(False) is False
    with pytest.raises(ConfigError, match="--jit with --strategy mirrored"):
        replicated.jit_compile(True)


@pytest.mark.parametrize("name", ["strategy", "scaling", "precision"])
def test_unknown_ways_to_execute_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be one of"):
        Execution(**{name: "best"})


def trained(path, run, resume=False, cfg=None):
    with files.RunDirectory(path).open(resume=resume) as opened:
        return training.train(
            cfg or config(), opened, datasets.load("blobs"), execution=run, resume=resume
        )


def weights(model):
    return [keras.ops.convert_to_numpy(w).astype(float) for w in model.weights]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    keras.utils.set_random_seed(0)
    return trained(tmp_path_factory.mktemp("reference") / "run", Execution())


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_leaves_a_float32_model_within_its_budgets(tmp_path, reference, precision):
    done = trained(tmp_path / "run", Execution(precision=precision))
    assert keras.config.dtype_policy().name == "float32"  # as before
    stored = load_model(tmp_path / "run" / files.MODEL)
    assert {layer.compute_dtype for layer in stored.layers} == {"float32"}
    kernels = [w for w in weights(stored) if w.ndim == 2]
    for kernel, budget in zip(kernels, (0.9, 1.1), strict=True):
        assert np.linalg.norm(kernel, 2) <= budget * (1 + 4 * np.finfo(float).eps)
    assert not all(
        np.array_equal(a, b) for a, b in zip(weights(stored), weights(reference.model), strict=True)
    )  # it did compute in 16 bits
    assert done.history[-1]["val_accuracy"] > 0.9
    with pytest.raises(RunDirectoryError, match="another configuration"):
        trained(tmp_path / "run", Execution(), resume=True)


def test_the_monitor_judges_the_kernel_that_computes():
    """The cast to bfloat16 takes a kernel at its bound past it, and the reading says so."""
    import tf_lyapunov as tfl

    with execution.precision("mixed_bfloat16"):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, use_bias=False)])
    value = 1.0 + 2.0**-8 + 2.0**-10  # rounds up to 1 + 2^-7
    model.layers[0].kernel.assign(value * np.eye(3))
    monitor = tfl.callbacks.LyapunovMonitor(verbose=0)
    monitor.set_model(model)
    (bound,) = monitor.read().sigma_upper_bound.values()
    assert bound >= 1 + 2.0**-7 > value


def test_compiled_and_deterministic_steps_train_to_the_same_weights(tmp_path, reference):
    for name, run in (("jit", Execution(jit=True)), ("again", Execution())):
        model = trained(tmp_path / name, run).model
        for a, b in zip(weights(model), weights(reference.model), strict=True):
            # Fused kernels round differently.
            limit = 0.0 if name == "again" else 256 * np.finfo("float32").eps
            assert np.abs(a - b).max() <= limit


def test_the_monitor_logs_a_proven_bound_of_what_happens_between_projections(tmp_path):
    text = (CONFIG % "adam").replace("  loss:", "  guarantee: monitor\n  every: 4\n  loss:")
    done = trained(tmp_path / "run", Execution(), cfg=parse_config(text))
    row = done.history[-1]
    for name in ("dense_1", "logits"):
        assert row[f"growth_upper_bound/{name}"] > row[f"sigma_upper_bound/{name}"]


@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_batches_read_ahead_come_in_order(length):
    read = []

    class Batches(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    found = list(read_ahead(Batches(range(10, 10 + length))))
    assert found == list(range(10, 10 + length)) and read == list(range(length))


def test_what_reading_ahead_meets_is_raised_in_its_place():
    class Batches(list):
        def __getitem__(self, index):
            if index == 3:
                raise OSError("a damaged file")
            return super().__getitem__(index)

    coming, found = read_ahead(Batches(range(5))), []
    with pytest.raises(OSError, match="damaged"):
        for batch in coming:
            found.append(batch)
    assert found == [0, 1, 2]
