"""Training on the manifold of matrices with orthonormal columns, by any optimizer of Keras."""

import warnings

import keras
import numpy as np
from keras import ops

from tf_lyapunov.optimizers.marks import check_unconstrained, is_marked
from tf_lyapunov.spectral.conditions import cond
from tf_lyapunov.spectral.retraction import polar_factor, tangent
from tf_lyapunov.theory.orthogonal import gram_residual_upper_bound


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class Stiefel(keras.optimizers.Optimizer):
    """Wrapper that keeps marked kernels orthogonal; all other variables are the inner optimizer's.

        X ← inner step from W,   W ← X·(XᵀX)^(-1/2)                                           (1)

    for every marked W (`mark_orthogonal`; `layers.OrthogonalDense` marks its own), rows instead
    of columns where it is wide. The polar factor is the nearest orthogonal matrix, and to first
    order it takes away what of the inner step leaves the tangent space,

        W + Z ↦ W + (Z - W·sym(WᵀZ)) + O(‖Z‖²),                                               (2)

    so that (1) is a step of the optimizer on the manifold, moments and all, for 4mn² flops beside
    it (and up to 4n³; see `spectral.retraction.polar_factor`). With `project_gradients` the
    gradient is made tangent before the inner optimizer sees it (4mn² more): moments, and the
    norms that clipping compares, are then free of the part that (2) takes away.

    Nothing else is stored, so that saving, loading and resuming are the inner optimizer's.
    Clipping, accumulation, schedules and a loss scale are set on the inner optimizer and act there
    alone; in steps that only accumulate W keeps every bit. Weight decay leaves marked kernels out.
    With `use_ema` the averages that replace weights, in between and after `fit`, are projected
    back. `LossScaleOptimizer` goes outside, where `compile` puts it.

    How far a kernel is from orthogonal is measured wherever a gain is computed; this optimizer
    makes it small (‖WᵀW - I‖ about 10⁻⁶ in float32), and no certificate trusts it for that.

    Args:
        inner: a Keras optimizer, its name or its configuration.
        project_gradients: whether gradients of marked kernels are made tangent first.
        name: of the optimizer.

    Raises:
        ValueError: if `inner` is a `LossScaleOptimizer` or a `Stiefel`; when it is built, if a
            variable is both marked and under a constraint.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.layers import OrthogonalDense
    >>> model = keras.Sequential([keras.Input((6,)), OrthogonalDense(4), keras.layers.Dense(1)])
    >>> model.compile(Stiefel(keras.optimizers.Adam(0.01)), "mse")
    >>> x = np.random.default_rng(0).standard_normal((32, 6)).astype("float32")
    >>> history = model.fit(x, x[:, :1], epochs=2, verbose=0)
    >>> model.layers[0].departure_upper_bound() < 1e-5
    True

    Reference: Absil and Malick, "Projection-like retractions on matrix manifolds" (2012), for (2).
    """

    def __init__(self, inner, project_gradients=False, name=None):
        inner = keras.optimizers.get(inner)
        if isinstance(inner, (Stiefel, keras.optimizers.LossScaleOptimizer)):
            raise ValueError(
                "`inner` must be the optimizer that takes the steps. Received: "
                f"inner={type(inner).__name__}. Write `LossScaleOptimizer(Stiefel(Adam()))`: the "
                "loss scale goes outside, one `Stiefel` is enough."
            )
        super().__init__(learning_rate=0.0, name=name)
        self.inner = inner
        self.project_gradients = bool(project_gradients)
        # Keras asks an optimizer for these; they are the inner one's.
        self._iterations = inner._iterations
        self._distribution_strategy = getattr(inner, "_distribution_strategy", None)

    def build(self, variables):
        if self.built:
            return
        marked = [v for v in variables if is_marked(v)]
        for variable in marked:
            check_unconstrained(variable)
        if not marked:
            warnings.warn(
                "Stiefel keeps marked kernels orthogonal, and none of the model's is marked: it "
                "trains as its inner optimizer does. Use layers such as `OrthogonalDense`, or "
                "`mark_orthogonal(kernel)` in a layer's `build`.",
                stacklevel=2,
            )
        self._leave_out_of_decay(variables, marked)
        self.inner.build(variables)
        super().build(variables)

    def _leave_out_of_decay(self, variables, marked):
        # PyTorch decays a list that must not be empty; (1) takes a decay of all away as well.
        if len(marked) in (0, len(variables)) or not self.inner.weight_decay:
            return
        excluded = set(getattr(self.inner, "_exclude_from_weight_decay", ()))
        self.inner._exclude_from_weight_decay = excluded | {self.inner._var_key(v) for v in marked}
        self.inner._exclude_from_weight_decay_cache = {}

    @property
    def variables(self):
        return self.inner.variables

    def apply(self, grads, trainable_variables=None):
        grads = list(grads)
        if trainable_variables is None:
            variables = self._trainable_variables
        else:
            variables = list(trainable_variables)
            if not self.built and grads:
                with keras.name_scope(self.name):
                    self.build(variables)
        moved = [
            (i, v)
            for i, (v, g) in enumerate(zip(variables, grads, strict=False))
            if g is not None and is_marked(v)
        ]
        for i, variable in moved:
            check_unconstrained(variable)
            if self.project_gradients:
                grads[i] = tangent(_value(variable), grads[i])
        self.inner.apply(grads, trainable_variables)
        for _, variable in moved:
            variable.assign(self._retracted(_value(variable)))

    def _retracted(self, value):
        steps = self.inner.gradient_accumulation_steps
        if not steps:
            return polar_factor(value)
        moves = ops.equal(self.inner._iterations % steps, 0)
        return cond(moves, lambda: polar_factor(value), lambda: value)

    def finalize_variable_values(self, var_list):
        self.inner.finalize_variable_values(var_list)
        if self.inner.use_ema:
            for variable in var_list:
                if is_marked(variable):
                    variable.assign(_nearest(variable))

    @property
    def _model_variables_moving_average(self):
        # `SwapEMAWeights` asks for it, to put averages in the weights' place as they are.
        if not self.inner.use_ema:
            raise AttributeError("_model_variables_moving_average")
        raise ValueError(
            "Averages of orthogonal kernels must be projected back before they are used, and "
            "`SwapEMAWeights` does not. Received: a callback that reads the averages of Stiefel. "
            "Leave it out: with `use_ema` the projected averages stand in the model after `fit`, "
            "and with `ema_overwrite_frequency` in between."
        )

    @property
    def learning_rate(self):
        return self.inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner.learning_rate = learning_rate

    @property
    def iterations(self):
        return self.inner.iterations

    @property
    def loss_scale_factor(self):
        """The inner optimizer's: `LossScaleOptimizer` sets it to None."""
        return self.inner.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value):
        if "inner" in self.__dict__:  # Keras sets it before there is one
            self.inner.loss_scale_factor = value

    def scale_loss(self, loss):
        return self.inner.scale_loss(loss)

    def set_weights(self, weights):
        self.inner.set_weights(weights)

    def save_own_variables(self, store):
        """Nothing: the inner optimizer, a part of this one, saves all there is."""

    def load_own_variables(self, store):
        pass

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner.exclude_from_weight_decay(var_list, var_names)

    def get_config(self):
        return {
            "inner": keras.saving.serialize_keras_object(self.inner),
            "project_gradients": self.project_gradients,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        inner = keras.saving.deserialize_keras_object(
            config["inner"], custom_objects=custom_objects
        )
        return cls(inner, **{k: v for k, v in config.items() if k != "inner"})


def restore_orthogonal(model):
    """Puts every marked kernel of a model back onto the manifold: its polar factor, in float64.

    For weights that no step of `Stiefel` has made: averages over checkpoints or over runs.

    Args:
        model: a built model or layer.

    Returns:
        The same model.

    Example:

    >>> import keras
    >>> from tf_lyapunov.layers import OrthogonalDense
    >>> model = keras.Sequential([keras.Input((3,)), OrthogonalDense(2)])
    >>> _ = model.layers[0].kernel.assign(0.5 * model.layers[0].kernel)
    >>> check_orthogonal(restore_orthogonal(model)) < 1e-5
    True
    """
    for variable in _marked(model):
        variable.assign(_nearest(variable))
    return model


def check_orthogonal(model, tol=1e-3):
    """Raises if a marked kernel is not orthogonal, such as an average that nobody projected back.

    Certificates measure kernels as they are and need no such check; what is built on orthogonal
    kernels, such as gradients that keep their norms, may.

    Args:
        model: a built model or layer.
        tol: largest ‖G - I‖_F that passes.

    Returns:
        The largest ‖G - I‖_F of the stored kernels, rounded up; 0 without marked ones.

    Raises:
        ValueError: that names the kernels above `tol`.

    Example:

    >>> import keras
    >>> from tf_lyapunov.layers import OrthogonalDense
    >>> model = keras.Sequential([keras.Input((6,)), OrthogonalDense(4)])
    >>> check_orthogonal(model) < 1e-5
    True
    """
    found = {v.path: gram_residual_upper_bound(_array(v)) for v in _marked(model)}
    far = {path: departure for path, departure in found.items() if not departure <= tol}
    if far:
        listed = ", ".join(f"{path} (‖G - I‖ ≤ {value:.3g})" for path, value in far.items())
        raise ValueError(
            f"Marked kernels must be orthogonal, to {tol:g}. Received: {listed}. Averages of "
            "orthogonal kernels are not: call `optimizers.restore_orthogonal(model)`."
        )
    return max(found.values(), default=0.0)


def _marked(model):
    return [v for v in model.trainable_variables + model.non_trainable_variables if is_marked(v)]


def _array(variable):
    value = _value(variable)
    if variable.dtype != "float64":
        value = ops.cast(value, "float32")
    return np.asarray(ops.convert_to_numpy(value), np.float64)


def _value(variable):
    return ops.stop_gradient(ops.convert_to_tensor(variable))


def _nearest(variable):
    """The polar factor of a variable by its singular vectors, in float64."""
    value = _array(variable)
    if not np.all(np.isfinite(value)):
        return value
    left, _, right = np.linalg.svd(value, full_matrices=False)
    return left @ right
