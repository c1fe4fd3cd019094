"""Adversarial training inside `fit`: PGD, FGM and TRADES, on every backend."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.attacks import FGM, FGSM, PGD
from tf_lyapunov.attacks.backend import sum_gradient
from tf_lyapunov.attacks.inputs import checked_seed
from tf_lyapunov.attacks.logits import logits_view, two_columns
from tf_lyapunov.losses.labels import class_of_sign, one_hot
from tf_lyapunov.spectral.arguments import positive
from tf_lyapunov.theory.balls import L2, Linf
from tf_lyapunov.training.base import TrainingModel

_BALLS = {"l2": L2, "linf": Linf}
# Standard deviation of TRADES' starting points: the divergence has no gradient at the input itself.
_TRADES_START = 1e-3


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class AdversarialModel(TrainingModel):
    """Trains a classifier on inputs that an attack has made against it in the same step.

        PGD, FGM:   loss = mix·ℓ(f(x̂), y) + (1 - mix)·ℓ(f(x), y)                           (1)
        TRADES:     loss = ℓ(f(x), y) + β·mean KL(p(x) ‖ p(x̂)),   p = softmax f            (2)

    ℓ is the compiled loss; x̂ = x + v is the last iterate of projected gradient ascent, over the
    attack's ball and box, on cross-entropy or margin of the logits (1) or on the divergence (2).
    It makes attacks of that kind less successful on data like the training data, and proves
    nothing: certify `.plain`.

    The weights are those of the wrapped model, so its constraints, `constrain` and this library's
    callbacks and layers work as in plain training. `evaluate` and `predict` see clean inputs;
    metrics of training are those of the adversarial ones. `.plain.save(...)` writes an ordinary
    model. A step costs `steps` further passes and gradients, and one more pass with mix < 1 or
    TRADES.

    Limits. The attack runs the model as at inference (no dropout, stored statistics), the loss as
    in training; batch statistics then follow the adversarial inputs (mix = 1) or both in turn.
    Layers with cached weights compute them anew in every step of the attack. Losses that layers
    add of their activations are counted for clean and adversarial inputs. A subclassed model must
    return logits; softmax heads of other models are looked through, except by TRADES. `restarts`,
    `targeted` and radii per sample are refused; `keep` and `stop_early` have no effect. On JAX
    the whole attack is part of the compiled step.

    Args:
        model: built classifier of one input, or a training method around one.
        attack: a `PGD`, `FGM` or `FGSM` attack: its ball, steps, step, random start, loss and
            bounds are used.
        mix: weight of the adversarial loss, in (0, 1].
        trades_beta: β > 0 for TRADES, which takes no `mix`; `None` for (1).
        seed: of random starts.

    Raises:
        TypeError: if `attack` is none of these.
        ValueError: if an argument is out of range, or the attack has options without meaning here.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import PGD
    >>> from tf_lyapunov.theory.balls import L2
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> robust = AdversarialModel(model, PGD(L2(0.5), steps=3))
    >>> robust.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = robust.fit(np.eye(2), np.arange(2), verbose=0)
    >>> bool(np.isfinite(history.history["loss"][0])), robust.plain is model
    (True, True)

    Reference: (1) Madry et al., ICLR 2018, eq. (2.1), mix = 1; Goodfellow et al., ICLR 2015,
    section 6; (2) Zhang et al., "Theoretically principled trade-off between robustness and
    accuracy" (ICML 2019), eq. (5); as published, without clipping unless the attack has bounds.
    """

    can_be_wrapped = False

    def __init__(self, model, attack, mix=1.0, trades_beta=None, seed=0, **kwargs):
        super().__init__(model, **kwargs)
        self.attack = _checked_attack(attack)
        self.mix = positive("mix", mix, (1e-6, 1.0))
        self.trades_beta = None
        if trades_beta is not None:
            self.trades_beta = positive("trades_beta", trades_beta, (1e-12, 1e12))
            if self.mix != 1:
                raise ValueError(
                    f"TRADES has its own mixture. Received: mix={mix} with "
                    f"trades_beta={trades_beta}. Leave `mix` out."
                )
            if logits_view(self.plain).head is not None:
                raise ValueError(
                    "TRADES needs a model that returns logits. Received: model "
                    f"{self.plain.name!r} with a {logits_view(self.plain).head} head. Take it off "
                    "and compile a loss with `from_logits=True`."
                )
        self.seed = checked_seed(seed)
        self.random = keras.random.SeedGenerator(self.seed)

    def training_inputs(self, x, y):
        x = x if keras.backend.is_float_dtype(x.dtype) else ops.cast(x, keras.config.floatx())
        adversarial = self.perturbed(x, y)
        if self.mix == 1 and self.trades_beta is None:
            return {"adversarial": adversarial}
        return {"clean": x, "adversarial": adversarial}

    def combined(self, losses, found, sample_weight):
        if self.trades_beta is None:
            if self.mix == 1:
                return losses["adversarial"]
            return self.mix * losses["adversarial"] + (1 - self.mix) * losses["clean"]
        clean, moved = (two_columns(found[k]["outputs"]) for k in ("clean", "adversarial"))
        divergence = _divergence(ops.log_softmax(clean), moved)
        if sample_weight is not None:
            weight = ops.cast(ops.reshape(sample_weight, (-1,)), divergence.dtype)
            divergence = divergence * weight
        loss = losses["clean"]
        return loss + ops.cast(self.trades_beta * ops.mean(divergence), loss.dtype)

    def perturbed(self, x, y):
        """Adversarial inputs of one batch, in graph or eagerly.

        Args:
            x: float tensor (n, ...).
            y: labels, integers or one-hot.

        Returns:
            Tensor of the shape and dtype of x, within the ball around it, up to rounding.
        """
        attack, logits = self.attack, logits_view(self.plain).function
        dtype = x.dtype
        x = ops.stop_gradient(ops.cast(x, "float32"))
        axes = tuple(range(1, len(x.shape)))
        radius, norm_2 = float(attack.ball.radius), isinstance(attack.ball, L2)
        if self.trades_beta is not None:
            anchor = ops.stop_gradient(ops.log_softmax(two_columns(logits(x))))

            def objective(point):
                return ops.sum(_divergence(anchor, two_columns(logits(point)))), ()
        else:

            def objective(point):
                found = logits(point)
                own = class_of_sign(y, found)
                return ops.sum(_excess(two_columns(found), own, attack.loss)), ()

        def inside(change):
            if norm_2:
                length = _norm(change, axes)
                change = change * ops.minimum(1.0, radius / ops.maximum(length, radius))
            else:
                change = ops.clip(change, -radius, radius)
            if attack.bounds is not None:
                low, high = (ops.cast(bound, "float32") for bound in attack.bounds)
                change = ops.minimum(ops.maximum(x + change, low), high) - x
            return change

        def body(_, change):
            gradient, _ = sum_gradient(objective, x + change)
            gradient = ops.where(ops.isfinite(gradient), gradient, ops.zeros_like(gradient))
            if norm_2:
                # Scaled first: squares of small gradients would leave float32.
                top = ops.max(ops.abs(gradient), axis=axes, keepdims=True)
                gradient = gradient / ops.where(top > 0, top, ops.ones_like(top))
                length = _norm(gradient, axes)
                direction = gradient / ops.where(length > 0, length, ops.ones_like(length))
            else:
                direction = ops.sign(gradient)
            return inside(change + step * direction)

        step = 2.5 * radius / attack.steps if attack.step is None else float(attack.step)
        change = inside(self._start(x, axes, radius, norm_2))
        change = ops.fori_loop(0, attack.steps, body, change)
        return ops.stop_gradient(ops.cast(x + change, dtype))

    def _start(self, x, axes, radius, norm_2):
        shape = ops.shape(x)
        if self.trades_beta is not None:
            return _TRADES_START * keras.random.normal(shape, dtype="float32", seed=self.random)
        if not self.attack.random_start:
            return ops.zeros_like(x)
        if not norm_2:
            return keras.random.uniform(shape, -radius, radius, "float32", seed=self.random)
        # Uniform in the ball.
        change = keras.random.normal(shape, dtype="float32", seed=self.random)
        rows = (shape[0], *[1] * len(axes))
        share = keras.random.uniform(rows, dtype="float32", seed=self.random)
        dimension = math.prod(x.shape[1:])
        return change / _norm(change, axes) * (radius * share ** (1 / dimension))

    def get_config(self):
        attack = self.attack
        described = {
            "norm": "l2" if isinstance(attack.ball, L2) else "linf",
            "radius": float(attack.ball.radius),
            "steps": attack.steps,
            "step": None if attack.step is None else float(attack.step),
            "random_start": attack.random_start,
            "loss": attack.loss,
            "bounds": attack.bounds and [np.asarray(bound).tolist() for bound in attack.bounds],
        }
        own = {"mix": self.mix, "trades_beta": self.trades_beta, "seed": self.seed}
        return {**super().get_config(), "attack": described, **own}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        attack = dict(config["attack"])
        ball = _BALLS[attack.pop("norm")](attack.pop("radius"))
        return super().from_config({**config, "attack": PGD(ball, **attack)}, custom_objects)


def _checked_attack(attack):
    if type(attack) not in (PGD, FGM, FGSM):
        raise TypeError(
            "`attack` must be a PGD, FGM or FGSM attack, such as PGD(Linf(8/255), steps=10, "
            f"step=2/255, random_start=True). Received: attack={attack!r}."
        )
    if np.ndim(attack.ball.radius) or (attack.step is not None and np.ndim(attack.step)):
        raise ValueError(
            "Training needs one radius and one step length for all samples. Received: an attack "
            "with a radius or a step per sample."
        )
    if not float(attack.ball.radius) > 0:
        raise ValueError(f"The attack's radius must be positive. Received: attack={attack!r}.")
    if attack.restarts > 1 or attack.targeted:
        raise ValueError(
            "Training takes one run of an untargeted attack per step. "
            f"Received: restarts={attack.restarts}, targeted={attack.targeted}."
        )
    return attack


def _norm(x, axes):
    return ops.sqrt(ops.sum(ops.square(x), axis=axes, keepdims=True))


def _excess(logits, y, loss):
    """log Σ_j≠y exp f_j - f_y, or the largest f_j - f_y, per sample (see `attacks.PGD`)."""
    own = one_hot(y, logits) > 0.5
    others = ops.where(own, ops.full_like(logits, -1e30), logits)
    lead = ops.max(others, axis=-1) if loss == "margin" else ops.logsumexp(others, axis=-1)
    return lead - ops.sum(ops.where(own, logits, ops.zeros_like(logits)), axis=-1)


def _divergence(log_p, other_logits):
    """KL(p ‖ q) per sample, from log p and the logits of q."""
    return ops.sum(ops.exp(log_p) * (log_p - ops.log_softmax(other_logits)), axis=-1)
