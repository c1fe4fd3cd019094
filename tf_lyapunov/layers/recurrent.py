"""Recurrent equilibrium networks as a Keras layer: weights once, all inputs in one product."""

import keras
from keras import ops
from keras.src import backend

from tf_lyapunov.layers.recurrent_cell import RecurrentEquilibriumCell


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class RecurrentEquilibrium(keras.layers.RNN):
    """Recurrent layer that satisfies a supply rate at every value of its weights.

        x⁺ = A x + B₁ w + B₂ u + b_x,   v = C₁ x + D₁₁ w + D₁₂ u + b_v,   w = φ(v),
        y = C₂ x + D₂₁ w + D₂₂ u + b_y

    For every two input sequences and initial states there is a storage V ≥ 0 with

        L2Gain(γ):       Σ‖Δy‖² ≤ γ²Σ‖Δu‖² + γV(Δx₀),
        Indices(δ, ν):   2Σ(ΔuᵀΔy - δ‖Δy‖² - ν‖Δu‖²) + V(Δx₀) ≥ 0,
        Contracting(a):  V(Δx_t) ≤ a^2t·V(Δx₀) for equal inputs,

    in exact arithmetic on exact weights (`layers.equilibrium` has the proof); `certify_dynamics`
    says what holds for the float32 weights. From equal initial states, such as the zeros that Keras
    starts with, V(Δx₀) = 0. The gain holds for `return_sequences=False` too: the last output is
    part of the sequence.

    Args:
        units, states, supply, activation: of `RecurrentEquilibriumCell`, as are `neurons`,
            `blocks`, `feedthrough`, `train_supply`, `implicit`, `iterations`, `memory` and
            `use_bias`.
        return_sequences, return_state, go_backwards, stateful, unroll: as in `keras.layers.LSTM`.
        **kwargs: the rest of the cell's arguments, and those of `keras.layers.Layer`.

    Raises:
        ValueError: as the cell does; and for masks: a step that is skipped repeats an output, which
            no supply rate has paid for.

    Example:

    >>> import numpy as np
    >>> from tf_lyapunov.dynamics import L2Gain
    >>> layer = RecurrentEquilibrium(3, states=8, supply=L2Gain(2.0), return_sequences=True)
    >>> tuple(layer(np.ones((2, 5, 6), "float32")).shape)
    (2, 5, 3)

    Reference: Revay, Wang and Manchester (2024), Recurrent Equilibrium Networks.
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
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        stateful=False,
        unroll=False,
        **kwargs,
    ):
        cell = RecurrentEquilibriumCell(
            units,
            states,
            supply,
            activation,
            neurons=neurons,
            blocks=blocks,
            feedthrough=feedthrough,
            train_supply=train_supply,
            implicit=implicit,
            iterations=iterations,
            memory=memory,
            use_bias=use_bias,
            dtype=kwargs.get("dtype"),
            name="cell",
        )
        super().__init__(
            cell,
            return_sequences=return_sequences,
            return_state=return_state,
            go_backwards=go_backwards,
            stateful=stateful,
            unroll=unroll,
            **kwargs,
        )

    @property
    def current_supply(self):
        """The supply rate that the weights are made for: the trained one with `train_supply`."""
        return self.cell.current_supply

    def call(self, sequences, initial_state=None, mask=None, training=False):
        _refuse_mask(self, mask)
        self._check_state(initial_state)
        return super().call(sequences, initial_state=initial_state, training=training)

    def _check_state(self, state):
        given = [] if state is None else keras.tree.flatten(state)
        if given and (len(given) != 1 or tuple(given[0].shape)[1:] != (self.cell.states,)):
            raise ValueError(
                f"An initial state of layer {self.name!r} must be one tensor (batch, "
                f"{self.cell.states}). Received: shapes {[tuple(v.shape) for v in given]}."
            )

    def compute_mask(self, inputs, mask):
        _refuse_mask(self, mask)

    def inner_loop(self, sequences, initial_state, mask, training=False):
        _refuse_mask(self, mask)
        step = self.cell.prepared(training)
        inputs = ops.cast(sequences, self.cell.compute_dtype)

        def advance(driven, states):
            signals, state = step(driven, states[0])
            return signals, [state]

        last, signals, states = backend.rnn(
            advance,
            step.driven(inputs),
            list(initial_state),
            go_backwards=self.go_backwards,
            unroll=self.unroll,
            input_length=sequences.shape[1],
            return_all_outputs=self.return_sequences,
        )
        final = inputs[:, 0] if self.go_backwards else inputs[:, -1]
        if not self.return_sequences:
            outputs = step.outputs(last, final)
            return outputs, ops.expand_dims(outputs, 1), states
        seen = ops.flip(inputs, axis=1) if self.go_backwards else inputs
        outputs = step.outputs(signals, seen)
        return outputs[:, -1], outputs, states

    def get_config(self):
        config = super().get_config()
        for name in ("cell", "zero_output_for_mask"):
            config.pop(name, None)
        own = self.cell.get_config()
        names = ("units", "states", "supply", "activation", "neurons", "blocks", "feedthrough")
        names += ("train_supply", "implicit", "iterations", "memory", "use_bias")
        return {**config, **{name: own[name] for name in names}}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def _refuse_mask(layer, mask):
    if mask is not None and any(m is not None for m in keras.tree.flatten(mask)):
        raise ValueError(
            "A recurrent equilibrium layer takes no masks: Keras repeats the output of a step that "
            "is skipped, and no supply rate covers the repeated one. Received: a mask for layer "
            f"{layer.name!r}. Leave out `Masking` and `mask_zero=True`, and cut or pad sequences "
            "before the model."
        )
