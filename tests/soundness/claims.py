"""One checker per kind of claim: what the library says of a case, against the oracles.

A checker yields `Violation`s. A refusal (`UnsupportedLayerError`, `ValueError`) is no violation;
any other exception is one, of kind "crash".
"""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from unittest import mock

import keras
import numpy as np
from soundness import oracles
from soundness.around import local
from soundness.asking import Refused, Violation, asked, exact, functions

import tf_lyapunov as tfl
from tf_lyapunov.errors import UnfaithfulReading

METHODS = ("composition",) * 6 + (
    "liplt",
    "closed_form",
    "eclipse",
    "local",
    "linear",
    "auto",
    "lipsdp",
)
PRECISIONS = ("auto", "auto", "model", "float64")


def _choice(case, choices):
    return choices[int(np.random.default_rng([case.seed, 7]).integers(len(choices)))]


def radius(case):
    """No perturbation inside a certified radius changes the decision."""
    method = getattr(case, "method", None) or _choice(case, METHODS)
    precision = getattr(case, "precision", None) or _choice(case, PRECISIONS)
    certificate = asked(
        tfl.certify,
        case.model,
        case.argument(case.x),
        method=method,
        precision=precision,
        time_budget=2.0,
    )
    own, twin = functions(case)
    for flip in oracles.false_radii(
        own,
        case.x,
        certificate,
        twin=twin,
        threshold=case.threshold,
        dtype=case.input_dtype,
        seed=case.seed,
    ):
        yield Violation(f"radius/{method}", case.seed, f"{precision}: {flip}")
    exactly = None if twin is None else twin(case.x)
    for i in np.flatnonzero(certificate.radius > 0) if exactly is not None else ():
        label, row = int(certificate.labels[i]), exactly[i : i + 1]
        if oracles.margin(row, label, case.threshold)[0] < -1e-9 * np.max(np.abs(row)):
            text = f"{precision}: input {i}, exact outputs {row}, label {label}"
            yield Violation("radius/exact", case.seed, text)


def gain(case):
    """No secant exceeds the proven gain of the model's outputs."""
    bound = asked(tfl.lipschitz_upper_bound, case.model, outputs="model").gain_upper_bound
    function, dtype = exact(case)
    found = oracles.measured_gain(function, case.x.shape[1:], seed=case.seed, dtype=dtype)
    # A constant, such as a group of one entry normalized, leaves the noise of what cancels in it.
    noise = 1e-6 if bound == 0 else 0.0
    if not found <= bound * (1 + oracles.GAIN_SLACK) + noise:
        yield Violation("gain", case.seed, f"measured {found:.6g}, proved {bound:.6g}")


def metric(case):
    """No sample that `CertifiedAccuracy` counts changes its decision within the radius."""
    own, _ = functions(case)
    searched, dtype = exact(case)
    outputs, exactly = own(case.x), searched(case.x.astype(dtype))
    single = outputs.shape[1] == 1
    labels = [oracles.decision(row, case.threshold) for row in outputs]
    bound = asked(tfl.lipschitz_upper_bound, case.model, outputs="model").gain_upper_bound
    margins = [
        oracles.margin(outputs[i : i + 1], c, case.threshold)[0] for i, c in enumerate(labels)
    ]
    positive = [m for m in margins if m > 0] or [0.0]
    size = float(np.median(positive)) / max(bound * (1 if single else np.sqrt(2)), 1e-300) * 0.9
    if not 1e-30 < size < 1e30:
        return
    counted = asked(tfl.metrics.CertifiedAccuracy, size, gain=case.model)
    if not single:
        # A label that names no class is counted by nobody, least of all for low logits.
        asked(counted.reset_state)
        low = np.minimum(outputs, -10.0 * size * (1 + bound)).astype("float32")
        counted.update_state(np.full(len(low), -1), low)
        if float(counted.result()) > 0:
            yield Violation("metric", case.seed, "label -1 counted")
    rows = []
    for index, label in enumerate(labels):
        asked(counted.reset_state)
        counted.update_state(np.array([label]), outputs[index : index + 1].astype("float32"))
        # Rounding, flushing and overflow are not taken off, as it says: it sees no inputs.
        margin = oracles.margin(exactly[index : index + 1], label, case.threshold)[0]
        if float(counted.result()) == 1.0 and margin >= margins[index] * (1 - 5e-5):
            rows.append(index)
    for flip in oracles.find_flips(
        searched,
        case.x[rows],
        [labels[index] for index in rows],
        [size] * len(rows),
        threshold=case.threshold,
        dtype=dtype,
    ):
        if flip is not None and flip.margin < 1e300:
            yield Violation("metric", case.seed, str(flip))


def proof(case):
    """A file that `verify` accepts claims no radius that an oracle contradicts."""
    certificate = asked(tfl.certify, case.model, case.argument(case.x))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proof.npz"
        asked(certificate.save, path)
        found = asked(tfl.verification.verify, path, case.model)
    if not found.holds:
        return
    accepted = dataclasses.replace(certificate, radius=found.claimed_radius)
    function, _ = exact(case)
    for flip in oracles.false_radii(
        function, case.x, accepted, threshold=case.threshold, dtype=case.input_dtype
    ):
        yield Violation("proof", case.seed, str(flip))


@dataclasses.dataclass(frozen=True)
class Accepted:
    """Radii and labels of a file that `verify` accepts."""

    radius: np.ndarray
    labels: np.ndarray


def forged(case):
    """No file about another model, or edited and given a digest anew, proves what is false."""
    from tf_lyapunov.verification import archive

    if len(case.shapes) != 1:
        raise Refused("a proof file is about one input")
    shape = tuple(case.shapes[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proof.npz"
        if len(shape) == 3 and isinstance(
            case.model.layers[0], keras.layers.GlobalAveragePooling2D
        ):
            asked(_about_larger_images, case, path)
        else:
            certificate = asked(tfl.certify, case.model, case.argument(case.x))
            asked(certificate.save, path)
            header, arrays = archive.read(path)
            arrays = {name: np.array(value) for name, value in arrays.items()}
            _edit(np.random.default_rng([case.seed, 11]), header, arrays)
            archive.write(path, header, arrays)
        found = asked(tfl.verification.verify, path, case.model)
        if not found.holds:
            return
        arrays = {name: np.array(value) for name, value in archive.read(path)[1].items()}
    inputs = arrays["inputs"]
    if inputs.shape[1:] != shape:
        yield Violation("forged", case.seed, f"inputs of shape {inputs.shape} accepted")
        return
    function, _ = exact(case)
    accepted = Accepted(arrays["radius"], arrays["labels"])
    for flip in oracles.false_radii(
        function, inputs, accepted, threshold=case.threshold, dtype=case.input_dtype
    ):
        yield Violation("forged", case.seed, str(flip))


def _edit(rng, header, arrays):
    """One false statement."""
    form = int(rng.integers(6))
    if form == 0:
        arrays["radius"] = arrays["radius"] * 1.5
    elif form == 1:
        arrays["labels"] = np.roll(arrays["labels"], 1)
        arrays["predictions"] = arrays["labels"]
    elif form == 2:
        arrays["inputs"] = arrays["inputs"] + np.float32(0.5)
    elif form == 3:
        arrays["inputs"] = np.rint(arrays["inputs"]).astype(rng.choice(["int64", "uint64"]))
    elif form == 4:
        header["certificate"]["gain_upper_bound"] = 1e-3
        arrays["radius"] = arrays["radius"] * 100
    else:
        header["certificate"]["float_allowance"] = "inf"
        arrays["margins"] = arrays["margins"] * 100


def _about_larger_images(case, path):
    """A file about the same layers behind an input of open size."""
    layers = [type(layer).from_config(layer.get_config()) for layer in case.model.layers]
    shape = (None, None, *case.model.inputs[0].shape[3:])
    other = keras.Sequential([keras.Input(shape), *layers])
    other.set_weights(case.model.get_weights())
    x = np.random.default_rng(case.seed).normal(size=(3, 40, 40, *shape[2:])).astype("float32")
    tfl.certify(other, x).save(path)


def exported(case):
    """`export_plain` computes the same function, to float noise."""
    plain = asked(tfl.export_plain, case.model)
    x = case.argument(case.x)
    ours, theirs = oracles.evaluate(case.model, x), oracles.evaluate(plain, x)
    noise = 1e-4 + oracles.NOISE[case.policy.removeprefix("mixed_")]
    scale = max(np.max(np.abs(ours)), 1e-30)
    if ours.shape != theirs.shape or np.max(np.abs(ours - theirs)) > noise * scale:
        yield Violation("export", case.seed, f"outputs {ours[0]} and {theirs[0]}")


def indices(case):
    """The supply rate of a dense layer's indices is never negative on pairs of signals."""
    dense = [
        layer
        for layer in case.model.layers
        if type(layer) is keras.layers.Dense and layer.compute_dtype == "float32"
    ]
    for layer in dense[:1]:
        slope = 0.3
        sector = tfl.Sector.of("leaky_relu", negative_slope=slope)
        found = asked(tfl.layer_indices, layer, sector)
        kernel = np.asarray(layer.kernel, dtype=np.float64)
        if not np.any(kernel):
            return
        rng = np.random.default_rng(case.seed)
        u = rng.normal(size=(64, 2, kernel.shape[0]))
        u = np.concatenate([u, -u, u @ (kernel @ kernel.T) / np.linalg.norm(kernel) ** 2])
        values = u @ kernel
        values = np.where(values > 0, values, slope * values)
        du, dy = u[:, 0] - u[:, 1], values[:, 0] - values[:, 1]
        shared = min(du.shape[1], dy.shape[1])
        inner = np.sum(du[:, :shared] * dy[:, :shared], axis=1)
        power = found.delta * np.sum(dy**2, axis=1) + found.nu * np.sum(du**2, axis=1)
        if np.any(inner - power < -1e-9 * (np.abs(inner) + np.sum(du**2, axis=1))):
            yield Violation("indices", case.seed, f"δ {found.delta}, ν {found.nu}")


def _trained(case):
    """The model after constrained training under a monitor, or `Refused`."""
    model, rng = case.model, np.random.default_rng(case.seed)
    number = case.seed // 50  # one in fifty is trained
    try:
        model(case.argument(case.x[:2]), training=True)
    except Exception as error:  # a hue, say, of images with one channel: backends raise many kinds
        raise Refused(f"Keras itself does not train it: {error}") from error
    # Clipped steps of one length, so that growth bounds are nearly attained; many at once.
    together = number % 4 == 2
    amortised = together or bool(number % 2)
    asked(tfl.lipschitz_upper_bound, model)
    count = asked(_count_stages, model)
    asked(
        tfl.constrain,
        model,
        [1.0] * count,
        guarantee="monitor" if amortised else "step",
        every=3,
    )
    monitor = tfl.callbacks.LyapunovMonitor(verbose=0, on_violation="ignore")
    grown = []

    class Watch(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            try:
                bounds = tfl.growth_upper_bounds(model)
            except ValueError:
                bounds = {}
            self.bounds = bounds

        def on_train_batch_end(self, batch, logs=None):
            if hasattr(self.model, "jax_state_sync"):  # between epochs' ends JAX holds the weights
                self.model.jax_state_sync()
            for layer, variables in _kernels(model):
                for variable in variables:
                    if variable.path in self.bounds and type(layer) is keras.layers.Dense:
                        norm = np.linalg.norm(np.asarray(variable, dtype=np.float64), 2)
                        if norm > self.bounds[variable.path] * (1 + 1e-6):
                            grown.append((variable.path, norm, self.bounds[variable.path]))

    # Steps are compiled for few alone: tracing takes seconds.
    optimizer = keras.optimizers.Adam(0.1)
    if together:
        optimizer = keras.optimizers.SGD(1.0, clipnorm=1.0)
    model.compile(
        optimizer,
        "mse",
        run_eagerly=bool(number % 8),
        steps_per_execution=12 if together else 1,
    )
    x = np.concatenate([case.x] * 12)
    y = rng.normal(size=(len(x), oracles.evaluate(model, case.argument(x[:1])).shape[-1])) * 10
    if together:
        y = 1e5 * np.sign(x.reshape(len(x), -1) @ np.ones((x[0].size, y.shape[1])))
    # Three steps: the next guaranteed projection comes with the last of them.
    used = 48 if together else 12
    x = case.argument(x[:used])
    # What steers kernels between guaranteed projections guarantees nothing: bounds hold without it.
    steered = mock.patch.object(tfl.constraints.SpectralBound, "_steer", lambda self, k, map_: k)
    with steered if amortised else contextlib.nullcontext():
        asked(model.fit, x, y[:used], batch_size=4, verbose=0, callbacks=[Watch(), monitor])
    return monitor, grown


def _kernels(model):
    for layer in model._flatten_layers():
        yield layer, layer._trainable_variables


def _count_stages(model):
    from tf_lyapunov.certification import stages

    return len(stages(model))


def training(case):
    """What the monitor reports after `fit` and the growth bounds hold of the trained model."""
    monitor, grown = _trained(case)
    for path, norm, bound in grown:
        yield Violation("growth", case.seed, f"{path}: {norm} above {bound}")
    own, _ = functions(case)
    if case.policy not in ("float32", "float64"):
        return
    found = oracles.measured_gain(own, case.x.shape[1:], dtype=case.input_dtype, scales=(1.0, 5.0))
    claimed = monitor.readings[-1].gain_upper_bound
    if found > claimed * (1 + 1e-4):
        yield Violation("monitor", case.seed, f"measured {found:.6g}, reported {claimed:.6g}")


# Kind: (checker, one in so many seeds). The rarer ones cost more or vary less.
CHECKERS = {
    "radius": (radius, 1),
    "gain": (gain, 1),
    "metric": (metric, 10),
    "proof": (proof, 12),
    "forged": (forged, 16),
    "export": (exported, 20),
    "indices": (indices, 15),
    "local": (local, 20),
    "training": (training, 50),  # last: the weights are others then
}


@dataclasses.dataclass
class Checked:
    """Outcome of one case.

    Attributes:
        claims: kinds of claims that were made, each once.
        refused: whether no radius was proved.
        misread: whether validation found that the model was read wrongly, and refused it.
        violations: list of `Violation`.
    """

    claims: list
    refused: bool = False
    misread: bool = False
    violations: list = dataclasses.field(default_factory=list)


def check(case, kinds=None):
    """`Checked` of a case, over the kinds or those its seed is due."""
    found = Checked([])
    for name, (checker, period) in CHECKERS.items():
        if name not in kinds if kinds else case.seed % period:
            continue
        try:
            violations = list(checker(case))
        except Refused as refusal:
            found.refused |= name == "radius"
            found.misread |= isinstance(refusal.__cause__, UnfaithfulReading)
            continue
        except Exception as error:
            text = f"{name}: {type(error).__name__}: {str(error)[:200]}"
            found.violations.append(Violation("crash", case.seed, text))
            continue
        found.claims.append(name)
        found.violations += violations
    return found
