"""The cell of recurrent equilibrium networks: one step, and the weights that all steps share."""

import keras
import numpy as np
from keras import ops

from tf_lyapunov.layers.base import EffectiveLayer
from tf_lyapunov.layers.equilibrium import block_bounds, equilibrium_weights
from tf_lyapunov.layers.potential import monotone_activation
from tf_lyapunov.spectral import precision
from tf_lyapunov.spectral.arguments import count, finite
from tf_lyapunov.spectral.orthogonal import cayley
from tf_lyapunov.theory.sectors import Indices, Sector
from tf_lyapunov.theory.supply_rates import (
    Contracting,
    L2Gain,
    feedthrough_form,
    supply_config,
    supply_from_config,
)

# Norm of D₂₂ in the coordinates of the unit gain: (I - D₂₂ᵀD₂₂)⁻¹ is at most 10 then.
MOST_FEEDTHROUGH = 0.95
# e^±10 of what was given: trained rates stay within float32.
MOST_LOGARITHM = 10.0
# 1 - 4δν of trained indices is not moved below this: nearer to the most that any system can have,
# float32 does not know how far y is from u/2δ.
LEAST_ROOM = 1e-8
# Rounding of y in the coordinates of the unit gain, in units of the last place.
ROUNDING = 8.0
# Share of Glorot's variance that input and output matrices start with: strong ones cost memory.
START = 0.1


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class RecurrentEquilibriumCell(EffectiveLayer):
    """One step of a recurrent equilibrium network, for `keras.layers.RNN`.

        x⁺ = A x + B₁ w + B₂ u + b_x,   v = C₁ x + D₁₁ w + D₁₂ u + b_v,   w = φ(v),
        y = C₂ x + D₂₁ w + D₂₂ u + b_y

    Whatever the values of its variables are, every two trajectories satisfy V⁺ - V ≤ s(Δu, Δy), s
    the supply rate, V a quadratic form of Δx (`layers.equilibrium`): in exact arithmetic on exact
    weights; what the float32 weights prove is for `certify_dynamics` to say. The layer
    `RecurrentEquilibrium` computes the weights once for all steps, and is much faster.

    Args:
        units: number of outputs y.
        states: number of states x.
        supply: `L2Gain(gamma)`, `Indices(delta, nu)` with delta > 0, `Supply(Q, S, R)` or
            `Contracting(rate)`.
        activation: φ, slopes in [0, 1].
        neurons: number of w; as many as states by default.
        blocks: D₁₁ is strictly lower block triangular with so many blocks of neurons, each computed
            in one product; `neurons` blocks are the general acyclic case, and slow.
        feedthrough: whether D₂₂ is trained; else it is 0. By default where the supply rate is of
            indices or general. ν ≥ 0 needs it.
        train_supply: γ, or (δ, ν), are trained beside the weights, from the given ones.
        implicit: D₁₁ is a general matrix, so that w solves an equation; in the place of `blocks`.
        iterations: steps of the splitting that solves it, each a product; see `Step.solved`.
        memory: the linear part starts with eigenvalues from half of this up to this.
        use_bias: whether b_x, b_v, b_y are trained.
        **kwargs: of `keras.layers.Layer`.

    Raises:
        ValueError: if an argument is out of range, φ is not monotone and 1-Lipschitz, the supply
            rate leaves no room, or the compute type has 16 bits.

    Example:

    >>> import numpy as np, keras
    >>> from tf_lyapunov.dynamics import L2Gain
    >>> cell = RecurrentEquilibriumCell(3, states=4, supply=L2Gain(2.0))
    >>> tuple(keras.layers.RNN(cell)(np.ones((2, 5, 6), "float32")).shape)
    (2, 3)

    Reference: Revay, Wang and Manchester (2024), in sound form (`layers.equilibrium`).
    """

    def __init__(
        self,
        units,
        states,
        supply,
        activation="relu",
        *,
        neurons=None,
        blocks=4,
        feedthrough=None,
        train_supply=False,
        implicit=False,
        iterations=40,
        memory=0.98,
        use_bias=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.units = count("units", units)
        self.states = count("states", states)
        self.neurons = self.states if neurons is None else count("neurons", neurons)
        self.implicit = bool(implicit)
        self.iterations = count("iterations", iterations)
        self.blocks = 1 if self.implicit else min(count("blocks", blocks), self.neurons)
        self._supply = supply_from_config(supply)
        self.activation = monotone_activation(activation)
        usual = not isinstance(self._supply, L2Gain | Contracting)
        self.feedthrough = usual if feedthrough is None else bool(feedthrough)
        self.train_supply = bool(train_supply)
        if self.train_supply and not isinstance(self._supply, L2Gain | Indices):
            raise ValueError(
                "`train_supply` is for L2Gain(gamma) and Indices(delta, nu). "
                f"Received: supply={self._supply!r}."
            )
        self.memory = finite("memory", memory)
        if not 0 <= self.memory < 1:
            raise ValueError(f"`memory` must be in [0, 1). Received: memory={memory}.")
        self.use_bias = bool(use_bias)
        if self.compute_dtype not in ("float32", "float64"):
            raise ValueError(
                "Recurrent equilibrium layers compute in float32 or float64: rounding to 16 bits "
                f"would lose the supply rate. Received: dtype policy {self.dtype_policy.name!r}. "
                "Pass dtype='float32' to this layer."
            )
        self.state_size, self.output_size = self.states, self.units

    @property
    def supply(self):
        """The supply rate as it was given."""
        return self._supply

    @property
    def sector(self):
        """Sector of φ."""
        return Sector.of(self.activation)

    @property
    def current_supply(self):
        """The supply rate that the weights are made for: the trained one with `train_supply`."""
        if not self.train_supply:
            return self._supply
        logarithms = np.asarray(ops.convert_to_numpy(self.supply_logarithms), np.float64)
        factors = np.exp(np.clip(logarithms, self._lowest, MOST_LOGARITHM))
        if isinstance(self._supply, L2Gain):
            return L2Gain(self._supply.gamma * float(factors[0]))
        delta = self._supply.delta * float(factors[0])
        start, factor = self._supply.discriminant, float(factors[1])
        above = (start - 1) * factor if self._inputs > self.units else start * factor - 1
        return Indices(delta, -above / (4 * delta))

    def build(self, input_shape):
        if input_shape[-1] is None:
            raise ValueError(
                "A recurrent equilibrium layer needs an input with a last axis of known size. "
                f"Received: input_shape={input_shape}."
            )
        self._inputs = m = int(input_shape[-1])
        n, q, p = self.states, self.neurons, self.units
        self._forms = None
        if not isinstance(self._supply, Contracting):
            self._forms = feedthrough_form(self._supply, p, m)
            self._check_feedthrough()
            self._lowest = self._lowest_logarithms()

        def raw(name, shape, initializer="glorot"):
            if initializer == "glorot":
                initializer = keras.initializers.VarianceScaling(START, "fan_avg", "uniform")
            return self.add_weight(name=name, shape=shape, initializer=initializer, autocast=False)

        self.factor = raw("factor", (2 * n + q,) * 2, self._remembering)
        self.skew = raw("skew", (n, n), keras.initializers.RandomNormal(stddev=0.01))
        sources = [self.factor, self.skew]
        for name, shape in (
            ("input_to_state", (n, m)),
            ("input_to_neurons", (q, m)),
            ("state_to_output", (p, n)),
            ("neurons_to_output", (p, q)),
        ):
            sources.append(raw(name, shape))
            setattr(self, name, sources[-1])
        if self.feedthrough:
            shape = (p, m) if self._forms is None else (p + m, p)
            small = keras.initializers.RandomNormal(stddev=0.05)
            self.feedthrough_kernel = raw("feedthrough_kernel", shape, small)
            sources.append(self.feedthrough_kernel)
        if self.implicit:
            self.inner_skew = raw("inner_skew", (q, q), keras.initializers.RandomNormal(stddev=0.1))
            sources.append(self.inner_skew)
        if self.train_supply:
            size = 1 if isinstance(self._supply, L2Gain) else 2
            self.supply_logarithms = raw("supply_logarithms", (size,), "zeros")
            sources.append(self.supply_logarithms)
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias", shape=(q + n + p,), initializer="zeros", autocast=False
            )
        self._bounds = block_bounds(q, self.blocks)
        shapes = {
            "recurrent_kernel": (n, q + n),
            "input_kernel": (m, q + n),
            "neuron_kernel": (q, q + n),
            "output_kernel": (n + q, p),
            "feedthrough_kernel": (m, p),
            "implicit": (n, n),
            "metric": (n, n),
            "multipliers": (q,),
        }
        if self.implicit:
            shapes["resolvent"] = (q, q)
        self._track_effective(shapes, sources, self._weights)
        self.built = True

    def _check_feedthrough(self):
        """Without D₂₂ the supply rate must leave room at R itself."""
        if self.feedthrough:
            return
        room = float(np.linalg.norm(self._fixed_feedthrough(), 2))
        if room > MOST_FEEDTHROUGH or (self.train_supply and isinstance(self._supply, Indices)):
            raise ValueError(
                "This supply rate needs a trained D₂₂: without it nothing, or little, is left for "
                f"the rest of the system. Received: feedthrough=False, supply={self._supply!r}. "
                "Pass feedthrough=True."
            )

    def _fixed_feedthrough(self):
        """Z of D₂₂ = 0 in center + half·Z·root."""
        center, half, root = self._forms
        return -np.linalg.solve(half, center) @ np.linalg.inv(root)

    def _lowest_logarithms(self):
        """Least logarithms of the factors that `train_supply` trains."""
        if isinstance(self._supply, Indices) and self._inputs <= self.units:
            least = np.log(LEAST_ROOM / self._supply.discriminant)
            return np.array([-MOST_LOGARITHM, np.clip(least, -MOST_LOGARITHM, 0.0)])
        return np.array([-MOST_LOGARITHM])

    def _mixing(self):
        """Condition numbers of half and root: products with a diagonal mix nothing, and have 1."""
        return [
            1.0 if np.array_equal(v, np.diag(np.diag(v))) else float(np.linalg.cond(v))
            for v in self._forms[1:]
        ]

    def _shrink(self, logarithms, dtype):
        """Factor of half, below 1, that pays for the rounding of y.

        With ŷ = half⁻¹(y - center·u) and û = root·u, y rounded is ŷ + eû, ‖e‖ ≤ ε, and
        |ŷ + eû|² ≤ (1+ε)(|ŷ|² + ε|û|²): a gain of √((1-ε-ε²)/(1+ε)) ≥ 1 - 2ε for ε ≤ 0.1 suffices.
        ε is ‖half⁻¹·center·root⁻¹‖ units, for D₂₂ is a small difference to center where 4δν is
        near 1.
        """
        unit = ROUNDING * float(np.finfo(dtype).eps) / 2
        center, half, root = self._forms
        if logarithms is None or not isinstance(self._supply, Indices):
            loss = np.linalg.norm(np.linalg.solve(half, center) @ np.linalg.inv(root), 2)
            return 1 - 2 * min(unit * (float(loss) + float(np.prod(self._mixing()))), 0.1)
        loss = ops.sqrt(1 / self._rooms(logarithms, dtype)[0])  # of what is paired
        return 1 - 2 * unit * (loss + 1)

    def _remembering(self, shape, dtype=None):
        """X whose H has F = diag(ρ) beside the identity: x⁺ starts near ρx, and w beside it."""
        n, q = self.states, self.neurons
        square = keras.initializers.Orthogonal()(shape, dtype="float32")
        rho = ops.convert_to_tensor(np.linspace(self.memory / 2, self.memory, n), dtype="float32")
        before, within, after = square[:, :n], square[:, n : n + q], square[:, n + q :]
        after = before * rho + after * ops.sqrt(1 - rho**2)
        noise = keras.random.normal(shape, stddev=0.1 / np.sqrt(shape[0]), dtype="float32")
        return ops.cast(ops.concatenate([before, within, after], axis=1) + noise, dtype)

    def _coordinates(self, logarithms, dtype):
        """`(center, half, root)` as tensors."""
        center, half, _ = self._forms
        if logarithms is None:
            return [ops.convert_to_tensor(v, dtype=dtype) for v in self._forms]
        factors = self._factors(logarithms, dtype)
        if isinstance(self._supply, L2Gain):
            scale = ops.sqrt(factors[0])
            return [ops.convert_to_tensor(center, dtype=dtype)] + [
                ops.convert_to_tensor(v, dtype=dtype) * scale for v in self._forms[1:]
            ]
        # center = S'/2δ, half = I/√2δ, root² = (1 - 4δν)I/2δ, less I/2δ where S pairs nothing.
        scale = 1 / factors[0]
        rooms = self._rooms(logarithms, dtype)
        return [
            ops.convert_to_tensor(center, dtype=dtype) * scale,
            ops.convert_to_tensor(half, dtype=dtype) * ops.sqrt(scale),
            ops.diag(ops.sqrt(rooms * scale / (2 * self._supply.delta))),
        ]

    def _factors(self, logarithms, dtype):
        lowest = ops.convert_to_tensor(self._lowest, dtype=dtype)
        return ops.exp(ops.clip(logarithms, lowest, MOST_LOGARITHM))

    def _rooms(self, logarithms, dtype):
        """1 - 4δν of every input, or -4δν of those that S pairs with no output."""
        start, factor = self._supply.discriminant, self._factors(logarithms, dtype)[1]
        if self._inputs <= self.units:
            return start * factor * ops.ones((self._inputs,), dtype=dtype)
        # 1 - 4δν stays above 1, and ν negative.
        paired = (np.arange(self._inputs) < self.units).astype(np.float64)
        return (start - 1) * factor + ops.convert_to_tensor(paired, dtype=dtype)

    def _weights(self, factor, skew, b2, d12, c2, d21, *rest, training):
        """Effective weights: those of the unit gain, in the coordinates of the supply rate."""
        kind = self.work_dtype
        wide = precision.work_dtype(factor)
        factor, skew, b2, d12, c2, d21, *rest = (
            ops.cast(v, wide) for v in (factor, skew, b2, d12, c2, d21, *rest)
        )
        raw = rest.pop(0) if self.feedthrough else None
        inner = rest.pop(0) if self.implicit else None
        logarithms = rest.pop(0) if self.train_supply else None
        m = self._inputs
        with precision.full_precision():
            caution = 1.0
            if self._forms is None:
                rate = self._supply.rate
                z = ops.zeros((self.units, m), dtype=wide)
            else:
                rate = None
                center, half, root = self._coordinates(logarithms, wide)
                half = half * self._shrink(logarithms, wide)
                caution = max(1.0, self._mixing()[1] / 16)
                if raw is None and logarithms is None:
                    z = ops.convert_to_tensor(self._fixed_feedthrough(), dtype=wide)
                elif raw is None:  # a trained gain
                    z = ops.zeros((self.units, m), dtype=wide)
                else:
                    z = MOST_FEEDTHROUGH * ops.transpose(cayley(raw)[self.units :])
            signals = b2, d12, c2, d21
            found = equilibrium_weights(
                factor, skew, signals, z, self._bounds, rate, caution, inner
            )
            a, b1, b2, c1, d11, d12, c2, e, p, multipliers, *resolvent = found
            if self._forms is None:
                d22 = z if raw is None else raw
            else:
                b2, d12 = ops.matmul(b2, root), ops.matmul(d12, root)
                c2, d21 = ops.matmul(half, c2), ops.matmul(half, d21)
                # Zero to the last bit where it is not trained.
                d22 = ops.zeros_like(z)
                if raw is not None:
                    d22 = center + ops.matmul(half, ops.matmul(z, root))
        values = (
            ops.transpose(ops.concatenate([c1, a], axis=0)),
            ops.transpose(ops.concatenate([d12, b2], axis=0)),
            ops.transpose(ops.concatenate([d11, b1], axis=0)),
            ops.transpose(ops.concatenate([c2, d21], axis=1)),
            ops.transpose(d22),
            e,
            p,
            multipliers,
            *map(ops.transpose, resolvent),
        )
        return tuple(ops.cast(v, kind) for v in values)

    def prepared(self, training=None):
        """`Step` with the weights of now, for all steps of a sequence."""
        return Step(self, self.effective(training))

    def call(self, inputs, states, training=None):
        state = states[0] if isinstance(states, (list, tuple)) else states
        step = self.prepared(training)
        signals, state = step(step.driven(inputs), state)
        return step.outputs(signals, inputs), [state]

    def get_initial_state(self, batch_size=None):
        return [ops.zeros((batch_size, self.states), dtype=self.compute_dtype)]

    def compute_output_shape(self, input_shape, state_shape=None):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "states": self.states,
            "supply": supply_config(self._supply),
            "activation": keras.activations.serialize(self.activation),
            "neurons": self.neurons,
            "blocks": self.blocks,
            "feedthrough": self.feedthrough,
            "train_supply": self.train_supply,
            "implicit": self.implicit,
            "iterations": self.iterations,
            "memory": self.memory,
            "use_bias": self.use_bias,
        }


class Step:
    """One step with given effective weights.

    Args:
        cell: `RecurrentEquilibriumCell`.
        weights: of `effective`.
    """

    def __init__(self, cell, weights):
        self._recurrent, self._input, neuron, self._output, self._feedthrough = weights[:5]
        self._cell = cell
        q, n = cell.neurons, cell.states
        bias = None if cell.bias is None else ops.cast(cell.bias, cell.compute_dtype)
        self._bias = None if bias is None else bias[: q + n]
        self._output_bias = None if bias is None else bias[q + n :]
        ends = zip(cell._bounds, cell._bounds[1:], strict=False)
        # What a block adds to the blocks after it, and to the state.
        self._parts = [(end - start, neuron[start:end, end:]) for start, end in ends]
        self._resolvent = weights[-1] if cell.implicit else None

    def driven(self, inputs):
        """What the inputs (…, inputs) add to v and x⁺, (…, neurons + states)."""
        found = ops.matmul(inputs, self._input)
        return found if self._bias is None else found + self._bias

    def __call__(self, driven, state):
        """`(signals, x⁺)`: signals are x and w side by side."""
        rest = driven + ops.matmul(state, self._recurrent)
        signals = [state]
        if self._resolvent is not None:
            q = self._cell.neurons
            w = self.solved(rest[:, :q])
            return ops.concatenate([state, w], axis=-1), rest[:, q:] + ops.matmul(
                w, self._parts[0][1]
            )
        for size, part in self._parts:
            # Split, not two slices: its gradient is one concatenation.
            known, rest = ops.split(rest, [size], axis=-1)
            w = self._cell.activation(known)
            rest = rest + ops.matmul(w, part)
            signals.append(w)
        return ops.concatenate(signals, axis=-1), rest

    def solved(self, known):
        """w ≈ φ(D₁₁w + known), by the splitting of Peaceman and Rachford.

            w = φ(z),   u = 2w - z,   z⁺ = 2(2I - D₁₁)⁻¹(u + known) - u

        z ↦ 2φ(z) - z is nonexpansive and the other map contracts, both in the metric Λ, so that z
        converges geometrically from anywhere; gradients go through the iterations. What is left,
        r = z - D₁₁w - known, is as an input to the neurons: w = φ(D₁₁w + known + r) exactly.
        """
        z = known
        for _ in range(self._cell.iterations):
            u = 2 * self._cell.activation(z) - z
            z = 2 * ops.matmul(u + known, self._resolvent) - u
        return self._cell.activation(z)

    def outputs(self, signals, inputs):
        """y of signals and inputs, of one step or of all."""
        found = ops.matmul(signals, self._output)
        if self._cell.feedthrough:
            found = found + ops.matmul(inputs, self._feedthrough)
        return found if self._output_bias is None else found + self._output_bias
