"""What the training methods share: a model around the user's own, which is what is saved and used.

Training passes dicts of inputs, `{"clean": x}` or with `"adversarial"`; everything else passes
plain tensors, for which the wrapper is the wrapped model.
"""

from __future__ import annotations

import keras
from keras import ops


class TrainingModel(keras.Model):
    """Base class: trains `model` by another objective, and otherwise is `model`.

    Args:
        model: built Keras classifier with one input and one output, or another training method
            around one.
        layers: names of the layers whose outputs `objective` needs.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: if it is not built, or has several inputs or outputs.
    """

    #: Whether other training methods may be put around this one.
    can_be_wrapped = True

    def __init__(self, model, layers=(), **kwargs):
        if not isinstance(model, keras.Model):
            raise TypeError(f"`model` must be a Keras model. Received: {type(model).__name__}.")
        if not model.built:
            raise ValueError(
                f"`model` must be built. Received: model {model.name!r} without weights. Give it "
                "an `Input`, or call it once."
            )
        for side in ("inputs", "outputs"):
            found = getattr(model, side, None)
            if found is not None and len(found) != 1:
                raise ValueError(
                    "`model` must have one input and one output. "
                    f"Received: model {model.name!r} with {len(found)} {side}."
                )
        inner = isinstance(model, TrainingModel)
        if inner and not model.can_be_wrapped:
            raise ValueError(
                f"A {type(model).__name__} must be the outermost training method. Received: one "
                f"inside a {type(self).__name__}. Swap them."
            )
        # The wrapped model casts by its own policy.
        super().__init__(autocast=False, **kwargs)
        self.model = model
        self.layer_names = list(layers)
        taps = list(dict.fromkeys([*self.layer_names, *(model.taps if inner else ())]))
        self.taps = taps
        if taps:
            graph = _with_outputs(self.plain, taps)
            # Inside a function Keras does not track the same layers a second time.
            self._graph = lambda x, training: graph(x, training=training)
        self.built = True

    @property
    def plain(self):
        """The user's own model, inside all training methods."""
        return self.model.plain if isinstance(self.model, TrainingModel) else self.model

    # What subclasses define.

    def training_inputs(self, x, y):
        """Dict of the inputs on which one training step runs."""
        return {"clean": x}

    def features(self, x, training):
        """One forward pass: {"outputs": tensor, "layers": {name: tensor}}."""
        if not self.taps:
            return {"outputs": self.plain(x, training=training), "layers": {}}
        outputs, *hidden = self._graph(x, training)
        return {"outputs": outputs, "layers": dict(zip(self.taps, hidden, strict=True))}

    def objective(self, owner, x, y, found, sample_weight):
        """Loss of one forward pass in training.

        Args:
            owner: the compiled model, which holds the compiled loss and the layers' own losses.
            x: the inputs.
            y: the labels.
            found: what `features` returned.
            sample_weight: as in `fit`.
        """
        if isinstance(self.model, TrainingModel):
            return self.model.objective(owner, x, y, found, sample_weight)
        return keras.Model.compute_loss(owner, x, y, found["outputs"], sample_weight, training=True)

    def evaluated(self, owner, x, y, outputs, sample_weight):
        """Loss of `evaluate`: without what is part of training alone."""
        if isinstance(self.model, TrainingModel):
            return self.model.evaluated(owner, x, y, outputs, sample_weight)
        return keras.Model.compute_loss(owner, x, y, outputs, sample_weight, training=False)

    # Keras' hooks.

    def call(self, inputs, training=None):
        if isinstance(inputs, dict):
            return {name: self.features(x, training) for name, x in inputs.items()}
        return self.model(inputs, training=training)

    def build(self, input_shape):
        self.built = True  # the model inside is

    def get_build_config(self):
        # By this the library's callbacks and certificates know the inputs of a subclassed model.
        shape = getattr(self.plain, "input_shape", None)
        return {"input_shape": shape} if isinstance(shape, tuple) else None

    def compute_output_shape(self, input_shape):
        return self.model.compute_output_shape(input_shape)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not isinstance(y_pred, dict):
            return self.evaluated(self, x, y, y_pred, sample_weight)
        return self.combined(
            {
                name: self.objective(self, x[name], y, found, sample_weight)
                for name, found in y_pred.items()
            },
            y_pred,
            sample_weight,
        )

    def combined(self, losses, found, sample_weight):
        """Total loss from the losses by input; only `AdversarialModel` has two."""
        return losses["clean"]

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        if isinstance(y_pred, dict):
            name = "adversarial" if "adversarial" in y_pred else "clean"
            x, y_pred = x[name], y_pred[name]["outputs"]
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def train_step(self, *arguments):
        """One step; the arguments are `(data,)`, on JAX `(state, data)`."""
        *state, data = arguments
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if isinstance(x, (dict, list, tuple)):
            raise ValueError(
                "Training methods need models with one input, given as one array. "
                f"Received: x of type {type(x).__name__}."
            )
        if y is None:
            raise ValueError("Training methods need labels. Received: y=None.")
        x = ops.convert_to_tensor(x)
        if not state:
            return super().train_step((self.training_inputs(x, y), y, sample_weight))
        # JAX: variables are read from the state, and what was drawn at random goes back into it.
        trainable, fixed, *others = state[0]
        variables = [*self.trainable_variables, *self.non_trainable_variables]
        mapping = list(zip(variables, [*trainable, *fixed], strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            inputs = self.training_inputs(x, y)
        fixed = [scope.get_current_value(v) for v in self.non_trainable_variables]
        return super().train_step((trainable, fixed, *others), (inputs, y, sample_weight))

    def get_config(self):
        return {"name": self.name, "model": keras.saving.serialize_keras_object(self.model)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        model = keras.saving.deserialize_keras_object(config.pop("model"), custom_objects)
        return cls(model, **config)


def _with_outputs(model, names):
    """Model that returns the outputs of a model with a graph, and of some of its layers."""
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"`layers` must be a sequence of layer names. Received: layers={names!r}.")
    owner = next(base for base in type(model).__mro__ if "call" in vars(base))
    if owner.__name__ not in ("Functional", "Sequential"):
        raise ValueError(
            "Layers can be named in functional and sequential models only, where each has an "
            f"output. Received: {type(model).__name__} {model.name!r}."
        )
    known = {layer.name: layer for layer in model.layers}
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"`layers` must name layers of the model. Received: {missing}. "
            f"Model {model.name!r} has {list(known)}."
        )
    try:
        outputs = [known[name].output for name in names]
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"Named layers must be called exactly once. Received: layers={names}; {error}"
        ) from None
    return keras.Model(model.inputs[0], [model.outputs[0], *outputs], name="observed")
