"""`LyapunovMonitor`: during `fit`, do the layers still prove the claim? It also enforces it."""

import dataclasses
import warnings

import keras
import numpy as np
from keras import ops

from tf_lyapunov.bounds.layer_indices import layer_indices
from tf_lyapunov.bounds.stages import stages as read_stages
from tf_lyapunov.callbacks import enforcement
from tf_lyapunov.callbacks.quiet import hide_from_progress_bars
from tf_lyapunov.callbacks.reading import (
    Reading,
    fixed_gain,
    has_memory,
    measured,
    memory_reading,
    normalizations,
    selected_stages,
    up,
)
from tf_lyapunov.certification import lipschitz_upper_bound
from tf_lyapunov.digits import at_most
from tf_lyapunov.growth import growth_upper_bounds
from tf_lyapunov.layers.base import refresh
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.weights import inference_value
from tf_lyapunov.projection import project
from tf_lyapunov.spectral.arguments import count
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.sectors import Indices
from tf_lyapunov.theory.threads import one_thread

ON_VIOLATION = ("warn", "stop", "raise", "ignore")


class ClaimLost(RuntimeError):
    """The layers' spectral norms no longer prove the claim (`on_violation="raise"`)."""


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
    (hence before callbacks that save at the end of an epoch), at batches where `ModelCheckpoint` or
    `BackupAndRestore` with an integer `save_freq` save, at the end of training, after weights were
    averaged or restored, and every k steps where `constrain(..., guarantee="monitor", every=k)`
    says so (or at every hook of Keras, where `steps_per_execution` is more than k). Put it before
    callbacks that save or log, so that they see its entries. A callback of your own that saves
    between epochs must call `project` first.

    Without a design, a chain with recurrent equilibrium layers is read by `certify_dynamics`: the
    proven gain of every layer over sequences, beside the γ that it is made for as its budget.

    Every reading starts from the model as it computes then: slopes, gains of normalizations and
    what stands before the first layer are read anew. If the weights that training leaves are not
    those of the last epoch's reading, they are read, and reported, once more.

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
        verbose: 1 prints one line per epoch, with the gain and the stage closest to its budget; 2
            prints all that is proved, and shows every entry of `logs` in Keras' progress bar; 0
            prints nothing. `History`, `CSVLogger`, `TensorBoard` get every entry in all cases.

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
        self.logged = ()  # names of the entries in `logs`
        self._stages, self._is_whole, self._fixed = None, False, None
        self._has_memory = False
        self._vectors = {}
        self._true_indices = {}
        self._step = 0
        self._steps = enforcement.StepCounter()
        self._list, self._savers = None, []
        # Digests of the weights that were last enforced, and last reported at an epoch's end.
        self._enforced, self._reported = None, None

    # Keras' hooks.

    def on_train_begin(self, logs=None):
        with one_thread():
            self._read_structure()
        self._fixed = {stage.name: fixed_gain(stage) for stage in self._stages}
        self._sync()
        self._steps.start(self.model)
        self._join(enforcement.companions(self))
        self._reported = None
        self._enforce()

    def on_epoch_begin(self, epoch, logs=None):
        self._steps.start_epoch()
        if epoch == 0 or self._list is None:
            self._enforce_once()

    def on_train_batch_end(self, batch, logs=None):
        before, self._step = self._step, self._step + self._steps.hook(batch)
        steps = (self.params or {}).get("steps")
        if (steps is not None and batch + 1 >= steps) or self._is_saved(batch):
            self._enforce()
        elif self._steps.is_due:
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
        # Reading refreshes caches, which are weights too.
        self._enforced = self._reported = enforcement.fingerprint(self.model)
        if logs is not None:
            entries = reading.logs()
            self.logged = tuple(entries)
            logs.update(entries)
        self._report(reading)

    def on_train_end(self, logs=None):
        self._enforce_once()
        if self._list is None:
            self._finish()

    # Readings.

    def read(self):
        """Measures the model's stages now. Returns a `Reading` and appends it to `.readings`."""
        with one_thread():
            reading = self._read()
        self.readings.append(reading)
        return reading

    def _read(self):
        self._sync()
        self._read_structure()
        if self._has_memory:
            return memory_reading(self.model)
        refresh(self.model)
        if self._fixed is None:
            self._fixed = {stage.name: fixed_gain(stage) for stage in self._stages}
        sigma, bound, budget, stored = {}, {}, {}, {}
        for stage in self._stages:
            fixed = self._fixed.get(stage.name, fixed_gain(stage))
            found = measured(stage, fixed, self.iterations, self._vectors)
            sigma[stage.name], bound[stage.name] = found.sigma, found.bound
            if found.budget is not None:
                budget[stage.name] = found.budget
            stored |= found.stored
        check = None
        gain = self._gain(bound)
        if self.design is not None:
            check = self.design.check(list(bound.values()), distances=self._distances())
            check = self._checked(check, gain)
            gain = min(gain, float(check.gain_upper_bound)) if check.holds else gain
        growth = self._growth(stored)
        return Reading(sigma, bound, budget, check, gain, dict(self._true_indices), growth)

    def summary(self, reading, remark="", *, brief=False):
        """One line: what is proved, the gain, and the stages closest to budget and indices.

        `brief` leaves out the numbers of the cascade and of the indices.
        """
        ratios = {n: reading.sigma_upper_bound[n] / b for n, b in reading.budget.items() if b}
        parts = [f"gain ≤ {at_most(reading.gain_upper_bound, 4)}"]
        if reading.check is not None:
            if not brief:
                parts.append(f"cascade margin {reading.check.margin:.3g}")
            if not reading.check.holds:
                parts.append(reading.check.reason)
        if ratios:
            name = max(ratios, key=ratios.get)
            parts.append(f"tightest {name} at {100 * ratios[name]:.2f}% of its budget")
        if reading.true_indices and not brief:
            implied = dict(zip(reading.sigma, reading.check.indices, strict=True))
            name, found = min(reading.true_indices.items(), key=lambda item: item[1].nu)
            parts.append(f"true nu of {name} {found.nu:.3g} ({implied[name].nu:.3g} by its norm)")
        if reading.check is not None:
            state = "claim proved" if reading.holds else "CLAIM NOT PROVED"
        elif reading.budget:
            state = "budgets kept" if reading.holds else "BUDGETS NOT KEPT"
        else:
            state = "no claim and no budgets"
        return f"LyapunovMonitor: {remark}{state}; " + "; ".join(parts)

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

    def _join(self, companions):
        """Checks the other callbacks, and puts a last one behind those that change weights."""
        self._list, self._savers = companions, []
        if companions is None:
            return
        for old in [c for c in companions.callbacks if _closes(c, self)]:
            companions.callbacks.remove(old)
        if enforcement.steps_leave_bounds(self.model):
            known = (self.params or {}).get("steps") is not None
            found = enforcement.batch_savers(companions.callbacks, self, steps_known=known)
            self._savers = found
        companions.callbacks.append(enforcement.Closing(self))
        if self.verbose < 2:
            hide_from_progress_bars(companions.callbacks, self)

    def _is_saved(self, batch):
        return any([enforcement.will_save(saver, batch) for saver in self._savers])

    def _finish(self):
        """What is left in the model is enforced, and read again unless it was just reported."""
        self._enforce_once()
        if self._reported in (None, self._enforced):
            return
        reading = self.read()
        self._enforced = self._reported = enforcement.fingerprint(self.model)
        self._report(reading, "weights changed after the last epoch: ")

    def _report(self, reading, remark=""):
        if self.verbose:
            line = self.summary(reading, remark, brief=self.verbose < 2)
            print(line, flush=True)
        self._judge(reading)

    def _enforce_once(self):
        """Enforces unless the weights are those that the last time left."""
        self._sync()
        if self._enforced != enforcement.fingerprint(self.model):
            self._enforce()

    def _enforce(self):
        self._sync()
        project(self.model, progress=False)  # Keras draws its own
        self._warm_up()
        self._steps.enforced(self.model)
        self._enforced = enforcement.fingerprint(self.model)

    def _bound_amortised(self):
        """The guarantee of one step for the kernels that each step leaves to the monitor."""
        self._sync()
        for variable in enforcement.amortised(self.model):
            variable.assign(variable.constraint.enforce(ops.stop_gradient(variable.value)))
        self._warm_up()
        self._steps.enforced(self.model)

    def _warm_up(self):
        with one_thread():
            for variable in enforcement.amortised(self.model):
                variable.constraint.warm_up(variable)

    def _measure_indices(self, implied):
        """Layer name to the indices with the largest ν that Theorem 1 proves at the δ implied."""
        found = {}
        for stage, indices in zip(self._stages, implied or (), strict=False):
            bare = (
                len(stage.maps) == 1
                and not normalizations(stage)
                and stage.pre_gain * stage.post_gain == 1
            )
            bare &= getattr(stage.layer, "data_format", "channels_last") == "channels_last"
            if indices is None or not bare:
                continue
            kernel, linear_map = stage.maps[0]
            kernel = inference_value(kernel, stage.layer.compute_dtype)
            options = {"delta": indices.delta, "linear_map": linear_map, "progress": False}
            proof = layer_indices(kernel, stage.sector, **options)
            found[stage.name] = proof.indices
        return found

    def _read_structure(self):
        """Stages with the slopes and gains of now; norms are not taken, so that it is cheap."""
        self._has_memory = self.design is None and has_memory(self.model)
        if self._has_memory:
            self._stages, self._is_whole = [], False
            return
        network = read_network(self.model, bounded=False)
        found = read_stages(network)
        self._stages = selected_stages(found, self.layers, self.design)
        names = [stage.name for stage in self._stages]
        # Whether the stages' gains multiply to the network's.
        self._is_whole = network.is_chain and names == [s.name for s in found] != []

    def _distances(self):
        """Upper bounds of ‖W - cI‖ for a conic design, else None."""
        if self.design.balls is None:
            return None
        distances = []
        for stage, (center, _) in zip(self._stages, self.design.balls, strict=True):
            kernel, linear_map = stage.maps[0]
            kernel = inference_value(kernel, stage.layer.compute_dtype)
            offset = kernel - center * np.eye(*kernel.shape)
            distances.append(up(norm_upper_bound(offset, linear_map).value))
        return distances

    def _gain(self, bound):
        if not self._is_whole:
            return lipschitz_upper_bound(self.model, progress=False).gain_upper_bound
        gains = [s.sector.magnitude * bound[s.name] for s in self._stages]
        return up(float(np.prod(gains)), 2 * len(gains))

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
            self._steps.measure(self.model)
            grown = growth_upper_bounds(self.model, self._steps.limit, norms=norms)
        except ValueError:  # nothing bounds the optimizer's steps
            return {}
        found = {}
        for stage in self._stages if grown else ():
            paths = [kernel.path for kernel, _ in stage.maps]
            # Nothing bounds how a batch normalization, or a kernel by its side, moves meanwhile.
            if normalizations(stage) or not grown.keys() >= set(paths):
                continue
            if all(path in norms for path in paths):
                gains = [grown[path] for path in paths]
                found[stage.name] = up(float(np.prod(gains)) * stage.pre_gain * stage.post_gain)
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


def _crossed(before, now, period):
    """Whether a multiple of `period` lies in (before, now]."""
    return now // period > before // period


def _closes(callback, monitor):
    return isinstance(callback, enforcement.Closing) and callback.monitor is monitor
