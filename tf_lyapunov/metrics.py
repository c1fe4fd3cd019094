"""Keras metrics of certified robustness, from logits and a Lipschitz constant.

The constant should be *measured*: give the metric the model, and it computes the bound from the
weights at every `reset_state`, that is once before every evaluation and every epoch. A number is
taken at its word.
"""

import concurrent.futures
import math
import numbers

import keras
import numpy as np
from keras import ops

from tf_lyapunov.bounds.composition import lipschitz_constants
from tf_lyapunov.losses.labels import margins, names_one_class, unchecked_one_hot, value
from tf_lyapunov.program.network import read_network

# Rounding of the margin and of its comparison in float32, with room to spare.
_SLACK = 1 + 16 * 2.0**-24
# What stands for logit 0 in the outputs of a single unit.
_THRESHOLDS = {"sigmoid": 0.5, "log_sigmoid": math.log(0.5)}


class _CertifiedMetric(keras.metrics.Metric):
    """Mean over samples of a function of the certified radius.

        radius = (f_y - max_{j≠y} f_j) / (√2·L),   or  ±f/L for a single logit,

    negative for wrong decisions.
    """

    def __init__(self, gain, name, dtype=None, from_logits=None):
        super().__init__(name=name, dtype=dtype)
        if from_logits not in (True, False, None):
            raise TypeError(
                "`from_logits` must be True, False (probabilities) or None (unknown). "
                f"Received: from_logits={from_logits!r}."
            )
        self.from_logits = from_logits
        self.total = self.add_variable((), "zeros", name="total")
        self.count = self.add_variable((), "zeros", name="count")
        # Replicas must not sum it. Infinite until it is measured: nothing is certified.
        self.gain = self.add_variable(
            (),
            keras.initializers.Constant(math.inf),
            dtype="float32",
            aggregation="only_first_replica",
            name="gain",
        )
        # Of a single output: where its decision changes.
        self.threshold = self.add_variable(
            (),
            "zeros",
            dtype="float32",
            aggregation="only_first_replica",
            name="threshold",
        )
        self.bind(gain)

    def bind(self, gain):
        """Sets where the constant comes from: see `gain` of the class. Returns the metric."""
        self._declared, self._is_measured = None, False
        # Where a model is not there to ask, one output may be a logit or a probability.
        self._is_ambiguous = self.from_logits is None and not isinstance(gain, keras.Model)
        self.threshold.assign(0.5 if self.from_logits is False else 0.0)
        if gain is None:
            self._measure = lambda: math.inf
        elif isinstance(gain, numbers.Real) and not isinstance(gain, bool):
            if not (math.isfinite(gain) and gain >= 0):
                raise ValueError(
                    f"`gain` must be a finite number ≥ 0. Received: gain={gain}. Pass the model to "
                    "have it measured."
                )
            self._declared = float(gain)
            self._measure = lambda: self._declared
        elif isinstance(gain, keras.Model):
            # A closure: the metric must not save the model as a part of itself.
            self._measure = lambda: self._measured(gain)
        elif callable(gain):
            self._measure = gain
        else:
            raise TypeError(
                "`gain` must be a model, a function without arguments, a number or None. "
                f"Received: gain={gain!r}."
            )
        self.gain.assign(math.inf if self._declared is None else _float32_up(self._declared))
        return self

    def _measured(self, model):
        network = read_network(model)
        self.threshold.assign(_THRESHOLDS.get(network.decision, 0.0))
        return lipschitz_constants(network)[network.output]

    def reset_state(self):
        """Starts anew, and measures the constant of the model's present weights."""
        self.total.assign(0.0)
        self.count.assign(0.0)
        self._take_gain()

    def _take_gain(self):
        gain = float(self._measure())
        if math.isnan(gain) or gain < 0:
            raise ValueError(f"A Lipschitz constant must be a number ≥ 0. Received: {gain}.")
        self.gain.assign(_float32_up(gain))
        self._is_measured = True

    def _take_gain_unless_reset(self, y_pred):
        """Keras resets no metric before the first batch after `compile`: the constant is missing.

        A function is traced then, always anew after `compile`. A thread has no graph, so that
        values are there even while this one traces.
        """
        is_traced = value(y_pred) is None
        if self._is_measured and not is_traced:
            return
        if is_traced and keras.backend.backend() == "jax":
            return  # it builds metrics before it resets them, and holds the weights meanwhile
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            threads.submit(self._take_gain).result()

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        self._take_gain_unless_reset(y_pred)
        is_label = names_one_class(y_true, y_pred)
        if keras.backend.standardize_dtype(y_pred.dtype) != "float64":
            y_pred = ops.cast(y_pred, "float32")
        if y_pred.shape[-1] == 1:
            sign = ops.where(ops.reshape(y_true, (-1,)) > 0, 1.0, -1.0)
            sign, output = ops.cast(sign, y_pred.dtype), ops.reshape(y_pred, (-1,))
            margin, factor = sign * (output - ops.cast(self.threshold, y_pred.dtype)), 1.0
            if self._is_ambiguous:
                # Possibly probabilities: what holds for both thresholds.
                probable = ops.all((output >= 0) & (output <= 1))
                both = ops.minimum(sign * output, sign * (output - 0.5))
                margin = ops.where(probable, both, margin)
        else:
            if len(y_true.shape) < len(y_pred.shape) or y_true.shape[-1] == 1:
                known = ops.reshape(is_label, ops.shape(y_true))
                y_true = ops.where(known, y_true, ops.zeros_like(y_true))
            margin, factor = margins(unchecked_one_hot(y_true, y_pred), y_pred), math.sqrt(2.0)
        scale = ops.cast(self.gain, margin.dtype) * (factor * _SLACK)
        # An overflow certifies nothing.
        margin = ops.where(ops.isfinite(margin), margin, ops.zeros_like(margin))
        values = ops.cast(self._values(margin, scale), self.dtype)
        weight = ops.ones_like(values)
        if sample_weight is not None:
            weight = ops.reshape(ops.cast(sample_weight, self.dtype), (-1,))
            weight = weight * ops.ones_like(values)
        # Compiled code cannot raise: no number stands for labels that name no class.
        values = ops.where(is_label, values, math.nan)
        self.total.assign_add(ops.sum(ops.where(weight > 0, values * weight, 0.0)))
        self.count.assign_add(ops.sum(weight))

    def result(self):
        return ops.divide_no_nan(self.total, self.count)

    def get_config(self):
        # A model or a function cannot be written: reload, then `bind`.
        own = {"gain": self._declared, "from_logits": self.from_logits}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class CertifiedAccuracy(_CertifiedMetric):
    """Share of samples whose decision is right and provably stays so within a radius.

        mean [ f_y - max_{j≠y} f_j > √2·L·radius ]

    ((f - t)·(±1) > L·radius for a single output; t is 0, or 1/2 for a sigmoid's). Labels are
    class numbers, one-hot rows, rows of -1 and 1 with a single 1, and 0 or -1 and 1 for a single
    output; others make the result NaN. L is a Lipschitz constant of the model's outputs in l2.
    Measured at `reset_state`, it belongs to the weights of that moment: right for `evaluate` and
    the validation of `fit`, but in the training part of an epoch the weights move on, and the
    number is an estimate. Rounding and overflow within the model are not taken off: `certify`
    does that.

    Args:
        radius: non-negative float, in the l2 norm of the model's input.
        gain: where L comes from: a built `keras.Model` (measured from its weights by
            `lipschitz_upper_bound`, `outputs="model"`), a function without arguments that returns
            it, or a number, which is believed. `None`: unknown, nothing counts as certified until
            `bind(...)` is called. Only a number is saved with the metric.
        name: as in Keras; by default with the radius in it.
        dtype: as in Keras.
        from_logits: of a single output and a `gain` that is no model (which knows): whether it is
            a logit (True) or a probability (False). `None`: batches within [0, 1] count as
            certified only where they are so in both senses, others are logits.

    Raises:
        ValueError, TypeError: if the radius or the gain is none.

    Example:

    >>> import numpy as np
    >>> metric = CertifiedAccuracy(radius=1.0, gain=1.0)
    >>> metric.update_state(np.array([0, 0]), np.array([[1.5, 0.0], [1.4, 0.0]]))
    >>> float(metric.result())
    0.5

    Reference: Tsuzuku et al. (2018), Proposition 1.
    """

    def __init__(self, radius, gain=None, name=None, dtype=None, *, from_logits=None):
        is_number = isinstance(radius, numbers.Real) and not isinstance(radius, bool)
        if not is_number or not (math.isfinite(radius) and radius >= 0):
            raise ValueError(f"`radius` must be a finite number ≥ 0. Received: radius={radius!r}.")
        name = name or f"certified_accuracy_{float(radius):.4g}"
        super().__init__(gain, name, dtype, from_logits)
        self.radius = float(radius)

    def _values(self, margin, scale):
        if self.radius == 0:
            return margin > 0
        # Doubly infinite scales stay so: an unmeasured gain certifies nothing.
        return margin > scale * self.radius

    def get_config(self):
        return {**super().get_config(), "radius": self.radius}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class ProvableAverageRobustness(_CertifiedMetric):
    """Mean certified radius; 0 for wrong decisions, or minus the distance they are off.

        mean max(0, radius),   or  mean radius  with `signed=True`,
        radius = (f_y - max_{j≠y} f_j) / (√2·L)

    Args:
        gain: where L comes from, see `CertifiedAccuracy`.
        signed: whether wrong decisions count negatively.
        name, dtype: as in Keras.
        from_logits: see `CertifiedAccuracy`.

    Raises:
        ValueError, TypeError: if the gain is none.

    Example:

    >>> import numpy as np
    >>> metric = ProvableAverageRobustness(gain=1.0)
    >>> metric.update_state(np.array([0, 1]), np.array([[2.0, 0.0], [2.0, 0.0]]))
    >>> round(float(metric.result()), 4)
    0.7071

    Reference: `ProvableAvgRobustness` of deel-lip, with a measured constant.
    """

    def __init__(
        self,
        gain=None,
        signed=False,
        name="provable_average_robustness",
        dtype=None,
        *,
        from_logits=None,
    ):
        super().__init__(gain, name, dtype, from_logits)
        self.signed = bool(signed)

    def _values(self, margin, scale):
        zero = ops.zeros_like(margin)
        # 0/0 of a constant model is no radius.
        quotient = ops.where(ops.equal(margin, 0), zero, margin / scale)
        return quotient if self.signed else ops.maximum(quotient, zero)

    def get_config(self):
        return {**super().get_config(), "signed": self.signed}


def _float32_up(value):
    """Smallest float32 that is not below `value`."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(single if float(single) >= value else np.nextafter(single, np.float32(np.inf)))
