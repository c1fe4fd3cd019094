"""A plan: what an experiment's training takes on given devices, and which setting is quickest."""

from __future__ import annotations

import dataclasses
import math

import keras

from tf_lyapunov import models
from tf_lyapunov.data import arrays
from tf_lyapunov.errors import ConfigError
from tf_lyapunov.experiments.config import ExperimentConfig
from tf_lyapunov.planning.bounds import bound_cost
from tf_lyapunov.planning.counting import layer_costs
from tf_lyapunov.planning.devices import PRECISIONS, WITHOUT_BFLOAT16, Cluster, parse_devices
from tf_lyapunov.planning.steps import EVERY, SLOTS, USABLE, Memory, Step, least_every, memory, step

# Training examples and shape of an image, before validation and cropping.
SIZES = {
    "digits": (1437, (8, 8, 1)),
    "blobs": (160, (6,)),
    "mnist": (60_000, (28, 28, 1)),
    "fashion_mnist": (60_000, (28, 28, 1)),
    "cifar10": (50_000, (32, 32, 3)),
    "cifar100": (50_000, (32, 32, 3)),
    "svhn_cropped": (73_257, (32, 32, 3)),
    "imagenet2012": (1_281_167, (224, 224, 3)),
}
CLASSES = {"digits": 10, "blobs": 3, "imagenet2012": 1000}
HELD_OUT = {"digits": 180, "blobs": 40, "imagenet2012": 0}
# Overhead of the constraints that `least_every` answers for.
GOAL = 1.10


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train, and what it takes.

    Attributes:
        precision: policy of Keras.
        batch: samples per step on all replicas.
        every: steps between guaranteed bounds; 1 for every step, 0 without constraints.
        memory: `Memory` of a replica.
        step: `Step`.
        fits: whether the memory does.
        steps_per_epoch: of the global batch.
    """

    precision: str
    batch: int
    every: int
    memory: Memory
    step: Step
    fits: bool
    steps_per_epoch: int

    @property
    def epoch_seconds(self) -> float:
        """Training part of an epoch, the input pipeline assumed to keep up."""
        return self.step.total * self.steps_per_epoch

    def to_dict(self) -> dict:
        """Plain data."""
        return {
            "precision": self.precision,
            "batch": self.batch,
            "every": self.every,
            "fits": self.fits,
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "step": {
                **dataclasses.asdict(self.step),
                "total": self.step.total,
                "overhead": self.step.overhead,
            },
            "steps_per_epoch": self.steps_per_epoch,
            "epoch_seconds": self.epoch_seconds,
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that `tf-lyapunov plan` prints.

    Attributes:
        name: of the experiment.
        model: its name.
        examples: training examples of an epoch.
        epochs: that are configured.
        costs: list of `LayerCost`.
        bounds: list of `BoundCost` of the constrained kernels.
        cluster: devices.
        chosen: the configured `Setting`.
        settings: alternatives, quickest epoch that fits first.
        least_every: smallest number of steps between bounds with an overhead of at most `GOAL`,
            or None.
        dtype: in which the bounds are computed.
    """

    name: str
    model: str
    examples: int
    epochs: int
    costs: list
    bounds: list
    cluster: Cluster
    chosen: Setting
    settings: list
    least_every: int | None
    dtype: str

    @property
    def quickest(self) -> Setting | None:
        """The quickest setting that fits, if any does."""
        return next((s for s in self.settings if s.fits), None)

    def totals(self) -> dict:
        """Parameters and FLOPs per sample."""
        return {
            "parameters": sum(c.parameters for c in self.costs),
            "trainable": sum(c.trainable for c in self.costs),
            "forward_flops": sum(c.forward for c in self.costs),
            "backward_flops": sum(c.backward for c in self.costs),
            "kept_entries": sum(c.kept for c in self.costs),
            "bound_flops": sum(b.flops for b in self.bounds),
        }

    def to_dict(self) -> dict:
        """Plain data: counts, costs by layer, devices and their sources, settings."""
        device = self.cluster.device
        layers = []
        for cost in self.costs:
            record = dataclasses.asdict(dataclasses.replace(cost, maps=()))
            del record["maps"]
            layers.append(record)
        quickest = self.quickest
        return {
            "name": self.name,
            "model": {"name": self.model, **self.totals()},
            "data": {"examples": self.examples, "epochs": self.epochs},
            "devices": {
                "text": str(self.cluster),
                "replicas": self.cluster.replicas,
                **dataclasses.asdict(device),
            },
            "layers": layers,
            "bounds": [dataclasses.asdict(b) for b in self.bounds],
            "bound_dtype": self.dtype,
            "chosen": {
                **self.chosen.to_dict(),
                "training_seconds": self.chosen.epoch_seconds * self.epochs,
            },
            "settings": [s.to_dict() for s in self.settings],
            "quickest": None if quickest is None else quickest.to_dict(),
            "least_every": self.least_every,
            "least_every_for_overhead": GOAL,
        }


def plan(config: ExperimentConfig, cluster: Cluster, *, precision: str = "float32") -> Plan:
    """Estimate parameters, memory, FLOPs, constraint cost and epoch time of an experiment.

    Args:
        config: the experiment; its batch size is that of all replicas together.
        cluster: devices.
        precision: policy of the configured setting.

    Returns:
        `Plan`; alternatives cover precisions, batch sizes from 1/4 to 16 times the configured
        one, and bounds at every step or every so many steps.

    Raises:
        ConfigError: the model does not fit the data set, or the batch the replicas.
        UnsupportedLayerError: a layer's operations cannot be counted.

    Example:

    >>> from tf_lyapunov.experiments.reading import parse_config
    >>> from tf_lyapunov.planning.devices import parse_devices
    >>> config = parse_config("{dataset: {name: mnist}, model: {name: mlp}}")
    >>> found = plan(config, parse_devices("H100"))
    >>> found.totals()["parameters"], found.chosen.fits
    (40480, True)
    """
    examples, shape, classes = sizes(config)
    model = build(config, shape, classes)
    return plan_model(
        model,
        cluster,
        examples=examples,
        batch=config.training.batch_size,
        epochs=config.training.epochs,
        every=_every(config),
        optimizer=config.training.optimizer.name,
        momentum=bool(config.training.optimizer.momentum),
        precision=precision,
        name=config.name,
    )


def plan_model(
    model: keras.Model,
    cluster: Cluster | str = "cpu",
    *,
    examples: int = 50_000,
    batch: int = 128,
    epochs: int = 1,
    every: int = 1,
    optimizer: str | None = None,
    momentum: bool | None = None,
    precision: str = "float32",
    name: str = "experiment",
) -> Plan:
    """`plan` of a built model.

    Args:
        model: built model, as for `layer_costs`.
        cluster: devices, a `Cluster` or text for `parse_devices` such as "8xH100"; by default two
            cores of a server.
        examples: samples of an epoch; by default as many as CIFAR-10 has.
        batch: samples of a step on all replicas.
        epochs: epochs.
        every: steps between guaranteed bounds of every kernel; 1 each step, 0 for none.
        optimizer: "adam", "adamw", "sgd" or "rmsprop"; None for the one that the model is compiled
            with, or "sgd".
        momentum: whether it has a momentum slot; None as the compiled optimizer has it.
        precision: "float32", "mixed_bfloat16" or "mixed_float16".
        name: of the experiment.

    Returns:
        `Plan`.

    Raises:
        ValueError: if an argument is out of range, a device unknown, or the model not built.

    Example:

    >>> from tf_lyapunov.planning.devices import parse_devices
    >>> network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> found = plan_model(network, parse_devices("2xT4"), examples=100, batch=10, every=0)
    >>> found.chosen.steps_per_epoch, round(found.chosen.step.overhead, 3)
    (10, 1.0)
    """
    if isinstance(cluster, str):
        cluster = parse_devices(cluster)
    optimizer, momentum = _compiled(model, optimizer, momentum)
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {PRECISIONS}. Received: {precision!r}.")
    if optimizer not in SLOTS:
        raise ValueError(f"`optimizer` must be one of {tuple(SLOTS)}. Received: {optimizer!r}.")
    for label, number in (("examples", examples), ("batch", batch), ("epochs", epochs)):
        if number < 1:
            raise ValueError(f"`{label}` must be positive. Received: {label}={number}.")
    if batch < cluster.replicas:
        raise ConfigError(
            f"A step needs at least one sample per device. Received: a batch of {batch} for "
            f"{cluster.replicas} devices."
        )
    costs = layer_costs(model)
    constrained = [(c.name, *kernel) for c in costs for kernel in c.maps] if every else []
    bounds = [bound_cost(shape, linear_map, name=n) for n, shape, linear_map in constrained]
    dtype = bound_dtype(cluster)
    passes = 3 + SLOTS[optimizer] * 2 + 2 * momentum

    def setting(policy, size, period):
        replica = math.ceil(size / cluster.replicas)
        needed = memory(costs, bounds, optimizer, momentum, replica, policy)
        return Setting(
            policy,
            size,
            period,
            needed,
            step(costs, bounds, cluster, replica, policy, period or 1, dtype, passes),
            needed.total <= USABLE * cluster.device.memory,
            math.ceil(examples / size),
        )

    batches = [b for b in (batch // 4, batch // 2, *(batch * 2**i for i in range(5)))]
    batches = [b for b in batches if cluster.replicas <= b <= examples] or [batch]
    periods = sorted({1, 10, 100, every}) if every else [0]
    half = "mixed_float16" if cluster.device.name in WITHOUT_BFLOAT16 else "mixed_bfloat16"
    policies = ("float32", half) if "float16" in cluster.device.peaks else ("float32",)
    settings = [setting(p, b, k) for p in policies for b in batches for k in periods]
    settings.sort(key=lambda s: (not s.fits, s.epoch_seconds))
    replica = math.ceil(batch / cluster.replicas)
    return Plan(
        name,
        model.name,
        examples,
        epochs,
        costs,
        bounds,
        cluster,
        setting(precision, batch, every),
        settings,
        least_every(costs, bounds, cluster, replica, precision, GOAL, dtype) if bounds else None,
        dtype,
    )


def _compiled(model, optimizer, momentum):
    """What is not said of the optimizer, from the one that the model is compiled with."""
    held = getattr(model, "optimizer", None)
    held = getattr(held, "inner_optimizer", held)  # of mixed precision
    own = type(held).__name__.lower()
    if optimizer is None:
        optimizer = own if own in SLOTS else "sgd"
    if momentum is None:
        momentum = optimizer == own and bool(getattr(held, "momentum", 0.0))
    return optimizer, momentum


def bound_dtype(cluster: Cluster) -> str:
    """Type of the bounds' products: float64 where the backend rounds float32 ones on a GPU."""
    rounds = keras.backend.backend() == "tensorflow" and "tensor_float32" in cluster.device.peaks
    return "float64" if rounds else "float32"


def sizes(config: ExperimentConfig) -> tuple[int, tuple, int]:
    """(training examples, input shape, classes) of the configured data set, without reading it.

    Raises:
        ConfigError: the data set's size is not known here, or `validation` leaves nothing.

    Example:

    >>> from tf_lyapunov.experiments.reading import parse_config
    >>> sizes(parse_config("{dataset: {name: cifar10, limit: 100}, model: {name: mlp}}"))
    (100, (28, 28, 3), 10)
    """
    spec = config.dataset
    if spec.name not in SIZES:
        raise ConfigError(
            f"The sizes of this data set are not known to `plan`. Known: {', '.join(SIZES)}. "
            f"Received: dataset.name={spec.name!r}."
        )
    examples, shape = SIZES[spec.name]
    classes, held_out, crop = arrays.PREPARED.get(
        spec.name, (CLASSES.get(spec.name), HELD_OUT.get(spec.name), None)
    )[:3]
    examples -= held_out if spec.validation is None else spec.validation
    examples = examples if spec.limit is None else min(examples, spec.limit)
    if examples < 1:
        raise ConfigError(
            "`dataset.validation` must leave training examples. Received: "
            f"validation={spec.validation}."
        )
    crop = crop if spec.crop is None else spec.crop
    if crop and len(shape) == 3:
        shape = (crop, crop, shape[2])
    return examples, shape, classes


def build(config: ExperimentConfig, shape: tuple, classes: int) -> keras.Model:
    """The configured model for inputs of this shape."""
    try:
        return models.build(config.model.model_dump(), shape, classes, seed=config.seed)
    except ValueError as error:
        raise ConfigError(f"The model does not fit the data set: {error}") from error


def _every(config):
    if config.claim is None and not config.layers.by_hand:
        return 0
    return 1 if config.training.guarantee == "step" else config.training.every


__all__ = ["EVERY", "Plan", "Setting", "build", "plan", "plan_model", "sizes"]
