"""Old faults of this library, put back one at a time, to see that something still finds them.

A mutation is a context manager around one seam. Each comes with a specimen, a model in which it
shows, and with what must find it: `"validation"`, the comparison of a model with its reading
(`UnfaithfulReading`), or `"fuzzer"`, the oracles, which are asked with validation switched off.
"""

import contextlib
import dataclasses
import functools
from unittest import mock

import keras
import numpy as np
from soundness import specimens

VALIDATION, FUZZER = "validation", "fuzzer"


@contextlib.contextmanager
def distances_shrunk():
    """Radii with distances a hundredth of what is proved."""
    from tf_lyapunov.certification import margins

    original = margins.pair_distances
    with mock.patch.object(margins, "pair_distances", lambda *a: 0.01 * original(*a)):
        yield


@contextlib.contextmanager
def pairs_without_root_of_two():
    """Radii of pairs of classes that leave out √2 (Tsuzuku's proposition)."""
    from tf_lyapunov.certification import heads, margins

    with (
        mock.patch.object(margins, "_SQRT2_UP", 0.1),
        mock.patch.object(heads, "_SQRT2_UP", 0.1),
        mock.patch.object(margins, "heads", _none),
    ):
        yield


@contextlib.contextmanager
def logits_of_another_class():
    """Decisions read from the smallest logit."""
    from tf_lyapunov.certification import margins

    def smallest(logits):
        return np.argmin(logits, axis=1).astype(np.int64)

    def radii(logits, labels, *rest, original=margins.certified_radii):
        return original(-logits, labels, *rest)

    with (
        mock.patch.object(margins, "decisions", smallest),
        mock.patch.object(margins, "certified_radii", radii),
    ):
        yield


@contextlib.contextmanager
def metric_gain_measured_low():
    """`CertifiedAccuracy` with a constant of a tenth of the gain."""
    from tf_lyapunov import metrics

    original = metrics._CertifiedMetric._measured
    with mock.patch.object(
        metrics._CertifiedMetric, "_measured", lambda self, model: 0.1 * original(self, model)
    ):
        yield


@contextlib.contextmanager
def steps_of_the_optimizer_unseen():
    """Growth bounds that forget the optimizer's steps."""
    from tf_lyapunov import growth

    with mock.patch.object(growth, "_moves", lambda optimizer, variable, count: [0.0] * count):
        yield


@contextlib.contextmanager
def monitor_gain_halved():
    """A monitor that reports half of its stages' gain."""
    from tf_lyapunov.callbacks import LyapunovMonitor

    original = LyapunovMonitor._gain
    with mock.patch.object(LyapunovMonitor, "_gain", lambda self, b: 0.25 * original(self, b)):
        yield


def _none(*_):
    return None


# Faults of the reader --------------------------------------------------------------------------


@contextlib.contextmanager
def nested_cast_dropped():
    """The type of a nested model's own `Input` is overlooked."""
    from tf_lyapunov.program import graph

    with mock.patch.object(graph._Reader, "_cast", lambda self, model, tensor, *rest: tensor):
        yield


@contextlib.contextmanager
def arguments_dropped():
    """Masks, keywords and arrays in a layer's call are overlooked."""
    from tf_lyapunov.program import graph

    with mock.patch.object(graph, "check_arguments", _none):
        yield


@contextlib.contextmanager
def activation_known_by_its_name():
    """A function counts as the one of Keras that has its name."""
    from tf_lyapunov.program import network
    from tf_lyapunov.program.families import fused

    def named(original):
        def found(layer, *rest):
            kept = layer.activation
            layer.activation = getattr(keras.activations, getattr(kept, "__name__", ""), kept)
            try:
                return original(layer, *rest)
            finally:
                layer.activation = kept

        return found

    with (
        mock.patch.object(fused, "read", named(fused.read)),
        mock.patch.object(network, "fused_gain", named(network.fused_gain)),
    ):
        yield


@contextlib.contextmanager
def replaced_call_ignored():
    """A layer counts as its class, whatever its instance's `call` is."""
    from tf_lyapunov.program import graph, vocabulary

    with (
        mock.patch.object(graph, "check_own_call", _none),
        mock.patch.object(vocabulary, "check_own_call", _none),
    ):
        yield


@contextlib.contextmanager
def reading_cached():
    """A model is read once, and what was read is believed from then on."""
    from tf_lyapunov.bounds import upper_bound
    from tf_lyapunov.certification import margins

    original, kept = margins.read_network, {}

    def read(model, *rest, **options):
        if id(model) not in kept:
            kept[id(model)] = original(model, *rest, **options)
            assert kept[id(model)].program
        return kept[id(model)]

    with (
        mock.patch.object(margins, "read_network", read),
        mock.patch.object(upper_bound, "read_network", read),
    ):
        yield


@contextlib.contextmanager
def another_epsilon():
    """Batch normalizations are read with an ε of 0.1."""
    from tf_lyapunov.program import vocabulary
    from tf_lyapunov.program.families import scaling

    norm = keras.layers.BatchNormalization
    reader, scale = vocabulary.READERS[norm], scaling.BatchNormScale.of

    def with_epsilon(layer, function, *args):
        kept, layer.epsilon = layer.epsilon, 0.1
        try:
            return function(*args)
        finally:
            layer.epsilon = kept

    with (
        mock.patch.dict(
            vocabulary.READERS, {norm: lambda call: with_epsilon(call.operation, reader, call)}
        ),
        mock.patch.object(
            scaling.BatchNormScale, "of", lambda layer: with_epsilon(layer, scale, layer)
        ),
    ):
        yield


@contextlib.contextmanager
def half_precision_taken_for_float32():
    """The unit of float16 and bfloat16 is that of float32."""
    from tf_lyapunov.program import rounding

    single = rounding.UNIT_ROUNDOFF["float32"]
    with mock.patch.dict(rounding.UNIT_ROUNDOFF, {"float16": single, "bfloat16": single}):
        yield


@contextlib.contextmanager
def underflow_ignored():
    """Products never underflow."""
    from tf_lyapunov.program import rounding

    with mock.patch.object(rounding, "underflow", lambda dtype: 0.0):
        yield


@contextlib.contextmanager
def overflow_ignored():
    """Nothing overflows within a ball."""
    from tf_lyapunov.certification import margins

    cut = ("without_overflow", "without_flushing")
    with mock.patch.multiple(margins, **dict.fromkeys(cut, lambda _n, _x, radius, *_: radius)):
        yield


@contextlib.contextmanager
def float64_evaluated_in_float32():
    """The evaluation that is called one in float64 rounds to float32."""
    from tf_lyapunov.program.program import Program

    original = Program.evaluate

    def evaluate(self, x, kept=()):
        logits, values = original(self, x, kept)
        return logits.astype(np.float32).astype(np.float64), values

    with mock.patch.object(Program, "evaluate", evaluate):
        yield


@contextlib.contextmanager
def decision_of_the_exact_logits():
    """A radius is about the class that the logits in float64 name, not about the model's."""
    from tf_lyapunov.certification import margins

    with mock.patch.object(margins, "LogitsModel", margins.Float64Logits):
        yield


@contextlib.contextmanager
def windows_that_overlap_count_once():
    """Max pooling has gain 1 whatever its strides."""
    from tf_lyapunov.program.families import pooling

    with mock.patch.object(pooling, "max_pooling_gain", lambda *a: 1.0):
        yield


@contextlib.contextmanager
def transposed_padding_on_the_other_side():
    """A transposed convolution pads at its other end."""
    from tf_lyapunov.program.families import linear
    from tf_lyapunov.theory import operators

    def axes(shape, linear_map, original=operators.convolution_axes):
        moved = int(linear_map.kind == "conv_transpose")
        return [dataclasses.replace(a, left=a.left + moved) for a in original(shape, linear_map)]

    taps = operators.convolution_taps.__wrapped__  # nothing is remembered
    with mock.patch.object(operators, "convolution_axes", axes):
        with mock.patch.object(linear, "convolution_taps", taps):
            yield


@contextlib.contextmanager
def bias_dropped():
    """Dense layers are read without their bias."""
    from tf_lyapunov.program import vocabulary
    from tf_lyapunov.program.families import linear

    def read(call):
        first, *rest = linear.read(call)
        return [dataclasses.replace(first, bias=None), *rest]

    with mock.patch.dict(vocabulary.READERS, {keras.layers.Dense: read}):
        yield


# Faults of training, of the metric and of proof files -------------------------------------------


@contextlib.contextmanager
def normalization_before_the_first_stage_unseen():
    """The monitor's gain leaves out what stands before its first stage."""
    import tf_lyapunov as tfl
    from tf_lyapunov.callbacks import reading

    original = tfl.constrain

    def constrain(model, *args, **options):
        found = original(model, *args, **options)
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.gamma.constraint = None
        return found

    with (
        mock.patch.object(tfl, "constrain", constrain),
        mock.patch.object(
            reading, "normalizations", lambda s: (*s.batch_norms, *s.post_batch_norms)
        ),
    ):
        yield


@contextlib.contextmanager
def batches_between_hooks_unseen():
    """Growth bounds count hooks of callbacks, not the batches of one execution."""
    import tf_lyapunov as tfl

    original = tfl.growth_upper_bounds

    def bounds(model, steps=None, **options):
        return original(model, steps or 3, **options)

    with mock.patch.object(tfl, "growth_upper_bounds", bounds):
        yield


@contextlib.contextmanager
def label_of_no_class_counted():
    """The metric takes any number for a label."""
    from tf_lyapunov import metrics

    def any_label(y_true, y_pred):
        return keras.ops.ones(keras.ops.shape(y_pred)[:1], "bool")

    def coded(y_true, y_pred):
        return keras.ops.one_hot(keras.ops.cast(y_true, "int32"), y_pred.shape[-1])

    with (
        mock.patch.object(metrics, "names_one_class", any_label),
        mock.patch.object(metrics, "unchecked_one_hot", coded),
    ):
        yield


@contextlib.contextmanager
def input_shape_of_the_file():
    """The verifier believes the shape of inputs that a file names."""
    from tf_lyapunov.verification import reading, rechecking

    unpack, read, named = rechecking.unpack, rechecking.read_with_calls, []

    def unpacked(*args):
        found = unpack(*args)
        named.append(found[2].inputs.shape[1:])
        return found

    with (
        mock.patch.object(rechecking, "unpack", unpacked),
        mock.patch.object(rechecking, "read_with_calls", lambda m, shape: read(m, named[-1])),
        mock.patch.object(reading, "_input_shape", lambda model, given: given),
    ):
        yield


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, the model in which it shows, the claims it falsifies, and what finds it."""

    mutation: object
    specimen: object
    kinds: tuple
    found_by: frozenset


def _fault(mutation, specimen, kinds, *found_by):
    return Fault(mutation, specimen, tuple(kinds.split()), frozenset(found_by))


_chain, _single = (functools.partial(specimens.chain, n) for n in (2, 1))
FAULTS = {
    "pair distances shrunk": _fault(distances_shrunk, _chain, "radius", FUZZER),
    "√2 of a pair left out": _fault(pairs_without_root_of_two, _chain, "radius", FUZZER),
    "another class decides": _fault(logits_of_another_class, _chain, "radius", VALIDATION, FUZZER),
    "metric's gain too low": _fault(metric_gain_measured_low, _single, "metric", FUZZER),
    "label -1 counted": _fault(label_of_no_class_counted, _single, "metric", FUZZER),
    "optimizer's steps unseen": _fault(
        steps_of_the_optimizer_unseen, specimens.executed_together, "training", FUZZER
    ),
    "monitor's gain halved": _fault(monitor_gain_halved, specimens.trained, "training", FUZZER),
    "normalization before the first stage unseen": _fault(
        normalization_before_the_first_stage_unseen, specimens.normalized, "training", FUZZER
    ),
    "batches of one execution unseen": _fault(
        batches_between_hooks_unseen, specimens.executed_together, "training", FUZZER
    ),
    "input shape taken from the file": _fault(
        input_shape_of_the_file, specimens.pooled_images, "forged", FUZZER
    ),
    "nested cast dropped": _fault(
        nested_cast_dropped, specimens.nested_integers, "radius gain", VALIDATION, FUZZER
    ),
    "mask dropped": _fault(arguments_dropped, specimens.masked, "gain radius", VALIDATION, FUZZER),
    "keyword dropped": _fault(
        arguments_dropped, specimens.with_keyword, "radius gain", VALIDATION, FUZZER
    ),
    "array constant without effect": _fault(
        arguments_dropped, specimens.with_array, "radius gain", VALIDATION, FUZZER
    ),
    "activation known by its name": _fault(
        activation_known_by_its_name, specimens.wrapped, "radius gain", VALIDATION, FUZZER
    ),
    "replaced call ignored": _fault(
        replaced_call_ignored, specimens.replaced, "radius gain", VALIDATION, FUZZER
    ),
    "reading cached": _fault(
        reading_cached, specimens.changed_after_use, "radius gain", VALIDATION, FUZZER
    ),
    "another ε": _fault(
        another_epsilon, specimens.small_variance, "radius gain", VALIDATION, FUZZER
    ),
    "bias dropped": _fault(bias_dropped, specimens.biased, "radius", VALIDATION, FUZZER),
    "half precision taken for float32": _fault(
        half_precision_taken_for_float32, specimens.half, "radius", VALIDATION
    ),
    "underflow ignored": _fault(
        underflow_ignored, functools.partial(specimens.tiny, "model"), "radius", VALIDATION, FUZZER
    ),
    "overflow on a ball ignored": _fault(overflow_ignored, specimens.huge, "radius", FUZZER),
    "float64 evaluated in float32": _fault(
        float64_evaluated_in_float32, specimens.double, "radius", FUZZER
    ),
    "decision of the exact logits": _fault(
        decision_of_the_exact_logits, functools.partial(specimens.tiny, "float64"), "radius", FUZZER
    ),
    "windows that overlap count once": _fault(
        windows_that_overlap_count_once, specimens.overlapping, "gain", FUZZER
    ),
    "transposed padding on the other side": _fault(
        transposed_padding_on_the_other_side, specimens.transposed, "radius", VALIDATION
    ),
}


@contextlib.contextmanager
def validation_off():
    """No comparison of a model with its reading: the oracles are alone."""
    from tf_lyapunov.bounds import upper_bound
    from tf_lyapunov.certification import margins
    from tf_lyapunov.program.validation import Validation

    nothing = mock.Mock(return_value=Validation(0, 0, ("switched off",)))
    with (
        mock.patch.object(margins, "validate", nothing),
        mock.patch.object(margins, "check_balls", _none),
        mock.patch.object(upper_bound, "validate_on_probes", nothing),
    ):
        yield


@contextlib.contextmanager
def contradictions():
    """List of every `UnfaithfulReading` raised inside, where nothing earlier is remembered."""
    from tf_lyapunov.errors import UnfaithfulReading

    specimens.forget()
    found, first = [], UnfaithfulReading.__init__

    def noted(self, *args, **kwargs):
        found.append(args)
        first(self, *args, **kwargs)

    with mock.patch.object(UnfaithfulReading, "__init__", noted):
        yield found
    specimens.forget()


def finders(name):
    """`(what finds a fault, at least; texts of crashes)`."""
    from soundness import claims

    fault, found, crashes = FAULTS[name], set(), []
    # Training takes seconds, and validation sees nothing of it.
    runs = (contextlib.nullcontext, validation_off)[: 1 if "training" in fault.kinds else 2]
    for switch in runs:
        with fault.mutation(), switch(), contradictions() as refused:
            violations = claims.check(fault.specimen(), fault.kinds).violations
        if refused and switch is not validation_off:
            found.add(VALIDATION)
        if any(v.kind != "crash" for v in violations):
            found.add(FUZZER)
        crashes += [v.text for v in violations if v.kind == "crash"]
    return found, crashes
