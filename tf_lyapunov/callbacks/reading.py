"""What `LyapunovMonitor` sees at one moment, and how it is measured."""

import dataclasses
import functools

import numpy as np
from keras import ops

from tf_lyapunov.constraints import NormalizationBound, SpectralBound
from tf_lyapunov.dynamics.certifying import certify_dynamics
from tf_lyapunov.dynamics.systems import cell_of
from tf_lyapunov.program.families.scaling import BatchNormScale
from tf_lyapunov.program.weights import inference_value
from tf_lyapunov.spectral.compilation import compiled
from tf_lyapunov.spectral.norms import measured_map, norm_estimate, start_vector
from tf_lyapunov.theory.norms import norm_upper_bound, power_iteration
from tf_lyapunov.theory.supply_rates import L2Gain


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the monitor saw at one moment.

    Attributes:
        sigma: dict, layer name to power-iteration estimate of its gain (a lower estimate).
        sigma_upper_bound: dict, layer name to guaranteed upper bound of its stage's gain.
        budget: dict, layer name to budget (absent where unconstrained).
        check: `DesignCheck` of the upper bounds, or None without a design.
        gain_upper_bound: float, guaranteed l2 gain of the network's logits.
        true_indices: dict, layer name to the `Indices` that its weights proved when
            `indices_every` last measured them.
        growth: dict, layer name to a proven bound of its stage's gain at every step until the next
            guaranteed projection (amortised stages without batch normalization only, where the
            optimizer's steps are bounded).
    """

    sigma: dict
    sigma_upper_bound: dict
    budget: dict
    check: object
    gain_upper_bound: float
    true_indices: dict = dataclasses.field(default_factory=dict)
    growth: dict = dataclasses.field(default_factory=dict)

    @property
    def holds(self):
        """Whether every stage is within its budget and the cascade proves the claim."""
        within = all(self.sigma_upper_bound[n] <= b for n, b in self.budget.items())
        return within and (self.check is None or bool(self.check.holds))

    def logs(self):
        """Flat dict of floats for Keras' `logs`."""
        logs = {f"sigma/{name}": value for name, value in self.sigma.items()}
        logs |= {f"sigma_upper_bound/{n}": value for n, value in self.sigma_upper_bound.items()}
        logs |= {f"budget/{name}": value for name, value in self.budget.items()}
        logs |= {f"growth_upper_bound/{n}": value for n, value in self.growth.items()}
        logs["gain_upper_bound"] = self.gain_upper_bound
        if self.check is not None:
            logs["cascade_margin"] = float(self.check.margin)
            for name, indices in zip(self.sigma, self.check.indices or (), strict=False):
                if indices is not None:
                    logs[f"delta/{name}"] = float(indices.delta)
                    logs[f"nu/{name}"] = float(indices.nu)
        logs |= {f"true_delta/{name}": found.delta for name, found in self.true_indices.items()}
        logs |= {f"true_nu/{name}": found.nu for name, found in self.true_indices.items()}
        return {name: float(value) for name, value in logs.items()}


@dataclasses.dataclass(frozen=True)
class StageReading:
    """One stage's gain: an estimate from below, a bound, its budget (None without one).

    `stored` has the bounds of those kernels that compute as they are stored, by path.
    """

    sigma: float
    bound: float
    budget: float | None
    stored: dict


def has_memory(model):
    """Whether a model holds recurrent equilibrium layers."""
    return any(cell_of(layer) is not None for layer in model._flatten_layers())


def memory_reading(model):
    """`Reading` of a chain with recurrent equilibrium layers, by the storages of their weights."""
    proof = certify_dynamics(model, optimise=False)
    bound = {stage.name: stage.gain_upper_bound for stage in proof.stages}
    budget = {}
    for layer in model._flatten_layers():
        supply = getattr(cell_of(layer), "current_supply", None)
        if layer.name in bound and isinstance(supply, L2Gain):
            budget[layer.name] = supply.gamma
    return Reading({}, bound, budget, None, proof.gain_upper_bound)


def measured(stage, fixed, iterations, vectors):
    """Measures a stage at its present weights.

    Args:
        stage: `Stage`, read from the model as it computes now.
        fixed: what stood around its map when the budgets were given (`fixed_gain`).
        iterations: power steps.
        vectors: dict of the vectors that they start from; updated.
    """
    around = stage.pre_gain * stage.post_gain * normalization_gain(stage)
    estimates, bounds, budgets, stored = [], [], [], {}
    for position, (kernel, linear_map) in enumerate(stage.maps):
        key = f"{stage.name}/{position}"
        # Both of the kernel that computes: a cast to 16 bits may take it past its budget.
        used = inference_value(kernel, stage.layer.compute_dtype)
        estimate, vectors[key] = _power_iteration(used, linear_map, iterations, vectors.get(key))
        estimates.append(estimate)
        bounds.append(_guaranteed_bound(used, linear_map))
        if stage.layer.compute_dtype == kernel.dtype:
            stored[kernel.path] = bounds[-1]
        if isinstance(kernel.constraint, SpectralBound):
            budgets.append(kernel.constraint.max_gain)
    budget = None
    if len(budgets) == len(bounds) and None not in budgets:
        budget = up(float(np.prod(budgets)) * fixed)
    sigma = float(np.prod(estimates)) * around
    return StageReading(sigma, up(float(np.prod(bounds)) * around), budget, stored)


def normalizations(stage):
    """Batch normalizations of a stage: before its kernel, folded into it, and after it."""
    return (*stage.pre_batch_norms, *stage.batch_norms, *stage.post_batch_norms)


def normalization_gain(stage):
    """Their gain by the variances and scales of now."""
    return float(np.prod([BatchNormScale.of(layer).gain for layer in normalizations(stage)]))


def fixed_gain(stage):
    """Gain around a stage's map that its budget has paid for: normalizations by their own bounds.

    A normalization without a bound counts as one of gain 1, as `constrain` would hold it.
    """
    bounds = [
        layer.gamma.constraint.max_gain
        for layer in normalizations(stage)
        if layer.scale and isinstance(layer.gamma.constraint, NormalizationBound)
    ]
    return stage.pre_gain * stage.post_gain * float(np.prod(bounds))


def selected_stages(found, layers, design):
    if layers is not None:
        wanted = [getattr(layer, "name", layer) for layer in layers]
        found = [stage for name in wanted for stage in found if stage.name == name]
    count = len(design.budgets) if design is not None else len(found)
    if len(found) != count:
        raise ValueError(
            f"The monitor's design needs one budget per stage. Received: {count} budgets for "
            f"{len(found)} stages {[stage.name for stage in found]}. Pass `layers=` as to "
            f"`constrain`."
        )
    return found


def up(value, factors=64):
    """A product of so many factors at most, rounded up."""
    return float(np.nextafter(value * (1 + max(factors, 64) * np.finfo(float).eps), np.inf))


def _guaranteed_bound(kernel, linear_map):
    return norm_upper_bound(ops.convert_to_numpy(kernel), linear_map).value


def _power_iteration(kernel, linear_map, iterations, vector):
    """Estimate of σ from below on the true map, and the vector to start from next time."""
    kernel = np.asarray(kernel, np.float32)
    if linear_map.kind == "dense":  # a few products: NumPy has less to set up
        return power_iteration(kernel, iterations, vector)
    if vector is None:
        vector = start_vector(measured_map(kernel.shape, linear_map)).astype("float32")
    sigma, vector = _estimate(linear_map, iterations)(
        ops.convert_to_tensor(kernel), ops.convert_to_tensor(vector)
    )
    return float(ops.convert_to_numpy(sigma)), ops.convert_to_numpy(vector)


@functools.lru_cache(maxsize=512)
def _estimate(linear_map, iterations):
    """`norm_estimate` as a graph, which all kernels of a map share."""

    def estimate(kernel, start):
        return norm_estimate(kernel, linear_map, iterations=iterations, start=start)

    return compiled(estimate)
