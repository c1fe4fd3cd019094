"""How a run is computed, apart from what it computes: devices, precision, compilation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import keras

from .config import ExperimentConfig
from .distribution import SCALINGS, Distribution, scaled
from .opening import STRATEGIES, open_distribution

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


@dataclasses.dataclass(frozen=True)
class Execution:
    """Devices, precision and compilation of a training run.

    In mixed precision the layers compute in 16 bits, while the optimizer and the constraints act on
    float32 weights; the model that is saved computes in float32, so that its bounds are those of
    the weights it stores.

    Args:
        strategy: one of `opening.STRATEGIES`.
        devices: replicas in this process; by default one per GPU, else one.
        scaling: how global batch and learning rate grow with the replicas; see
            `distribution.scaled`.
        worker_timeout: seconds in which all workers must come.
        tpu: name or address of a TPU.
        precision: one of `PRECISIONS`.
        jit: compile training steps with XLA.
        deterministic: ask the backend for deterministic kernels. CPUs have no others, but for
            parallel input pipelines.

    Raises:
        ValueError: an argument is not one of the above.

    Example:

    >>> Execution().distribution.replicas
    1
    """

    strategy: str = "none"
    devices: int | None = None
    scaling: str = "none"
    worker_timeout: float = 60.0
    tpu: str = ""
    precision: str = "float32"
    jit: bool = False
    deterministic: bool = False

    def __post_init__(self):
        for name, known in (
            ("strategy", STRATEGIES),
            ("scaling", SCALINGS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {known}. Received: {name}={getattr(self, name)!r}."
                )

    @functools.cached_property
    def distribution(self) -> Distribution:
        """The devices; opened when first asked for."""
        if self.deterministic:
            use_deterministic_kernels()
        return open_distribution(
            self.strategy, devices=self.devices, timeout=self.worker_timeout, tpu=self.tpu
        )

    @property
    def identity(self) -> dict:
        """What decides the trained weights beyond their last bits."""
        return {} if self.precision == "float32" else {"precision": self.precision}

    @property
    def makes_a_copy(self) -> bool:
        """Whether training needs a model that is not to be kept: in 16 bits, or replicated."""
        return self.precision != "float32" or self.distribution.replicas > 1

    def scaled(self, config: ExperimentConfig) -> ExperimentConfig:
        """The experiment with global batch and learning rate for these replicas."""
        return scaled(config, self.distribution.replicas, self.scaling)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Within it the model to be trained is built, compiled, restored and trained."""
        with self.distribution.scope(), precision(self.precision):
            yield


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Within it, new layers have this dtype policy.

    Example:

    >>> with precision("mixed_bfloat16"):
    ...     keras.layers.Dense(1).compute_dtype
    'bfloat16'
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def use_deterministic_kernels() -> None:
    """Ask the backend for kernels whose results do not depend on timing.

    On JAX nothing is done: its CPU kernels are deterministic; for GPUs start the process with
    XLA_FLAGS=--xla_gpu_deterministic_ops=true.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    elif backend == "torch":
        import torch

        torch.use_deterministic_algorithms(True)
