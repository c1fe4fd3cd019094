"""`LyapunovMonitor`: during `fit`, do the layers still prove the claim? It also enforces it."""

import dataclasses
import warnings

import keras
import numpy as np
from keras import ops

from tf_lyapunov.bounds.layer_indices import layer_indices
from tf_lyapunov.bounds.stages import stages as read_stages
from tf_lyapunov.certification import lipschitz_upper_bound
from tf_lyapunov.constraints import SpectralBound
from tf_lyapunov.growth import growth_upper_bounds
from tf_lyapunov.layers.activations import LipschitzPReLU
from tf_lyapunov.layers.base import refresh
from tf_lyapunov.program.activations import innermost
from tf_lyapunov.program.linear import BatchNormScale, inference_value
from tf_lyapunov.program.network import read_network
from tf_lyapunov.projection import constrained_variables, project
from tf_lyapunov.spectral.arguments import count
from tf_lyapunov.spectral.compilation import one_thread
from tf_lyapunov.spectral.norms import norm_estimate
from tf_lyapunov.theory.norms import norm_upper_bound, power_iteration
from tf_lyapunov.theory.sectors import Indices

ON_VIOLATION = ("warn", "stop", "raise", "ignore")


class ClaimLost(RuntimeError):
    """The layers' spectral norms no longer prove the claim (`on_violation="raise"`)."""


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


class LyapunovMonitor(keras.callbacks.Callback):
    """Checks the claim during `fit`, writes it to `logs`, and enforces the constraints.

    Each reading takes, per stage, a warm-started power iteration on the true map (an estimate from
    below, logged as `sigma/<layer>`) and the guaranteed bound (`sigma_upper_bound/<layer>`), and
    checks with the latter the design's cascade matrix. Logged beside: `budget/<layer>`,
    `delta/<layer>`, `nu/<layer>` (indices implied by the norms), `cascade_margin`,
    `gain_upper_bound`; with `guarantee="monitor"`, where the optimizer's steps are bounded (Adam,
    AdamW, RMSprop, SGD with clipped gradients), `growth_upper_bound/<layer>`, which no step until
    the next guaranteed projection takes the stage's gain past; and with `indices_every` the
    tighter `true_delta/<layer>` (the same δ when measured) and `true_nu/<layer>`.

    It projects the constrained kernels before every evaluation, at the last step of every epoch
    (hence before callbacks that save at the end of an epoch), at the end of training, and every k
    steps where `constrain(..., guarantee="monitor", every=k)` says so. Place it before callbacks
    that save or log, so that they see its entries.

    Args:
        design: `Design` that was given to `constrain`, or None to only watch constraints and gain.
        every: `"epoch"`, or the number of steps between readings (readings between epochs are kept
            in `.readings` and appear in the logs of the epoch's end).
        on_violation: `"warn"`, `"stop"` (sets `model.stop_training`), `"raise"` or `"ignore"`,
            when a reading no longer proves the claim.
        layers: names of the layers that the design is for, as given to `constrain`; a claim about
            the network is proved only if they are all of its stages, in a chain.
        iterations: power steps per reading.
        indices_every: after the first epoch, and every so many epochs after it, `layer_indices`
            finds, by a semidefinite program per layer, the largest ν that the weights prove for
            the design's δ (its scaled δ where only gains are designed, as in `delta/<layer>`); in
            between its last values are logged again. For stages of one kernel and an activation,
            without normalization or pooling; others have no such entry.
        verbose: 1 prints one line per epoch, 0 nothing.

    Raises:
        ValueError: if an argument is not one of the above.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov import constrain, spectral_design, Sector
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "relu"),
    ...                           keras.layers.Dense(2)])
    >>> design = spectral_design(gain=2.0, sectors=[Sector.of("relu"), Sector.linear()])
    >>> model = constrain(model, design)
    >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> monitor = LyapunovMonitor(design, verbose=0)
    >>> history = model.fit(np.zeros((8, 4)), np.zeros(8), verbose=0, callbacks=[monitor])
    >>> history.history["gain_upper_bound"][-1] <= 2.0
    True
    """

    def __init__(
        self,
        design=None,
        *,
        every="epoch",
        on_violation="warn",
        layers=None,
        iterations=10,
        indices_every=None,
        verbose=1,
    ):
        super().__init__()
        if every != "epoch" and (isinstance(every, bool) or int(every) != every or every < 1):
            raise ValueError(
                f"`every` must be 'epoch' or a positive number of steps. Received: every={every!r}."
            )
        if on_violation not in ON_VIOLATION:
            raise ValueError(
                f"`on_violation` must be one of {ON_VIOLATION}. "
                f"Received: on_violation={on_violation!r}."
            )
        if isinstance(iterations, bool) or int(iterations) != iterations or iterations < 1:
            raise ValueError(
                f"`iterations` must be a positive integer. Received: iterations={iterations!r}."
            )
        if indices_every is not None:
            indices_every = count("indices_every", indices_every)
            if design is None:
                raise ValueError(
                    "`indices_every` needs a design, which says the δ of each layer. Received: "
                    f"design=None, indices_every={indices_every}."
                )
        self.design = design
        self.every = every
        self.indices_every = indices_every
        self.on_violation = on_violation
        self.layers = layers
        self.iterations = int(iterations)
        self.verbose = verbose
        self.readings = []
        self._stages = None
        self._is_whole, self._must_reread = False, False
        self._vectors = {}
        self._true_indices = {}
        self._step = 0
        self._epoch_start = 0
        self._enforced_at = None

    # Keras' hooks.

    def on_train_begin(self, logs=None):
        self._read_structure()
        self._period = _projection_period(self.model)
        self._enforce()

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch_start = self._step

    def on_train_batch_end(self, batch, logs=None):
        # With `steps_per_execution` the hook is called once for several steps.
        before, self._step = self._step, self._epoch_start + batch + 1
        last = self.params.get("steps") == batch + 1
        if last:
            self._enforce()
        elif self._period and _crossed(before, self._step, self._period):
            self._bound_amortised()
        if self.every != "epoch" and _crossed(before, self._step, self.every):
            self._judge(self.read())

    def on_test_begin(self, logs=None):
        self._enforce_once()

    def on_epoch_end(self, epoch, logs=None):
        self._enforce_once()
        reading = self.read()
        if self.indices_every and epoch % self.indices_every == 0:
            self._true_indices = self._measure_indices(reading.check.indices)
            reading = dataclasses.replace(reading, true_indices=dict(self._true_indices))
            self.readings[-1] = reading
        if logs is not None:
            logs.update(reading.logs())
        if self.verbose:
            print(self.summary(reading), flush=True)
        self._judge(reading)

    def on_train_end(self, logs=None):
        self._enforce()

    # Readings.

    def read(self):
        """Measures the model's stages now. Returns a `Reading` and appends it to `.readings`."""
        with one_thread():
            reading = self._read()
        self.readings.append(reading)
        return reading

    def _read(self):
        self._sync()
        if self._stages is None or self._must_reread:
            self._read_structure()
        refresh(self.model)
        sigma, bound, budget, stored = {}, {}, {}, {}
        for stage in self._stages:
            fixed = stage.pre_gain * stage.post_gain
            around = fixed * _normalization_gain(stage)
            estimates, bounds, budgets = [], [], []
            for position, (kernel, linear_map) in enumerate(stage.maps):
                key = f"{stage.name}/{position}"
                estimate, self._vectors[key] = _power_iteration(
                    kernel, linear_map, self.iterations, self._vectors.get(key)
                )
                estimates.append(estimate)
                # Of the kernel that computes: a cast to 16 bits may take it past its budget.
                used = inference_value(kernel, stage.layer.compute_dtype)
                bounds.append(_guaranteed_bound(used, linear_map))
                if stage.layer.compute_dtype == kernel.dtype:
                    stored[kernel.path] = bounds[-1]
                if isinstance(kernel.constraint, SpectralBound):
                    budgets.append(kernel.constraint.max_gain)
            sigma[stage.name] = float(np.prod(estimates)) * around
            bound[stage.name] = _up(float(np.prod(bounds)) * around)
            if len(budgets) == len(bounds) and None not in budgets:
                budget[stage.name] = _up(float(np.prod(budgets)) * fixed)
        check = None
        gain = self._gain(bound)
        if self.design is not None:
            check = self.design.check(list(bound.values()), distances=self._distances())
            check = self._checked(check, gain)
            gain = min(gain, float(check.gain_upper_bound)) if check.holds else gain
        growth = self._growth(stored)
        return Reading(sigma, bound, budget, check, gain, dict(self._true_indices), growth)

    def summary(self, reading):
        """One line: what is proved, the gain, and the stages closest to budget and indices."""
        ratios = {n: reading.sigma_upper_bound[n] / b for n, b in reading.budget.items() if b}
        parts = [f"gain ≤ {reading.gain_upper_bound:.4g}"]
        if reading.check is not None:
            parts.append(f"cascade margin {reading.check.margin:.3g}")
            if not reading.check.holds:
                parts.append(reading.check.reason)
        if ratios:
            name = max(ratios, key=ratios.get)
            parts.append(f"tightest {name} at {100 * ratios[name]:.2f}% of its budget")
        if reading.true_indices:
            implied = dict(zip(reading.sigma, reading.check.indices, strict=True))
            name, found = min(reading.true_indices.items(), key=lambda item: item[1].nu)
            parts.append(f"true nu of {name} {found.nu:.3g} ({implied[name].nu:.3g} by its norm)")
        if reading.check is not None:
            state = "claim proved" if reading.holds else "CLAIM NOT PROVED"
        elif reading.budget:
            state = "budgets kept" if reading.holds else "BUDGETS NOT KEPT"
        else:
            state = "no claim and no budgets"
        return f"LyapunovMonitor: {state}; " + "; ".join(parts)

    # State for exact resumption.

    def get_state(self):
        """Warm vectors, step counter and the last indices, as a dict of arrays."""
        found = self._true_indices.items()
        indices = {f"indices/{k}": np.asarray([v.delta, v.nu]) for k, v in found}
        vectors = {f"v/{k}": v for k, v in self._vectors.items()}
        return {"step": np.asarray(self._step), **vectors, **indices}

    def set_state(self, state):
        """Restores what `get_state` returned."""
        self._step = int(state["step"])
        self._vectors = {k[2:]: np.asarray(v) for k, v in state.items() if k.startswith("v/")}
        self._true_indices = {
            k[8:]: Indices(*map(float, v)) for k, v in state.items() if k.startswith("indices/")
        }

    # Private.

    def _sync(self):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()

    def _enforce_once(self):
        """Enforces unless no step was taken since the last time."""
        if self._enforced_at != self._step:
            self._enforce()

    def _enforce(self):
        self._enforced_at = self._step
        self._sync()
        project(self.model)
        self._warm_up()

    def _bound_amortised(self):
        """The guarantee of one step for the kernels that each step leaves to the monitor."""
        self._sync()
        for variable in _amortised(self.model):
            variable.assign(variable.constraint.enforce(ops.stop_gradient(variable.value)))
        self._warm_up()

    def _warm_up(self):
        with one_thread():
            for variable in _amortised(self.model):
                variable.constraint.warm_up(variable)

    def _measure_indices(self, implied):
        """Layer name to the indices with the largest ν that Theorem 1 proves at the δ implied."""
        found = {}
        for stage, indices in zip(self._stages, implied or (), strict=False):
            norms = (*stage.batch_norms, *stage.post_batch_norms)
            bare = len(stage.maps) == 1 and not norms and stage.pre_gain * stage.post_gain == 1
            bare &= getattr(stage.layer, "data_format", "channels_last") == "channels_last"
            if indices is None or not bare:
                continue
            kernel, linear_map = stage.maps[0]
            kernel = inference_value(kernel, stage.layer.compute_dtype)
            proof = layer_indices(kernel, stage.sector, delta=indices.delta, linear_map=linear_map)
            found[stage.name] = proof.indices
        return found

    def _read_structure(self):
        with one_thread():
            network = read_network(self.model, bounded=False)
        found = read_stages(network)
        self._stages = _selected_stages(found, self.layers, self.design)
        names = [stage.name for stage in self._stages]
        # Whether the stages' gains multiply to the network's.
        self._is_whole = network.is_chain and names == [s.name for s in found] != []
        # Slopes and declared gains that training may move; kernels are read every time.
        learned = (keras.layers.PReLU, LipschitzPReLU)
        self._must_reread = any(
            node.kind == "declared" or isinstance(innermost(node.layer), learned)
            for node in network.nodes
        )

    def _distances(self):
        """Upper bounds of ‖W - cI‖ for a conic design, else None."""
        if self.design.balls is None:
            return None
        distances = []
        for stage, (center, _) in zip(self._stages, self.design.balls, strict=True):
            kernel, linear_map = stage.maps[0]
            kernel = inference_value(kernel, stage.layer.compute_dtype)
            offset = kernel - center * np.eye(*kernel.shape)
            distances.append(_up(norm_upper_bound(offset, linear_map).value))
        return distances

    def _gain(self, bound):
        if not self._is_whole:
            return lipschitz_upper_bound(self.model).gain_upper_bound
        gains = [s.sector.magnitude * bound[s.name] for s in self._stages]
        return _up(float(np.prod(gains)))

    def _checked(self, check, gain):
        """The design's check, lost where the model is not what the design is about."""
        outside = [
            stage.name
            for stage, assumed in zip(self._stages, self.design.sectors, strict=True)
            if stage.sector.alpha < assumed.alpha or stage.sector.beta > assumed.beta
        ]
        if outside:
            reason = f"the slopes of the activations after {outside} have left the design's sectors"
        elif self.design.balls is not None and not all(s.is_bare for s in self._stages):
            reason = "a conic design is for layers with nothing but an activation after them"
        elif not self._is_whole:
            reason = "the design is for a chain of layers, and these are a part of the model"
        else:
            return check
        margin = min(check.margin, 0.0)
        return dataclasses.replace(
            check, holds=False, margin=margin, gain_upper_bound=gain, reason=reason
        )

    def _growth(self, norms):
        """Stage name to its gain's bound until the next projection, where all of it is known."""
        if getattr(self.model, "optimizer", None) is None:
            return {}
        try:
            grown = growth_upper_bounds(self.model, norms=norms)
        except ValueError:  # nothing bounds the optimizer's steps
            return {}
        found = {}
        for stage in self._stages if grown else ():
            paths = [kernel.path for kernel, _ in stage.maps]
            # Nothing bounds how a batch normalization, or a kernel by its side, moves meanwhile.
            if stage.batch_norms or stage.post_batch_norms or not grown.keys() >= set(paths):
                continue
            if all(path in norms for path in paths):
                gains = [grown[path] for path in paths]
                found[stage.name] = _up(float(np.prod(gains)) * stage.pre_gain * stage.post_gain)
        return found

    def _judge(self, reading):
        if reading.holds or self.on_violation == "ignore":
            return
        message = self.summary(reading)
        if self.on_violation == "raise":
            raise ClaimLost(message)
        if self.on_violation == "stop":
            self.model.stop_training = True
        warnings.warn(message, stacklevel=2)


def _selected_stages(found, layers, design):
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


def _crossed(before, now, period):
    """Whether a multiple of `period` lies in (before, now]."""
    return now // period > before // period


def _projection_period(model):
    """Smallest `every` among the constraints that leave the guarantee to the monitor."""
    return min((variable.constraint.every for variable in _amortised(model)), default=None)


def _amortised(model):
    """Variables whose constraint leaves the guarantee to the monitor."""
    for _, variable in constrained_variables(model):
        if getattr(variable.constraint, "guarantee", None) == "monitor":
            yield variable


def _normalization_gain(stage):
    norms = (*stage.batch_norms, *stage.post_batch_norms)
    return float(np.prod([BatchNormScale.of(layer).gain for layer in norms]))


def _up(value):
    """A product of a few dozen factors, rounded up."""
    return float(np.nextafter(value * (1 + 64 * np.finfo(float).eps), np.inf))


def _guaranteed_bound(kernel, linear_map):
    return norm_upper_bound(ops.convert_to_numpy(kernel), linear_map).value


def _power_iteration(kernel, linear_map, iterations, vector):
    """Estimate of σ from below on the true map, and the vector to start from next time."""
    kernel = ops.cast(ops.stop_gradient(ops.convert_to_tensor(kernel)), "float32")
    if linear_map.kind == "dense":  # a few products: NumPy has less to set up
        return power_iteration(ops.convert_to_numpy(kernel), iterations, vector)
    start = None if vector is None else ops.convert_to_tensor(vector)
    sigma, vector = norm_estimate(kernel, linear_map, iterations=iterations, start=start)
    return float(ops.convert_to_numpy(sigma)), ops.convert_to_numpy(vector)
