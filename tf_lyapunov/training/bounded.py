"""Training through bounds inside `fit`: IBP, CROWN-IBP and small boxes, on every backend."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.attacks.backend import sum_gradient
from tf_lyapunov.attacks.inputs import checked_bounds, checked_seed
from tf_lyapunov.losses.labels import memberships, one_hot
from tf_lyapunov.theory.balls import L2, Linf
from tf_lyapunov.training.balance import balance
from tf_lyapunov.training.base import TrainingModel
from tf_lyapunov.training.boxes import region_around
from tf_lyapunov.training.boxflow import box_flow, margins
from tf_lyapunov.training.perturbation import refuse_head

METHODS = ("ibp", "crown_ibp", "small_box")
_BALLS = {"l2": L2, "linf": Linf}
# Steps of the attack that places small boxes: how many, their length relative to its radius, and
# the steps from which they are a tenth of that, as published.
_STEPS, _LENGTH, _SHORTER = 8, 0.5, (4, 7)
# Where the smooth warm-up turns linear, and the power before, as published.
_TURN, _POWER = 0.25, 4


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class BoundTraining(TrainingModel):
    """Trains a classifier on the worst logits that bounds allow around every input.

        loss = κ·ℓ(f(x), y) + (1 - κ)·ℓ(-m(x), y) + λ·(1 - ε/radius)·B(x)                 (1)

    ℓ is the compiled loss of logits; m_j is a lower bound of f_y - f_j over the region around x
    with the radius ε now (m_y = 0), so that the second term bounds the loss of every point there;
    B are the regularizers of `balance.balance`. From step `warmup[0]` to `warmup[1]` ε grows from
    0 to the radius, and κ goes from `clean_share[0]` to `clean_share[1]`. Bounds:

    - `"ibp"`: boxes from layer to layer, and the last dense layers taken together for every pair
      of classes;
    - `"crown_ibp"`: from these boxes linear bounds back to the input. Their share in m goes from
      `crown_share[0]` to `crown_share[1]` during the warm-up, that of IBP is the rest;
    - `"small_box"`: the boxes of IBP of radius τ = `small_share`·ε around a point that an attack
      of radius ε - τ found (SABR). That bounds no more than the small box; linear bounds prove
      such networks afterwards.

    For an l2 ball the first linear layer has the norms of its rows; what follows are boxes.

    Batch normalizations bound with the statistics of the clean batch in training, with stored ones
    in `evaluate`; dropout acts on clean logits only. Three metrics beside those compiled, in
    training at ε, in `evaluate` at the whole radius: `bound_loss`, `bound_radius` (ε), and
    `certified_estimate`, the share of samples whose bounds over the region are all positive. They
    are computed in the model's precision, to nearest: an estimate, no guarantee. `certify` proves
    `.plain`, by the same boxes (`method="box"`) or by linear bounds (`method="linear"`).

    `initialize_for_bounds` before training helps. The step number is a weight of this model, so
    that `save` and checkpoints of it resume the warm-up where it was; `.plain.save(...)` writes
    an ordinary model.

    Args:
        model: built classifier of one input that returns logits, or a training method around one.
        region: `Linf(radius)` or `L2(radius)`.
        method: `"ibp"`, `"crown_ibp"` or `"small_box"`.
        bounds: None, or `(low, high)` of valid inputs, numbers or arrays of the shape of an input,
            which the region is cut with; x is clipped to them.
        warmup: steps `(first, last)` between which ε grows.
        schedule: `"linear"`, or `"smooth"`: with the fourth power of the step in the first quarter.
        clean_share: κ at the beginning and the end.
        crown_share: of `"crown_ibp"`, see above.
        small_share: of `"small_box"`, τ/ε in (0, 1].
        regularizer: λ ≥ 0.
        seed: of random starts.

    Raises:
        UnsupportedLayerError: that lists the model's steps without bounds.
        TypeError: if `region` is no ball.
        ValueError: if an argument is out of range, or the model returns probabilities.

    Example:

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, "relu"),
    ...                           keras.layers.Dense(2)])
    >>> robust = BoundTraining(model, Linf(0.1), warmup=(0, 4))
    >>> robust.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = robust.fit(np.eye(2), np.arange(2), epochs=4, verbose=0).history
    >>> [round(r, 6) for r in history["bound_radius"]], robust.plain is model
    ([0.0, 0.025, 0.05, 0.075], True)

    Reference: Gowal et al., "Scalable verified training for provably robust image classification"
    (ICCV 2019); Zhang et al., "Towards stable and efficient training of verifiably robust neural
    networks" (ICLR 2020); Müller, Eckert, Fischer, Vechev, "Certified training: small boxes are
    all you need" (ICLR 2023); B and λ(1 - ε/radius) of Shi et al. (NeurIPS 2021).
    """

    can_be_wrapped = False

    def __init__(
        self,
        model,
        region,
        method="ibp",
        bounds=None,
        warmup=(0, 1000),
        schedule="linear",
        clean_share=(1.0, 0.5),
        crown_share=(1.0, 0.0),
        small_share=0.4,
        regularizer=0.5,
        seed=0,
        **kwargs,
    ):
        super().__init__(model, **kwargs)
        self.region = _checked_region(region)
        self.method = _checked_method(method, region)
        self.valid = checked_bounds(bounds)
        self.warmup = _checked_steps(warmup)
        if schedule not in ("linear", "smooth"):
            raise ValueError(
                f"`schedule` must be 'linear' or 'smooth'. Received: schedule={schedule!r}."
            )
        self.schedule = schedule
        self.clean_share = _checked_shares("clean_share", clean_share)
        self.crown_share = _checked_shares("crown_share", crown_share)
        self.small_share = _checked_share("small_share", small_share)
        if self.small_share == 0:
            raise ValueError("`small_share` must be in (0, 1]. Received: small_share=0.")
        self.regularizer = _not_negative("regularizer", regularizer)
        self.seed = checked_seed(seed)
        refuse_head(self.plain)
        self.flow = box_flow(self.plain)
        self.random = keras.random.SeedGenerator(self.seed)
        # In float32, exact up to 2²⁴ steps, as all devices add.
        self.step = self.add_weight(
            name="step", shape=(), initializer="zeros", dtype="float32", trainable=False,
            autocast=False, aggregation="only_first_replica",
        )  # fmt: skip
        self.bound_loss = keras.metrics.Mean(name="bound_loss")
        self.bound_radius = keras.metrics.Mean(name="bound_radius")
        self.certified_estimate = keras.metrics.Mean(name="certified_estimate")

    # Schedules: functions of the step alone.

    def progress(self):
        """Share of the warm-up that is done, scalar tensor in [0, 1]."""
        first, last = self.warmup
        step = ops.convert_to_tensor(self.step)
        if first == last:
            return ops.cast(step >= first, "float32")
        return ops.clip((step - first) / (last - first), 0.0, 1.0)

    def radius(self):
        """ε now, scalar tensor."""
        done = self.progress()
        if self.schedule == "smooth":
            # A power, then its tangent, which reaches 1 at the end.
            size = 1 / (_TURN**_POWER + _POWER * _TURN ** (_POWER - 1) * (1 - _TURN))
            tangent = _TURN**_POWER + _POWER * _TURN ** (_POWER - 1) * (done - _TURN)
            done = size * ops.where(done < _TURN, done**_POWER, tangent)
            done = ops.minimum(done, 1.0)
        return done * float(self.region.radius)

    def _between(self, ends):
        return ends[0] + (ends[1] - ends[0]) * self.progress()

    # Hooks of the base class.

    def training_inputs(self, x, y):
        x = x if keras.backend.is_float_dtype(x.dtype) else ops.cast(x, keras.config.floatx())
        found = {"clean": x}
        if self.method == "small_box":
            found["center"] = self._attacked(x, y)
        return found

    def call(self, inputs, training=None):
        if isinstance(inputs, dict):
            # The centre of a small box is bounded, not evaluated.
            inputs = {"clean": inputs["clean"]}
        return super().call(inputs, training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not isinstance(y_pred, dict):
            if y is not None:
                radius = ops.convert_to_tensor(float(self.region.radius), "float32")
                worst, _ = self._worst(self._floats(x), y, radius, None)
                self._watch(self._loss_of(x, y, worst, sample_weight), worst, y, radius)
            return self.evaluated(self, x, y, y_pred, sample_weight)
        inputs, found = x, y_pred["clean"]
        clean = self.objective(self, inputs["clean"], y, found, sample_weight)
        radius = self.radius()
        values = self._floats(inputs["clean"])
        center = self._floats(inputs["center"]) if "center" in inputs else None
        worst, signals = self._worst(values, y, radius, values, center)
        bound = self._loss_of(inputs, y, worst, sample_weight)
        kappa = ops.cast(self._between(self.clean_share), bound.dtype)
        loss = kappa * ops.cast(clean, bound.dtype) + (1 - kappa) * bound
        if self.regularizer:
            weight = self.regularizer * (1 - radius / float(self.region.radius))
            loss = loss + ops.cast(weight * balance(self.flow, signals), loss.dtype)
        if center is not None:
            # What the metric is about is the whole region.
            worst, _ = self._worst(values, y, radius, values)
        self._watch(bound, worst, y, radius)
        self.step.assign_add(1.0)
        return loss

    def _floats(self, x):
        x = ops.convert_to_tensor(x)
        kind = keras.backend.standardize_dtype(x.dtype)
        return x if kind == "float64" else ops.cast(x, "float32")

    def _loss_of(self, x, y, logits, sample_weight):
        # With the layers' own losses, as in the clean one: the two shares add up to 1.
        return keras.Model.compute_loss(self, x, y, logits, sample_weight, training=True)

    def _watch(self, bound, worst, y, radius):
        """Metrics; the worst logits decide as the bounds do."""
        worst = ops.stop_gradient(worst)
        if worst.shape[-1] == 1:
            lead = (2 * memberships(y, worst) - 1)[..., 0] * worst[..., 0]
        else:
            rivals = ops.where(_own(y, worst) > 0, ops.full_like(worst, -math.inf), worst)
            lead = -ops.max(rivals, axis=-1)
        self.certified_estimate.update_state(ops.cast(lead > 0, "float32"))
        count = ops.cast(ops.shape(worst)[0], "float32")
        self.bound_loss.update_state(ops.stop_gradient(bound), sample_weight=count)
        self.bound_radius.update_state(radius, sample_weight=count)

    def _worst(self, x, y, radius, clean, center=None):
        """The worst logits (n, classes) of the region, and the signals around it.

        Args:
            x: inputs.
            y: labels.
            radius: scalar tensor.
            clean: inputs whose statistics normalizations take, or None.
            center: of small boxes, or None.
        """
        norm = "l2" if isinstance(self.region, L2) else "linf"
        if self.valid is not None:
            x = ops.clip(x, *(ops.cast(v, x.dtype) for v in self.valid))
        if center is not None:
            x, radius = center, self.small_share * radius
        region = region_around(x, radius, norm, self.valid)
        signals = self.flow.signals(region, clean if self.flow.normalizes else None)
        width = signals[-1].low.shape[-1]
        y = ops.convert_to_tensor(y)
        if width == 1:
            sign = 2 * memberships(y, ops.zeros_like(signals[-1].low)) - 1
            rows = sign[:, None]
        else:
            own = _own(y, signals[-1].low)
            rows = own[:, None] - ops.eye(width, dtype=own.dtype)[None]
        found = margins(self.flow, signals, rows, lines=False)
        if self.method == "crown_ibp":
            lines = margins(self.flow, signals, rows, lines=True)
            if clean is None:
                found = ops.maximum(found, lines)
            else:
                share = ops.cast(self._between(self.crown_share), found.dtype)
                found = share * lines + (1 - share) * found
        return (sign * found if width == 1 else -found), signals

    def _attacked(self, x, y):
        """Centres of small boxes: the last point of an attack of radius (1 - small_share)·ε."""
        dtype, x = x.dtype, ops.stop_gradient(self._floats(x))
        reach = ops.cast((1 - self.small_share) * self.radius(), x.dtype)
        start = keras.random.uniform(ops.shape(x), -1.0, 1.0, x.dtype, seed=self.random)

        def inside(change):
            change = ops.minimum(ops.maximum(change, -reach), reach)
            if self.valid is not None:
                low, high = (ops.cast(v, x.dtype) for v in self.valid)
                change = ops.clip(x + change, low, high) - x
            return change

        def objective(point):
            logits = ops.cast(self.plain(point, training=False), x.dtype)
            if logits.shape[-1] == 1:
                sign = 2 * memberships(y, logits) - 1
                return ops.sum(ops.softplus(-sign * logits)), ()
            own = one_hot(y, logits)
            return -ops.sum(own * ops.log_softmax(logits)), ()

        def body(i, change):
            gradient, _ = sum_gradient(objective, x + change)
            gradient = ops.where(ops.isfinite(gradient), gradient, ops.zeros_like(gradient))
            late = sum(ops.cast(i >= k, x.dtype) for k in _SHORTER)
            return inside(change + _LENGTH * 0.1**late * reach * ops.sign(gradient))

        change = ops.fori_loop(0, _STEPS, body, inside(reach * start))
        return ops.stop_gradient(ops.cast(x + change, dtype))

    def get_config(self):
        own = {
            "norm": "l2" if isinstance(self.region, L2) else "linf",
            "radius": float(self.region.radius),
            "bounds": self.valid and [np.asarray(v).tolist() for v in self.valid],
        }
        names = ("method", "warmup", "schedule", "clean_share", "crown_share", "small_share",
                 "regularizer", "seed")  # fmt: skip
        return {**super().get_config(), **own, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        region = _BALLS[config.pop("norm")](config.pop("radius"))
        return super().from_config({**config, "region": region}, custom_objects)


def _own(y, logits):
    """One-hot rows of the labels, of probabilities those of the likeliest class."""
    found = one_hot(y, logits)
    number = ops.argmax(found, axis=-1)
    own = ops.one_hot(number, logits.shape[-1], dtype=logits.dtype)
    # What is no label stays NaN while a function is traced.
    return own + 0.0 * ops.sum(found, axis=-1, keepdims=True)


def _checked_region(region):
    if type(region) not in (L2, Linf):
        raise TypeError(
            "`region` must be the ball around every input, Linf(radius) or L2(radius). "
            f"Received: region={region!r}."
        )
    if np.ndim(region.radius) or not 0 < float(region.radius) < math.inf:
        raise ValueError(
            f"`region` must have one positive radius for all samples. Received: region={region!r}."
        )
    return region


def _checked_method(method, region):
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}. Received: method={method!r}.")
    if method == "small_box" and not isinstance(region, Linf):
        raise ValueError(
            f"Small boxes fill an l∞ ball. Received: method='small_box' with region={region!r}. "
            "Use Linf, or method='ibp'."
        )
    return method


def _checked_steps(warmup):
    try:
        first, last = (int(n) for n in warmup)
        fits = [first, last] == [float(n) for n in warmup] and 0 <= first <= last
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(
            "`warmup` must be two step numbers, the first no larger than the last. "
            f"Received: warmup={warmup!r}."
        )
    return first, last


def _checked_share(name, value):
    value = float(value)
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be in [0, 1]. Received: {name}={value}.")
    return value


def _checked_shares(name, values):
    try:
        first, last = values
    except (TypeError, ValueError):
        raise ValueError(
            f"`{name}` must be two shares, at the beginning and the end. Received: {values!r}."
        ) from None
    return _checked_share(name, first), _checked_share(name, last)


def _not_negative(name, value):
    value = float(value)
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be a number ≥ 0. Received: {name}={value}.")
    return value
