"""What all Lipschitz layers share: weights that are computed from other weights, and their cache.

The optimizer moves raw variables freely; the layer applies *effective* weights, a function of them
that satisfies its bound whatever they are. Nothing can leave the bound: not a large learning rate,
`set_weights`, loading, averaging of weights or a frozen layer. For inference the effective weights
are kept beside a copy of the raw ones they came from; a call compares and recomputes if these
differ, so that a stale cache is never used and a fresh one costs a comparison.

The cache is state of the layer (`variables`) and none of its `weights`: `get_weights`,
`set_weights` and files leave it out. Averaging or scaling all variables of models would keep copies
equal to raw variables, and not the cache; so would rounding or pruning them. A mark that none of
these preserves tells.
"""

import functools
import hashlib
import importlib

import keras
import numpy as np
from keras import ops

from tf_lyapunov.interruption import uninterrupted
from tf_lyapunov.layers.initial import WideInitializers
from tf_lyapunov.spectral.arguments import GAIN_RANGE, positive
from tf_lyapunov.spectral.conditions import cond
from tf_lyapunov.spectral.precision import unit_roundoff
from tf_lyapunov.theory.operators import LinearMap

# Digits of a mark: two caches share one by chance once in 2^(11·4).
MARKS = 4
MARK_SCALE = 2.0**-60


class EffectiveLayer(WideInitializers, keras.layers.Layer):
    """A layer that applies weights which are a function of its raw variables, and keeps them.

    A subclass creates its raw variables in `build` (`add_weight(..., autocast=False)`), then calls
    `_track_effective` once, and reads `self.effective(training)` in `call`.

    Args:
        **kwargs: of `keras.layers.Layer`.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._condensed = False
        self._copies, self._cache, self._marks = [], [], []

    @property
    def work_dtype(self):
        """Type that effective weights are computed in, before the cast to the compute dtype."""
        return "float64" if self.variable_dtype == "float64" else "float32"

    def _track_effective(self, shapes, sources, fn):
        """Declare the effective weights; to be called once, at the end of `build`.

        Args:
            shapes: dict of the names of the effective weights and their shapes.
            sources: list of the raw variables.
            fn: `fn(*sources, training)`, from tensors of `work_dtype` to a tuple of tensors in the
                order of `shapes`. Pure: what it returns depends on its arguments and on constants.
        """
        self._sources = list(sources)
        self._effective_names = tuple(shapes)
        self._effective_fn = fn

        def state(name, shape, dtype):
            return self.add_weight(
                name=name,
                shape=shape,
                dtype=dtype,
                initializer="zeros",
                trainable=False,
                autocast=False,
            )

        self._copies = [state(f"{v.name}_copy", v.shape, v.dtype) for v in self._sources]
        self._cache = [state(f"effective_{n}", s, self.work_dtype) for n, s in shapes.items()]
        # Zero until the first `refresh`, which is no mark.
        self._marks = [state(name, (MARKS,), "float32") for name in ("mark", "mark_square")]

    def effective(self, training=None):
        """The effective weights as tensors of the compute dtype, in the order of `shapes`.

        With `training` they are computed from the raw variables. Otherwise the cache is used if it
        belongs to them, bit for bit. Nothing is mutated, and the gradient with respect to the raw
        variables is that of the computation in both cases.
        """
        sources = [ops.convert_to_tensor(v) for v in self._sources]
        if training:
            values = self._compute(sources, training=True)
        else:
            cache = [ops.convert_to_tensor(v) for v in self._cache]
            values = _recalled(self._compute, sources, self._is_fresh(sources), cache)
        return tuple(ops.cast(v, self.compute_dtype) for v in values)

    def _in_factors(self, training):
        """Whether a call may apply the factors of its weights one after the other.

        Their product costs in·units·n flops, each of them batch·units·n: training saves what
        inference, which has the product in its cache, need not pay. 16-bit types would round the
        factors, whose entries no bound keeps near 1.
        """
        return bool(training) and not self._condensed and self.compute_dtype == self.work_dtype

    def effective_values(self):
        """The effective weights as inference uses them: dict of names and float64 arrays.

        Refreshes the cache first, so that later calls use these values to the last bit.
        """
        if not bool(ops.convert_to_numpy(self._is_fresh(self._sources))):
            self.refresh()
        return {
            name: _as_numpy(value, self.work_dtype).astype(np.float64)
            for name, value in zip(self._effective_names, self.effective(), strict=True)
        }

    def refresh(self):
        """Compute the effective weights now and keep them for inference (outside of compiled code).

        Raises:
            ValueError: if the layer is not built.
        """
        if not self.built:
            raise ValueError(
                f"A layer must be built before it is refreshed. Received: unbuilt layer "
                f"{self.name!r}. Call the model on data first."
            )
        sources = [_as_numpy(v, self.work_dtype) for v in self._sources]
        finite = all(np.all(np.isfinite(s)) for s in sources)
        values = [_as_numpy(v, self.work_dtype) for v in self._cache]
        if finite:
            tensors = [ops.stop_gradient(ops.convert_to_tensor(v)) for v in self._sources]
            # Arrays of their own: a variable must not share its memory with another one.
            values = [_as_numpy(v, self.work_dtype) for v in self._compute(tensors, training=False)]
        content = b"".join(np.ascontiguousarray(v).tobytes() for v in (*sources, *values))
        mark = _digits(content) * MARK_SCALE * finite
        square = _mark_square(mark, self._settings()) * finite
        with uninterrupted():
            if finite:
                for variable, value in zip(self._cache, values, strict=True):
                    variable.assign(value)
                for variable, value in zip(self._copies, sources, strict=True):
                    variable.assign(value)
            self._marks[0].assign(mark)
            self._marks[1].assign(square)

    def note_cache(self, undo):
        """Has an `interruption.Undo` put the cache back where it fails."""
        for variable in (*self._cache, *self._copies, *self._marks):
            undo.keep(variable)

    def _compute(self, sources, training=False):
        """Effective weights in `work_dtype`, with values that the compute dtype holds."""
        sources = [ops.cast(s, self.work_dtype) for s in sources]
        values = self._effective_fn(*sources, training=training)
        return [representable(v, self.compute_dtype) for v in values]

    def _settings(self):
        """Digits of all that the effective weights depend on besides the raw variables."""
        public = {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_")
            and name not in ("name", "built", "autocast", "supports_masking")
            and isinstance(value, (bool, int, float, str, tuple, list, LinearMap))
        }
        facts = sorted((name, repr(value)) for name, value in public.items())
        return _digits(repr((self.compute_dtype, self.work_dtype, facts)).encode())

    def _is_fresh(self, sources):
        mark, square = (ops.convert_to_tensor(v) for v in self._marks)
        fresh = ops.all(ops.equal(square, _mark_square(mark, self._settings())))
        for source, copy in zip(sources, self._copies, strict=True):
            # NaN differs from itself.
            fresh = ops.logical_and(fresh, ops.all(ops.equal(source, copy)))
        return fresh

    def _own_variables(self):
        """Variables that are saved: all but the copies and the cache, which follow from them."""
        return self._without_cache(self._trainable_variables + self._non_trainable_variables)

    @property
    def weights(self):
        """Variables without the cache, which follows from them."""
        return self._without_cache(super().weights)

    def _without_cache(self, variables):
        cache = {id(v) for v in (*self._copies, *self._cache, *self._marks)}
        return [v for v in variables if id(v) not in cache]

    def save_own_variables(self, store):
        for i, variable in enumerate(self._own_variables()):
            store[str(i)] = variable

    def load_own_variables(self, store):
        variables = self._own_variables() if self.built else []
        if len(store.keys()) != len(variables):
            raise ValueError(
                f"Layer {self.name!r} must be given {len(variables)} variables. "
                f"Received: {len(store.keys())}. Build the model as it was saved, then load."
            )
        for i, variable in enumerate(variables):
            variable.assign(store[str(i)])
        self.refresh()

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # TensorFlow's recomputation takes no keywords in graphs, such as `training`.
        call = super().rematerialized_call(functools.partial(layer_call, **kwargs), *args)
        return lambda *args, **_: call(*args)


class LipschitzLayer(EffectiveLayer):
    """A layer f with ‖f(u) - f(v)‖ ≤ max_gain·‖u - v‖ at every value of its variables.

    A subclass creates its raw variables in `build` (`add_weight(..., autocast=False)`), then calls
    `_track_effective` once, and reads `self.effective(training)` in `call`.

    Args:
        max_gain: positive float, the bound on the l2 gain.
        **kwargs: of `keras.layers.Layer`.

    Raises:
        ValueError: if `max_gain` is not positive.

    Example:

    >>> import keras, numpy as np
    >>> class Clipped(LipschitzLayer):
    ...     def build(self, input_shape):
    ...         self.raw = self.add_weight(name="raw", shape=(), autocast=False)
    ...         self._track_effective({"scale": ()}, [self.raw], self._scale)
    ...     def _scale(self, raw, training):
    ...         return (self.max_gain * keras.ops.tanh(raw),)
    ...     def call(self, x, training=None):
    ...         return self.effective(training)[0] * x
    >>> layer = Clipped(max_gain=0.5)
    >>> layer.build((None, 2))
    >>> _ = layer.raw.assign(1e9)
    >>> layer.effective_values()["scale"].item()
    0.5
    """

    def __init__(self, max_gain=1.0, **kwargs):
        super().__init__(**kwargs)
        self.max_gain = positive("max_gain", max_gain, GAIN_RANGE)

    @property
    def guaranteed(self):
        """Whether `max_gain` holds in training too, whatever the weights become."""
        return True

    def settings_of_gain(self, gain):
        """Attributes, and their values, that make `gain` the bound of the layer."""
        return {"max_gain": positive("max_gain", gain, GAIN_RANGE)}

    @property
    def rounding_inflation(self):
        """Proven factor by which rounding of the effective weights may exceed `max_gain`."""
        return 1.0

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {**super().get_config(), "max_gain": self.max_gain}


def refresh(model):
    """Fill the caches of all Lipschitz layers of a model, so that inference need not compute them.

    Args:
        model: built model or layer; nested models are searched.

    Returns:
        Number of layers refreshed.

    Example:

    >>> import keras
    >>> refresh(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]))
    0
    """
    layers = [v for v in model._flatten_layers() if isinstance(v, EffectiveLayer)]
    for layer in layers:
        layer.refresh()
    return len(layers)


def representable(x, dtype):
    """The nearest values that `dtype` holds, in the type of `x`, with gradient 1 (Veltkamp).

    A cast there and back may be left out by XLA, which would leave a bound on the values before
    the cast.
    """
    x = ops.convert_to_tensor(x)
    bits = _bits(x.dtype) - _bits(dtype)
    if bits <= 0:
        return x
    spread = x * (2.0**bits + 1)
    x = spread - (spread - x)
    if keras.backend.standardize_dtype(dtype) == "float16":
        # Below its normal range float16 holds the multiples of 2⁻²⁴.
        small = x + ops.stop_gradient(ops.round(x * 2.0**24) * 2.0**-24 - x)
        x = ops.where(ops.abs(x) < 2.0**-14, small, x)
    return x


def rounded_down(value, dtype):
    """The largest float that `dtype` holds and that is not above a positive Python float."""
    mantissa, exponent = np.frexp(value)
    return float(np.ldexp(np.floor(np.ldexp(mantissa, _bits(dtype))), exponent - _bits(dtype)))


def _as_numpy(x, dtype):
    """A copy as an array, through a type that NumPy knows."""
    return np.array(ops.convert_to_numpy(ops.cast(x, dtype)))


def _digits(content):
    """Integers from 1 to 2047 that tell contents apart, as float32."""
    digest = np.frombuffer(hashlib.sha256(content).digest()[: 2 * MARKS], np.uint16)
    return (digest % 2047 + 1).astype(np.float32)


def _mark_square(mark, settings):
    """n(n + k) + 1 with n in units of `MARK_SCALE`, exact in float32.

    Convex in n, so that means of marks are no marks; and n is too small, its square too large to
    survive rounding, pruning or clipping of all variables.
    """
    n = mark / MARK_SCALE
    return n * (n + settings) + 1


def _bits(dtype):
    """Bits of the significand."""
    return -round(np.log2(unit_roundoff(dtype)))


def _recalled(fn, sources, fresh, cache):
    """`cache` if `fresh`, else `fn(sources)`; the gradient is that of `fn(sources)` in both cases.

    A plain `ops.cond` would have no gradient in the first branch: raw variables trained through a
    call with `training=False`, as in fine-tuning, would stay as they are for ever.
    """

    def forward(sources, fresh, cache):
        return cond(fresh, lambda: tuple(cache), lambda: tuple(fn(sources)))

    backend = keras.backend.backend()
    if backend == "tensorflow":
        return _recalled_tensorflow(forward, fn, sources, fresh, cache)
    if backend == "jax":
        jax = importlib.import_module("jax")
        recall = jax.custom_vjp(forward)
        recall.defvjp(
            lambda s, f, c: (forward(s, f, c), s),
            lambda s, g: (jax.vjp(lambda s: tuple(fn(s)), s)[1](g)[0], None, None),
        )
        return recall(sources, fresh, cache)
    if backend == "torch":
        torch = importlib.import_module("torch")
        if torch.is_grad_enabled() and any(s.requires_grad for s in sources):
            return fn(sources)
    return forward(sources, fresh, cache)


def _recalled_tensorflow(forward, fn, sources, fresh, cache):
    tf = importlib.import_module("tensorflow")
    count = len(sources)
    # A branch that is not taken costs as many dead operations as it has: make it one.
    again = tf.function(
        lambda *values: tuple(fn(values)),
        autograph=False,
        experimental_attributes={"_noinline": True},
    )

    @tf.custom_gradient
    def recall(*arguments):
        sources, fresh, cache = arguments[:count], arguments[count], arguments[count + 1 :]

        def gradient(*upstream):
            with tf.GradientTape() as tape:
                tape.watch(sources)
                values = fn(sources)
            found = tape.gradient(values, sources, list(upstream))
            return (*found, *[None] * (len(arguments) - count))

        if tf.executing_eagerly():
            return forward(sources, fresh, cache), gradient
        return tf.cond(fresh, lambda: tuple(cache), lambda: again(*sources)), gradient

    # Keras hands out `tf.Variable`s, which a custom gradient would want to know by name.
    return recall(*(tf.convert_to_tensor(a) for a in (*sources, fresh, *cache)))
