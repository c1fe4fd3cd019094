"""Reads from a compiled model how far its kernels can grow until the monitor projects them."""

from __future__ import annotations

import math

import keras
import numpy as np

from tf_lyapunov.projection import constrained_variables
from tf_lyapunov.theory.growth import (
    ROUNDOFF,
    adam_ratio_upper_bound,
    growth_upper_bound,
    patch_overlap,
    rmsprop_ratio_upper_bound,
    sgd_moves,
)
from tf_lyapunov.theory.norms import norm_upper_bound


def growth_upper_bounds(
    model, steps: int | None = None, *, norms: dict[str, float] | None = None
) -> dict[str, float]:
    """Proven bounds on the norms of amortised kernels during the next optimizer steps.

    For kernels under `SpectralBound(guarantee="monitor", every=k)`, whose guaranteed projection
    comes after k steps: whatever the data and the loss, no norm exceeds these numbers until then
    (theorem (G.1) of `theory.growth`). Learning rates are those of the schedule, or the present
    one; raising it by hand before the next projection voids the bound. They are of the float32
    kernels, with room for their rounding to float32 at every step.

    Args:
        model: compiled Keras model.
        steps: number of batches; by default each constraint's `every`, or the
            `steps_per_execution` of the model where that is more.
        norms: kernels' paths to upper bounds of their present norms, where they are known.

    Returns:
        Dict from the kernels' paths to upper bounds of their maps' norms.

    Raises:
        ValueError: nothing bounds the optimizer's steps: SGD without `clipnorm`,
            `global_clipnorm` or `clipvalue`, averaged weights, kernels in 16 bits, or another
            kind of optimizer.

    Example:

    >>> import keras, numpy as np, tf_lyapunov as tfl
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> model = tfl.constrain(model, [0.5], guarantee="monitor", every=10)
    >>> model.compile(keras.optimizers.SGD(0.01, clipnorm=1.0), "mse")
    >>> (bound,) = growth_upper_bounds(model).values()
    >>> 0.1 < bound < 0.61
    True
    """
    optimizer = model.optimizer
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    found = {}
    # Keras lets no callback in before so many batches.
    execution = int(getattr(model, "steps_per_execution", None) or 1)
    for _, variable in constrained_variables(model):
        constraint = variable.constraint
        if getattr(constraint, "guarantee", None) != "monitor" or constraint.max_gain is None:
            continue
        dtype = keras.backend.standardize_dtype(variable.dtype)
        if dtype not in ("float32", "float64"):
            raise ValueError(
                "A kernel's rounding is bounded for float32 only. Received: kernel "
                f"{variable.path!r} of dtype {dtype}. Use a mixed precision policy, which keeps "
                "kernels in float32."
            )
        count = max(constraint.every, execution) if steps is None else int(steps)
        kernel = variable.numpy().astype(np.float64)
        linear_map = constraint.linear_map(kernel.shape)
        if variable.path in (norms or {}):
            norm = norms[variable.path]
        elif linear_map is None:
            norm = float(keras.ops.convert_to_numpy(constraint.upper_bound(variable.numpy())))
            norm *= 1 + 1e-5  # computed in float32
        else:
            norm = norm_upper_bound(kernel, linear_map).value
        found[variable.path] = growth_upper_bound(
            norm,
            float(np.linalg.norm(kernel)) * (1 + 1e-9),
            _moves(optimizer, variable, count),
            patch_overlap(kernel.shape, linear_map),
        )
    return found


def _moves(optimizer, variable, count: int) -> list[float]:
    """Bounds on the Frobenius norms of the next steps of one kernel."""
    name, size = type(optimizer).__name__, math.prod(variable.shape)
    if optimizer is None or not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError("The model must be compiled with a Keras optimizer. Received: none.")
    if optimizer.use_ema:
        raise ValueError(
            f"Averaged weights may leave any bound. Received: {name} with use_ema=True."
        )
    rates = _rates(optimizer, count)
    decay = optimizer.weight_decay or 0.0
    if not 0 <= decay * max(rates, default=0.0) <= 1:
        raise ValueError(
            f"Weight decay must shrink. Received: weight_decay={decay} times a learning rate of "
            f"{max(rates)} is not in [0, 1]."
        )
    kind = type(optimizer)  # a subclass may step as it likes
    if kind is keras.optimizers.SGD:
        return _sgd(optimizer, variable, rates, size)
    if kind in (keras.optimizers.Adam, keras.optimizers.AdamW):
        ratio = adam_ratio_upper_bound(optimizer.beta_1, optimizer.beta_2, optimizer.epsilon)
    elif kind is keras.optimizers.RMSprop and not optimizer.centered:
        norm = rmsprop_ratio_upper_bound(optimizer.rho, optimizer.epsilon) * math.sqrt(size)
        return _with_momentum(optimizer, variable, rates, norm, nesterov=False)
    else:
        raise ValueError(
            f"No bound on the steps of this optimizer is known. Received: {name}. Known: Adam, "
            "AdamW, RMSprop (not centered), and SGD with clipped gradients."
        )
    return [rate * ratio * math.sqrt(size) for rate in rates]


def _sgd(optimizer, variable, rates, size):
    norm = optimizer.clipnorm or optimizer.global_clipnorm
    if not norm and not optimizer.clipvalue:
        raise ValueError(
            "The steps of SGD are bounded only if its gradients are. Received: SGD without "
            "clipnorm, global_clipnorm or clipvalue."
        )
    # Clipping divides by a norm that was summed in float32.
    norm = norm * (1 + size * ROUNDOFF) if norm else optimizer.clipvalue * math.sqrt(size)
    return _with_momentum(optimizer, variable, rates, norm, nesterov=optimizer.nesterov)


def _with_momentum(optimizer, variable, rates, norm, nesterov):
    velocity = 0.0  # the momentum holds steps of earlier rates: it is read, not bounded
    if optimizer.momentum and optimizer.built:
        index = optimizer._get_variable_index(variable)
        kept = optimizer.momentums if hasattr(optimizer, "momentums") else optimizer._momentums
        velocity = float(np.linalg.norm(kept[index].numpy().astype(np.float64))) * (1 + 1e-9)
    return sgd_moves(rates, norm, optimizer.momentum, nesterov=nesterov, velocity=velocity)


def _rates(optimizer, count: int) -> list[float]:
    """Learning rates of the steps among the next `count` calls of the optimizer."""
    first = int(optimizer._iterations.numpy())  # unlike `iterations`, counts accumulated gradients
    every = optimizer.gradient_accumulation_steps or 1
    calls = [first + j for j in range(count) if (first + j + 1) % every == 0]
    rate = optimizer._learning_rate
    if not isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return [float(rate.numpy())] * len(calls)
    return [float(keras.ops.convert_to_numpy(rate(call))) for call in calls]
