"""Networks and training methods that `localized/rebuild.py` compares."""

from __future__ import annotations

import dataclasses
import time

import keras
import numpy as np

from tf_lyapunov import datasets, models
from tf_lyapunov.attacks import PGD
from tf_lyapunov.constraints import ParsevalFrame, SpectralBound
from tf_lyapunov.design import spectral_design
from tf_lyapunov.layers import ConvexCombination
from tf_lyapunov.losses import TemperatureCrossEntropy
from tf_lyapunov.projection import constrain, project
from tf_lyapunov.theory.balls import Linf
from tf_lyapunov.theory.sectors import Sector
from tf_lyapunov.training import AdversarialModel, LaplacianModel, NonexpansiveModel, l2nn

# name -> label; the paper's letter in brackets.
METHODS = {
    "vanilla": "vanilla (V)",
    "parseval": "Parseval (P)",
    "laplacian": "Laplacian (L)",
    "parseval_laplacian": "Parseval + Laplacian (P+L)",
    "l2nn": "L2NN",
    "pgd": "PGD training",
    "pgd_spectral": "PGD + our spectral bounds",
}
# Dense chains, for which slopes are proved ball by ball and Proposition 1 can be asked.
CHAINS = {"chain": "dense chain, vanilla", "chain_spectral": "dense chain, our design of gain 4"}
# Scale of the logits in the loss of bounded networks; it becomes part of the deployed network.
_L2NN_SCALE, _TEMPERATURE = 5.0, 0.1
_CHAIN_GAIN = 4.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the numbers; results of other settings are not reused."""

    dataset: str
    quick: bool = False
    seed: int = 0
    train: int | None = 20_000
    test: int = 500
    filters: tuple = (8, 16)
    l2nn_filters: tuple = (6, 12)
    l2nn_widths: tuple = (64,)
    epochs: int = 3
    warmup: int = 0  # epochs of a growing rate, which then falls; without, the rate is constant
    batch_size: int = 128
    config: str | None = None  # an experiment file with its model and training, instead
    adversary: tuple = (0.1, 5, 0.03)  # l∞ radius, steps, step of PGD training
    mix: float = 1.0  # weight of the adversarial loss
    pgd_steps: int = 20
    radii: tuple = (0.5, 1.0, 2.0, 4.0, 8.0)
    shown: tuple = (0.5, 2.0, 8.0)  # of these, in the comparison table
    radii_linf: tuple = (0.05, 0.1, 0.3)
    points: int = 24
    directions: int = 200
    other_points: int = 16
    other_directions: int = 100
    steps: int = 30
    margin_radius: float = 0.5
    certified: tuple = (0.25, 0.5, 1.0)
    snrs: tuple = (30.0, 20.0, 15.0, 10.0, 5.0, 0.0)
    fgsm_snrs: tuple = (33.0, 20.0)
    severities: tuple = (1, 3, 5)
    pairs: tuple = (60_000, 5_000)  # samples for l2 and l∞
    distances: tuple = (4.0, 6.0, 8.0)  # d of Figure 3, l2
    distances_linf: tuple = (0.7, 0.8, 0.9)
    methods: tuple = tuple(METHODS)
    every_norm: tuple = ("vanilla", "l2nn", *CHAINS)  # also logits, and l∞
    chains: tuple = tuple(CHAINS)

    @classmethod
    def of(cls, dataset: str, quick: bool = False, seed: int = 0) -> Settings:
        """The settings of a CPU-sized run."""
        found = cls(dataset, quick, seed)
        if dataset != "mnist":
            found = dataclasses.replace(
                found,
                train=10_000,
                test=500,
                filters=(16, 32),
                l2nn_filters=(8, 16),
                epochs=10,
                warmup=1,
                adversary=(8 / 255, 5, 3 / 255),
                mix=0.5,  # adversarial inputs alone end in a constant network
                radii=(0.25, 0.5, 1.0, 2.0, 4.0),
                shown=(0.25, 1.0, 4.0),
                radii_linf=(8 / 255, 0.1, 0.3),
                points=12,
                margin_radius=0.25,
                certified=(36 / 255, 72 / 255, 108 / 255),
                snrs=(50.0, 40.0, 35.0, 30.0, 25.0, 20.0),
                fgsm_snrs=(33.0,),
                severities=(1, 2, 3, 4, 5),
                every_norm=(),
                pairs=(10_000, 5_000),
                distances=(4.0, 8.0, 12.0),
                distances_linf=(0.3, 0.5, 0.7),
                chains=(),
            )
        if quick:
            found = dataclasses.replace(
                found,
                train=1500,
                test=128,
                filters=(4, 8),
                l2nn_filters=(2, 4),
                l2nn_widths=(16,),
                epochs=1,
                warmup=0,
                adversary=(found.adversary[0], 2, found.adversary[0]),
                pgd_steps=5,
                points=6,
                directions=20,
                other_points=4,
                other_directions=10,
                steps=4,
                severities=(3,),
                pairs=(1000, 400),
            )
        return found


def small_residual(shape, classes, filters, *, branches="add", constraint=None):
    """Residual network without normalisation, whose certificate is finite.

    Stem of stride 2, per entry of `filters` a block x + F(x), F = two 3×3 convolutions with ReLUs
    before them, a convolution of stride 2 between blocks, and a dense layer of the logits.

    Args:
        shape: (height, width, channels).
        classes: number of logits.
        filters: channels of the blocks.
        branches: "add", or "average": a learned convex combination.
        constraint: function (input shape or None, stride) -> kernel constraint; None without.
    """
    relus = 0

    def convolution(h, channels, stride=1):
        found = constraint and constraint(tuple(h.shape[1:3]), stride)
        return keras.layers.Conv2D(
            channels, 3, strides=stride, padding="same", kernel_constraint=found
        )(h)

    def relu(h):
        nonlocal relus
        relus += 1
        return keras.layers.ReLU(name=f"relu_{relus}")(h)

    inputs = keras.Input(shape, name="input")
    h = convolution(inputs, filters[0], 2)
    for i, channels in enumerate(filters):
        if i:
            h = convolution(relu(h), channels, 2)
        branch = convolution(relu(convolution(relu(h), channels)), channels)
        h = keras.layers.Add()([h, branch]) if branches == "add" else ConvexCombination()(
            [h, branch]
        )  # fmt: skip
    h = keras.layers.Flatten(name="flatten")(relu(h))
    found = constraint and constraint(None, 1)
    logits = keras.layers.Dense(classes, name="logits", kernel_constraint=found)(h)
    return keras.Model(inputs, logits, name="small_residual")


def _unit_gain(shape, stride):
    if shape is None:
        return SpectralBound(1.0)
    return SpectralBound(1.0, input_shape=shape, strides=stride, padding="same")


def _averaged(layer):
    """The layer again, or a convex combination in place of a sum."""
    if isinstance(layer, keras.layers.Add):
        return ConvexCombination(name=layer.name)
    return layer.__class__.from_config(layer.get_config())


def _experiment(settings):
    from tf_lyapunov.experiments.reading import load_config

    return load_config(settings.config, [])


def build(name, shape, classes, settings):
    """A network, untrained, with the constraints of its method."""
    keras.utils.set_random_seed(settings.seed)
    if name in CHAINS:
        model = models.mlp(shape, classes)
        if name == "chain_spectral":
            leaky = Sector.of("leaky_relu", negative_slope=0.1)
            design = spectral_design(gain=_CHAIN_GAIN, sectors=[leaky, leaky, Sector.linear()])
            constrain(model, design)
            project(model)
        return model
    if name == "l2nn":
        return l2nn(shape, classes, settings.l2nn_filters, settings.l2nn_widths)
    if "spectral" in name:
        model = small_residual(
            shape, classes, settings.filters, branches="average", constraint=_unit_gain
        )
        return project(model)
    frame = ParsevalFrame(0.01) if "parseval" in name else None
    if settings.config:
        model = models.build(
            _experiment(settings).model.model_dump(), shape, classes, seed=settings.seed
        )
        if frame:
            model = keras.models.clone_model(model, clone_function=_averaged)
            for layer in model.layers:
                if getattr(layer, "kernel", None) is not None:
                    layer.kernel_constraint = layer.kernel.constraint = frame
        return model
    return small_residual(
        shape,
        classes,
        settings.filters,
        branches="average" if frame else "add",
        constraint=frame and (lambda shape, stride: frame),
    )


def trainer(name, model, settings, steps):
    """What `fit` trains: the model inside its method, compiled, and the scale of its logits."""
    loss, scale, inner = TemperatureCrossEntropy(), 1.0, model
    if name == "l2nn":
        inner, scale = NonexpansiveModel(model, scale=_L2NN_SCALE, distance=0.1), _L2NN_SCALE
    if "spectral" in name:
        gain = _CHAIN_GAIN if name in CHAINS else 1.0
        scale = 1 / (gain * _TEMPERATURE)
        loss = TemperatureCrossEntropy(1 / scale, margin=2**0.5 * gain * settings.margin_radius)
    if "laplacian" in name:
        relus = [layer.name for layer in model.layers if isinstance(layer, keras.layers.ReLU)]
        inner = LaplacianModel(model, relus, gamma=0.01, power=2)
    if name.startswith("pgd"):
        radius, count, step = settings.adversary
        attack = PGD(Linf(radius), steps=count, step=step, random_start=True, bounds=(0.0, 1.0))
        inner = AdversarialModel(inner, attack, mix=settings.mix, seed=settings.seed)
    optimizer = keras.optimizers.Adam(_rate(settings, steps) if settings.warmup else 1e-3)
    if settings.config and name not in CHAINS:
        from tf_lyapunov.experiments.objectives import add_weight_decay, make_optimizer

        training = _experiment(settings)
        optimizer = make_optimizer(training, steps)
        if training.training.weight_decay and "spectral" not in name and name != "l2nn":
            add_weight_decay(model, training.training.weight_decay)
    options = {} if name == "l2nn" else {"loss": loss}
    metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
    inner.compile(optimizer=optimizer, metrics=metrics, **options)
    return inner, scale


def _rate(settings, steps):
    """Linear growth to 1e-3, then a cosine to zero."""
    warm, all_steps = steps * settings.warmup, steps * settings.epochs
    return keras.optimizers.schedules.CosineDecay(
        0.0, all_steps - warm, warmup_target=1e-3, warmup_steps=warm
    )


def trained(name, data, settings, weights):
    """A trained network whose logits carry the scale of its loss, and its training record.

    `weights`: path of the cache, whose identity the caller has checked.
    """
    model = build(name, data.input_shape, data.num_classes, settings)
    if weights.exists():
        with np.load(weights) as found:
            model.set_weights([found[key] for key in found.files])
        return model, None
    if settings.config:
        from tf_lyapunov.experiments.augmentation import training_batches

        experiment = _experiment(settings)
        batches, epochs = training_batches(experiment, data), experiment.training.epochs
    else:
        arrays, epochs = (data.x_train, data.y_train), settings.epochs
        batches = datasets.Batches(*arrays, settings.batch_size, seed=settings.seed)
    fitted, scale = trainer(name, model, settings, len(batches))
    started = time.perf_counter()
    history = fitted.fit(
        batches, epochs=epochs, shuffle=False, verbose=0, callbacks=[batches.epoch_callback()]
    )
    record = {
        "epochs": epochs,
        "train_accuracy": history.history["accuracy"][-1],
        "training_seconds": time.perf_counter() - started,
        "scale": scale,
    }
    scale_logits(model, scale)
    weights.parent.mkdir(parents=True, exist_ok=True)
    temporary = weights.with_suffix(".part.npz")
    np.savez(temporary, **{f"{i:04d}": w for i, w in enumerate(model.get_weights())})
    temporary.replace(weights)
    return model, record


def scale_logits(model, scale):
    """Multiply a model's logits by a factor, in the weights of its last layer."""
    last = model.layers[-1]
    last.kernel.assign(last.kernel * scale)
    last.bias.assign(last.bias * scale)
