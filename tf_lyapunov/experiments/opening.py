"""Which devices to train on: opens a distribution of `distribution.py` before anything runs."""

from __future__ import annotations

import contextlib

import keras

from ..errors import DistributionError
from .distribution import DataParallel, Distribution, Looped, MultiWorker, Replicated
from .rendezvous import Cluster, meet

STRATEGIES = ("none", "mirrored", "multiworker", "tpu")


def open_distribution(
    strategy: str = "none",
    *,
    devices: int | None = None,
    timeout: float = 60.0,
    tpu: str = "",
) -> Distribution:
    """The devices to train on.

    To be called before anything runs on a device: it decides which there are.

    Args:
        strategy: one of `STRATEGIES`.
        devices: replicas in this process; by default one per GPU, else one. On a CPU as many
            logical devices are made, which share its cores.
        timeout: seconds in which all workers of a cluster must come.
        tpu: name or address of the TPU.

    Returns:
        A `Distribution`.

    Raises:
        ValueError: the strategy is unknown or not for this backend, there are fewer devices, or
            TF_CONFIG does not describe a cluster.
        DistributionError: a worker did not come in time.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` must be one of {STRATEGIES}. Received: {strategy!r}.")
    if devices is not None and devices < 1:
        raise ValueError(f"`devices` must be positive. Received: devices={devices!r}.")
    if not 0 < timeout < 1e6:
        raise ValueError(f"`timeout` must be seconds, and finite. Received: timeout={timeout!r}.")
    if strategy == "none":
        if devices not in (None, 1):
            raise ValueError(
                f"Several devices need a strategy. Received: devices={devices}, strategy='none'. "
                "Pass `--strategy mirrored`."
            )
        return Distribution()
    backend = keras.backend.backend()
    if backend == "jax" and strategy != "tpu":
        return _open_jax(strategy, devices, timeout)
    if backend != "tensorflow":
        raise ValueError(
            f"`--strategy {strategy}` is not for this backend. Received: KERAS_BACKEND={backend}. "
            "Use tensorflow, or mirrored or multiworker with jax (which runs on TPUs as well)."
        )
    return _open_tensorflow(strategy, devices, timeout, tpu)


def _open_tensorflow(strategy, devices, timeout, tpu):
    import tensorflow as tf

    if strategy == "tpu":  # written after TensorFlow's documentation; there was no TPU to run it on
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        found = tf.distribute.TPUStrategy(resolver)
        return Replicated("tpu", found, found.num_replicas_in_sync)
    gpus = tf.config.list_physical_devices("GPU")
    if devices is not None and len(gpus) > devices:
        tf.config.set_visible_devices(gpus[:devices], "GPU")
    if gpus and devices is not None and len(gpus) < devices:
        raise ValueError(
            f"There are fewer GPUs than devices asked for. Received: devices={devices}, "
            f"{len(gpus)} GPUs."
        )
    if not gpus and devices not in (None, 1):
        _split_cpu(tf, devices)
    if strategy == "mirrored":
        kind = "GPU" if gpus else "CPU"
        names = [f"{kind}:{i}" for i in range(devices or max(len(gpus), 1))]
        # NCCL, the default, is for GPUs alone.
        reduction = None if gpus else tf.distribute.ReductionToOneDevice()
        found = tf.distribute.MirroredStrategy(names, cross_device_ops=reduction)
        return Looped("mirrored", found)
    cluster = Cluster.from_environment()
    meet(cluster, timeout)
    try:
        found = tf.distribute.MultiWorkerMirroredStrategy()
    except (tf.errors.OpError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DistributionError(
            f"The workers met but could not form a cluster ({reason}). Received: "
            f"{', '.join(cluster.addresses)}."
        ) from error
    asked = (devices or 1) * len(cluster.addresses)
    if devices is not None and found.num_replicas_in_sync != asked:
        raise ValueError(
            f"TensorFlow makes {found.num_replicas_in_sync} replicas of this cluster, not {asked}. "
            f"Received: devices={devices} in each of {len(cluster.addresses)} workers. On CPUs a "
            "worker is one replica: leave out `--devices`, and start more workers."
        )
    return MultiWorker(found, cluster)


def _split_cpu(tf, devices):
    cpu = tf.config.list_physical_devices("CPU")[0]
    parts = [tf.config.LogicalDeviceConfiguration()] * devices
    if tf.config.get_logical_device_configuration(cpu) == parts:
        return
    try:
        tf.config.set_logical_device_configuration(cpu, parts)
    except RuntimeError as error:
        raise ValueError(
            f"The CPU can be divided only before TensorFlow has started. Received: "
            f"devices={devices} in a process that has used it already."
        ) from error


def _open_jax(strategy, devices, timeout):
    import jax

    cluster = None
    if devices is not None:
        with contextlib.suppress(RuntimeError):  # already started: counted below
            jax.config.update("jax_num_cpu_devices", devices)
    if strategy == "multiworker":
        cluster = Cluster.from_environment()
        meet(cluster, timeout)
        with contextlib.suppress(AttributeError):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        keras.distribution.initialize(
            cluster.addresses[0], len(cluster.addresses), process_id=cluster.index
        )
    local = jax.local_devices()
    if devices is not None and len(local) < devices:
        raise ValueError(
            f"There are fewer devices than asked for. Received: devices={devices}, {len(local)} "
            f"of kind {local[0].platform}."
        )
    chosen = jax.devices() if cluster is not None else local[: devices or len(local)]
    parallel = keras.distribution.DataParallel(
        devices=[f"{d.platform}:{d.id}" for d in chosen], auto_shard_dataset=False
    )
    worker, workers = (0, 1) if cluster is None else (cluster.index, len(cluster.addresses))
    return DataParallel(strategy, parallel, len(chosen), worker, workers)
