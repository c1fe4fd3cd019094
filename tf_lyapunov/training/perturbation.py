"""(5) Training for larger minimal perturbations: output margin, contraction, FGS, stability."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from tf_lyapunov.attacks import FGSM
from tf_lyapunov.attacks.inputs import checked_bounds, checked_seed
from tf_lyapunov.attacks.logits import logits_view, two_columns
from tf_lyapunov.losses.labels import class_of_sign, one_hot
from tf_lyapunov.spectral.arguments import positive
from tf_lyapunov.theory.balls import Linf
from tf_lyapunov.training.adversarial import AdversarialModel
from tf_lyapunov.training.base import TrainingModel

_LIMITS = (1e-12, 1e12)
# Slopes of activations as functions of their values.
_SLOPES = {
    "linear": ops.ones_like,
    "tanh": lambda h: 1 - ops.square(h),
    "sigmoid": lambda h: h * (1 - h),
    "softplus": lambda h: 1 - ops.exp(-h),
    "relu": lambda h: ops.cast(h > 0, h.dtype),
}


def output_distance(logits, kernel, labels):
    """Signed distance of the output layer's input from the nearest other class, per sample.

        κ = min_{j≠c} (f_c - f_j) / ‖w_c - w_j‖                                          (1)

    Differentiable; classes with equal columns are left out, and κ = 0 where none is left.

    Args:
        logits: f = Wᵀh + b, float tensor (n, K), K ≥ 2.
        kernel: W, float tensor (features, K).
        labels: c, integers (n,) or one-hot rows.

    Returns:
        Tensor (n,); negative where c is not the largest logit.

    Example:

    >>> import numpy as np
    >>> kernel = np.array([[1.0, -2.0]], "float32")
    >>> float(output_distance(np.array([[3.0, 0.0]], "float32"), kernel, np.array([0]))[0])
    1.0

    Reference: Peck et al., Lemma 3.5; as published, with a sign.
    """
    logits, kernel = ops.convert_to_tensor(logits), ops.convert_to_tensor(kernel)
    own = one_hot(ops.convert_to_tensor(labels), logits)
    columns = ops.transpose(kernel)
    squares = ops.sum(ops.square(columns[:, None] - columns[None]), axis=-1)
    squares = ops.matmul(own, ops.cast(squares, logits.dtype))
    counts = squares > 0
    sizes = ops.sqrt(ops.where(counts, squares, ops.ones_like(squares)))
    gaps = ops.sum(own * logits, axis=-1, keepdims=True) - logits
    ratios = ops.where(counts, gaps / sizes, ops.full_like(gaps, np.inf))
    least = ops.min(ratios, axis=-1)
    return ops.where(ops.isfinite(least), least, ops.zeros_like(least))


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class OutputMarginModel(TrainingModel):
    """Trains a classifier for a large distance to the decision boundary at its output layer.

        loss = (compiled loss) - weight·mean_i min(κ_i, cap)                             (2)

    κ of `output_distance`. For the true class κ is negative on mistakes, which are then worked on;
    as published it is taken for the class that the model decides for, so that it rewards being
    sure of mistakes too. Without `cap` the loss has no minimum if the features are not bounded.
    It proves nothing: the layers before may grow. Certify `.plain`, or bound their norms.

    Args:
        model: built classifier that ends with a linear `keras.layers.Dense`, its logits, or a
            training method around one.
        weight: ℓ > 0.
        cap: distance beyond which nothing is gained, or None.
        decided: κ for the decided class, as published, instead of the true one.

    Raises:
        ValueError: if the model does not end so, or a number is not positive.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> OutputMarginModel(model, weight=0.1).plain is model
    True

    Reference: Peck et al., section 4.4, as published with `decided=True` and no cap.
    """

    def __init__(self, model, weight=0.1, cap=None, decided=False, **kwargs):
        super().__init__(model, **kwargs)
        self.weight = positive("weight", weight, _LIMITS)
        self.cap = None if cap is None else positive("cap", cap, _LIMITS)
        self.decided = bool(decided)
        self.output_layer = _output_layer(self.plain)

    def objective(self, owner, x, y, found, sample_weight):
        logits, y = two_columns(found["outputs"]), class_of_sign(y, found["outputs"])
        kernel = ops.cast(self.output_layer.kernel, logits.dtype)
        if self.output_layer.units == 1:
            kernel = ops.concatenate([ops.zeros_like(kernel), kernel], axis=1)
        labels = ops.argmax(logits, axis=-1) if self.decided else _classes(y)
        kappa = output_distance(logits, kernel, labels)
        if self.cap is not None:
            kappa = ops.minimum(kappa, self.cap)
        loss = super().objective(owner, x, y, found, sample_weight)
        return loss - ops.cast(self.weight * _mean(kappa, sample_weight), loss.dtype)

    def get_config(self):
        own = {"weight": self.weight, "cap": self.cap, "decided": self.decided}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class ContractiveModel(TrainingModel):
    """Trains a classifier with a penalty on the Jacobian of single layers.

        loss = (compiled loss) + mean_i Σ_j λ_j·‖∂h_j/∂h_{j-1}(x_i)‖_F                   (3)

    For h_j = g(W h_{j-1} + b) the norm is √Σ_k g'(a_k)²‖w_k‖², exactly, also for convolutions with
    their edges: its cost is that of one more pass of the squared kernels over a single image.
    It is no bound on the model's gain away from the data.

    Args:
        model: functional or sequential classifier, or a training method around one.
        layers: names of `Dense` or `Conv1D`, `Conv2D`, `Conv3D` layers with a linear, tanh,
            sigmoid, softplus or ReLU activation of their own.
        weights: λ > 0, one number or one per layer.

    Raises:
        ValueError: for unknown names, other layers or activations, or a number per layer too few.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh", name="a"),
    ...                           keras.layers.Dense(2)])
    >>> ContractiveModel(model, ["a"], weights=0.01).plain is model
    True

    Reference: Gu, Rigazio, "Towards deep neural network architectures robust to adversarial
    examples" (2015); Peck et al., section 2.6.1, as published.
    """

    def __init__(self, model, layers=(), weights=0.01, **kwargs):
        super().__init__(model, layers, **kwargs)
        if not self.layer_names:
            raise ValueError("`layers` must name at least one layer. Received: layers=().")
        given = [weights] * len(self.layer_names) if np.ndim(weights) == 0 else list(weights)
        if len(given) != len(self.layer_names):
            raise ValueError(
                "`weights` must be one number, or one per layer. "
                f"Received: {len(given)} weights for {len(self.layer_names)} layers."
            )
        self.penalties = [positive("weights", w, _LIMITS) for w in given]
        self.penalised = [self.plain.get_layer(name) for name in self.layer_names]
        for layer in self.penalised:
            _check_contractible(layer)

    def objective(self, owner, x, y, found, sample_weight):
        loss = super().objective(owner, x, y, found, sample_weight)
        for weight, layer in zip(self.penalties, self.penalised, strict=True):
            norms = _jacobian_norms(layer, found["layers"][layer.name])
            loss = loss + ops.cast(weight * _mean(norms, sample_weight), loss.dtype)
        return loss

    def get_config(self):
        return {**super().get_config(), "layers": self.layer_names, "weights": self.penalties}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class StabilityModel(TrainingModel):
    """Trains a classifier to answer alike at inputs and at copies with Gaussian noise.

        loss = (compiled loss at x) + weight·mean_i d(f(x_i), f(x_i')),  x' = x + σ·n     (4)

    d is the divergence KL(p(x) ‖ p(x')) of the probabilities, or the l2 distance of the outputs.
    A step costs a second pass. It must be the outermost training method.

    Args:
        model: built classifier of one input, or a training method around one.
        noise: σ > 0, in units of the input.
        weight: α > 0.
        distance: `"kl"` (the model returns logits) or `"l2"`.
        bounds: None, or `(low, high)`: x' is clipped to it.
        seed: of the noise.

    Raises:
        ValueError: if an argument is out of range, or the model returns probabilities with "kl".

    Example:

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> stable = StabilityModel(model, noise=0.1)
    >>> stable.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> bool(np.isfinite(stable.fit(np.eye(2), np.arange(2), verbose=0).history["loss"][0]))
    True

    Reference: Zheng et al., "Improving the robustness of deep neural networks via stability
    training" (CVPR 2016), eq. (2)-(7), as published; Peck et al., section 2.6.6.
    """

    can_be_wrapped = False

    def __init__(self, model, noise, weight=0.01, distance="kl", bounds=None, seed=0, **kwargs):
        super().__init__(model, **kwargs)
        self.noise = positive("noise", noise, _LIMITS)
        self.weight = positive("weight", weight, _LIMITS)
        if distance not in ("kl", "l2"):
            raise ValueError(f"`distance` must be 'kl' or 'l2'. Received: distance={distance!r}.")
        if distance == "kl":
            refuse_head(self.plain)
        self.distance, self.bounds = distance, checked_bounds(bounds)
        self.seed = checked_seed(seed)
        self.random = keras.random.SeedGenerator(self.seed)

    def training_inputs(self, x, y):
        x = x if keras.backend.is_float_dtype(x.dtype) else ops.cast(x, keras.config.floatx())
        noisy = x + self.noise * keras.random.normal(ops.shape(x), dtype=x.dtype, seed=self.random)
        if self.bounds is not None:
            low, high = (ops.cast(bound, x.dtype) for bound in self.bounds)
            noisy = ops.minimum(ops.maximum(noisy, low), high)
        return {"clean": x, "noisy": noisy}

    def combined(self, losses, found, sample_weight):
        clean, noisy = (found[name]["outputs"] for name in ("clean", "noisy"))
        if self.distance == "kl":
            log_p, log_q = (ops.log_softmax(two_columns(f)) for f in (clean, noisy))
            apart = ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)
        else:
            squares = ops.sum(ops.square(clean - noisy), axis=-1)
            moved = squares > 0
            apart = ops.sqrt(ops.where(moved, squares, ops.ones_like(squares)))
            apart = ops.where(moved, apart, ops.zeros_like(apart))
        loss = losses["clean"]
        return loss + ops.cast(self.weight * _mean(apart, sample_weight), loss.dtype)

    def get_config(self):
        bounds = self.bounds and [np.asarray(bound).tolist() for bound in self.bounds]
        own = {"noise": self.noise, "weight": self.weight, "distance": self.distance}
        return {**super().get_config(), **own, "bounds": bounds, "seed": self.seed}


def fgs_regularized(model, radius, alpha=0.5, bounds=None):
    """Fast gradient sign as a regulariser.

        loss = α·ℓ(f(x), y) + (1-α)·ℓ(f(x + ε·sign ∇_x ℓ), y)                            (5)

    Args:
        model: built classifier of one input, or a training method around one.
        radius: ε > 0 in l∞.
        alpha: α in [0, 1).
        bounds: None, or `(low, high)`, in which the perturbed inputs stay.

    Returns:
        `AdversarialModel`.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> fgs_regularized(model, 0.1, alpha=0.25).mix
    0.75

    Reference: Goodfellow, Shlens, Szegedy (ICLR 2015), section 6; Peck et al., section 2.6.3.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"`alpha` must be in [0, 1). Received: alpha={alpha!r}.")
    positive("radius", radius, _LIMITS)
    return AdversarialModel(model, FGSM(Linf(radius), bounds=bounds), mix=1 - alpha)


def _classes(y):
    """Integers (n,) from integers or one-hot rows."""
    if len(y.shape) == 2 and y.shape[-1] != 1:
        return ops.argmax(y, axis=-1)
    return ops.reshape(y, (-1,))


def _mean(values, sample_weight):
    if sample_weight is not None:
        values = values * ops.cast(ops.reshape(sample_weight, (-1,)), values.dtype)
    return ops.mean(values)


def refuse_head(model):
    head = logits_view(model).head
    if head is not None:
        raise ValueError(
            "This training method needs a model that returns logits. Received: model "
            f"{model.name!r} with a {head} head. Take it off and compile a loss with "
            "`from_logits=True`."
        )


def _output_layer(model):
    refuse_head(model)
    layer = model.layers[-1] if getattr(model, "layers", None) else model
    is_linear = getattr(layer, "activation", None) is keras.activations.linear
    is_last = is_linear and any(layer.output is t for t in getattr(model, "outputs", ()) or ())
    if type(layer) is not keras.layers.Dense or not is_last:
        raise ValueError(
            "The model must end with a linear keras.layers.Dense, its logits. "
            f"Received: model {model.name!r} that ends with {layer.name!r} of type "
            f"{type(layer).__name__}."
        )
    return layer


def _check_contractible(layer):
    name = getattr(getattr(layer, "activation", None), "__name__", "")
    kinds = (keras.layers.Dense, keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
    if type(layer) not in kinds or name not in _SLOPES:
        raise ValueError(
            "The contractive penalty knows Dense and convolution layers with an activation among "
            f"{', '.join(_SLOPES)}. Received: layer {layer.name!r} of type {type(layer).__name__}"
            + (f" with {name}." if name else ".")
        )


def _jacobian_norms(layer, output):
    """‖∂h/∂(input)‖_F per sample, from the layer's output h."""
    slopes = ops.square(_SLOPES[layer.activation.__name__](output))
    squares = ops.square(ops.cast(layer.kernel, output.dtype))
    if type(layer) is keras.layers.Dense:
        energies = ops.sum(squares, axis=0)
    else:
        energies = ops.conv(
            ops.ones((1, *layer.input.shape[1:]), dtype=output.dtype),
            squares,
            strides=list(layer.strides),
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
    total = ops.sum(slopes * energies, axis=tuple(range(1, len(output.shape))))
    alive = total > 0
    norms = ops.sqrt(ops.where(alive, total, ops.ones_like(total)))
    return ops.where(alive, norms, ops.zeros_like(norms))
