"""Every layer of Keras with every argument that changes what it computes, as data."""

import functools

import keras
from keras import ops
from soundness.catalogue import ANY, CATALOGUE, IMAGE, SEQUENCE, VECTOR, VOLUME, entry

L = keras.layers


@keras.saving.register_keras_serializable("soundness")
def own_steep(x):
    return 3.0 * ops.tanh(x) + 0.1 * x


def activations(k):
    """Every form in which a user may name an activation."""
    names = [
        *("relu", "tanh", "sigmoid", "elu", "selu", "gelu", "softplus", "softsign", "silu"),
        *("leaky_relu", "relu6", "hard_sigmoid", "hard_silu", "mish", "celu", "hard_tanh"),
        *("tanh_shrink", "soft_shrink", "hard_shrink", "squareplus", "log_sigmoid", "sparse_plus"),
        *("linear", "exponential", "softmax", "glu", "threshold", "sparse_sigmoid"),
    ]
    name = k.pick(names)
    form = k.pick(
        ["string"] * 3 + ["function", "function", "layer", "partial", "wrapped", "ops", "own"]
    )
    function = keras.activations.get(name)
    k.names.append(f"{form} {name}")
    if form == "function":
        return function
    if form == "layer":
        return L.Activation(name)
    if form == "partial":
        return k.pick(
            [
                functools.partial(keras.activations.relu, negative_slope=2.5),
                functools.partial(keras.activations.gelu, approximate=True),
                functools.partial(keras.activations.leaky_relu, negative_slope=0.4),
                functools.partial(keras.activations.elu, alpha=3.0),
                functools.partial(keras.activations.relu, max_value=1.5, threshold=0.5),
            ]
        )
    if form == "wrapped":
        return functools.wraps(function)(lambda x: 4.0 * function(x))
    if form == "ops":
        return k.pick([ops.gelu, ops.leaky_relu, ops.relu, ops.elu, ops.sin, ops.square, ops.silu])
    return own_steep if form == "own" else name


def _activation(k, x):
    return k.pick([None, "relu", "tanh", activations(k)])


def _format(k, x):
    return k.pick(["channels_last", "channels_last", "channels_first"])


def _bias(k, x):
    return keras.initializers.RandomNormal(stddev=1.0)


def _normal(mean, deviation):
    return [keras.initializers.RandomNormal(mean, deviation)]


def _inner(k, x):
    return L.Dense(2, k.pick([None, "relu", "tanh"]))


def _integers(k, layer, x):
    return layer(ops.cast(ops.clip(x * 4, 0, 3), "int32"))


def _twice(k, layer, x):
    return layer(x, x)


def _pair(k, layer, x):
    return layer([x, x])


def _states(k, layer, x):
    y = layer(x)
    return y if not isinstance(y, (list, tuple)) else y[0]


def _fits(k, x):
    """TensorFlow ends the process where an adaptive pool gives more than it takes."""
    return 1 if min(x.shape[1:]) < 2 else k.pick([1, 2])


BIASED = {"bias_initializer": _bias}
USES = {"activation": _activation, "use_bias": [False], "data_format": _format}
SIZES = {"kernel_size": [1, 2, 3]}
PLAIN, EVEN = ["valid", "same"], [1, 2]
DENSE = {"activation": _activation, "use_bias": [False], "lora_rank": [1, 2], "lora_alpha": [0.5]}
entry("Dense", ANY, {"units": [1, 2, 3, 4], **BIASED}, DENSE, 14.0)
_GENTLE = {"activation": [None, "relu", "tanh"], "use_bias": [False]}
_UNITS, _FILTERS = {"units": [1, 2, 3, 4]}, {"filters": [2, 4]}
entry("OrthogonalDense", ANY, {**_UNITS, **BIASED}, _GENTLE, 2.0)
entry("BlockReflectorDense", ANY, {**_UNITS, **BIASED}, {**_GENTLE, "rank": [1]}, 1.0)
_FACTORS = {"kernel_size": [1, 2, 3], **BIASED}
entry(
    "OrthogonalConv2D",
    IMAGE,
    {**_FILTERS, **_FACTORS},
    {
        **_GENTLE,
        **{"strides": [2], "padding": ["valid", "circular"], "data_format": _format},
        **{"dilation_rate": [2], "groups": [2]},
    },
    3.0,
)
entry(
    "OrthogonalConv2DTranspose",
    IMAGE,
    {**_FILTERS, **_FACTORS},
    {**_GENTLE, "strides": [2], "padding": ["valid"]},
    1.5,
)
entry(
    "BlockReflectorConv2D",
    IMAGE,
    {**_FILTERS, **_FACTORS},
    {**_GENTLE, "strides": [2], "rank": [1]},
    1.0,
)
entry("ShiftMixing", (2, 3), {"share": [0.25]}, {"data_format": _format}, 1.5)
entry("PositionBias", ANY, {"initializer": _normal(0.0, 1.0)}, {}, 1.5)
entry(
    "EinsumDense",
    (1,),
    {"equation": ["ab,bc->ac", "...x,xy->...y"], "output_shape": [3], "bias_axes": [None]},
    {k: v for k, v in DENSE.items() if k != "use_bias"},
    1.0,
)
_TAPS = {"strides": [1, 2], "padding": PLAIN, "dilation_rate": [1, 2]}
for _n, _ranks in ((1, SEQUENCE), (2, IMAGE), (3, VOLUME)):
    _rest = {**_TAPS, **USES}
    _causal = {"padding": [*PLAIN, "causal"]} if _n == 1 else {}
    _groups = {"groups": [2]}
    entry(
        f"Conv{_n}D",
        _ranks,
        {"filters": [1, 2, 4], **SIZES, **BIASED},
        {**_rest, **_causal, **_groups},
        8.0,
    )
    entry(
        f"Conv{_n}DTranspose",
        _ranks,
        {"filters": [1, 2, 3], **SIZES, **BIASED},
        {**_rest, "output_padding": [0, 1]},
        3.0,
    )
    if _n < 3:
        _causal = {"padding": [*PLAIN, "causal"]} if _n == 1 else {}
        _rest = {**_rest, **_causal, "depth_multiplier": [2]}
        entry(f"DepthwiseConv{_n}D", _ranks, {**SIZES, **BIASED}, _rest, 3.0)
        entry(f"SeparableConv{_n}D", _ranks, {"filters": [1, 2], **SIZES, **BIASED}, _rest, 3.0)
    for _kind in ("Max", "Average"):
        entry(
            f"{_kind}Pooling{_n}D",
            _ranks,
            {"pool_size": [2, 3]},
            {"strides": [1, 2], "padding": PLAIN, "data_format": _format},
            2.0,
        )
        entry(
            f"Global{_kind}Pooling{_n}D",
            _ranks,
            {},
            {"keepdims": [True], "data_format": _format},
        )
        entry(
            f"Adaptive{_kind}Pooling{_n}D",
            _ranks,
            {"output_size": lambda k, x: _fits(k, x)},
            {"data_format": _format},
            0.5,
        )
    _forms = {} if _n == 1 else {"data_format": _format}
    _pads = [1, 2, (1, 0)] if _n == 1 else [1, ((1, 0),) * _n, (0,) * (_n - 1) + (1,)]
    entry(f"ZeroPadding{_n}D", _ranks, {}, {"padding": _pads, "data_format": _format})
    entry(f"Cropping{_n}D", _ranks, {"cropping": [1, *_pads[1:]]}, _forms, 0.6)
    _smooth = {"interpolation": ["nearest", "bilinear", "bicubic"]} if _n == 2 else {}
    entry(f"UpSampling{_n}D", _ranks, {}, {"size": [2, 3], **_forms, **_smooth}, 0.7)
    entry(f"SpatialDropout{_n}D", _ranks, {"rate": [0.5]}, _forms, 0.3)

# Activations -------------------------------------------------------------------------------------
entry("Activation", ANY, {"activation": lambda k, x: _activation(k, x) or "relu"}, {}, 5.0)
entry(
    "ReLU",
    ANY,
    {},
    {"max_value": [2.0, 0.5], "negative_slope": [0.3], "threshold": [0.1, 0.5]},
    2.0,
)
entry("LeakyReLU", ANY, {}, {"negative_slope": [1.7, 0.01, 4.0]}, 1.5)
entry(
    "PReLU",
    ANY,
    {"alpha_initializer": _normal(0.0, 1.0)},
    {"shared_axes": lambda k, x: list(range(1, len(x.shape) - 1)) or None},
)
entry("ELU", ANY, {}, {"alpha": [2.0, 0.3]})
entry("Softmax", ANY, {}, {"axis": [-1, 1, (1,)]})

# Normalizations ----------------------------------------------------------------------------------
_AFFINE = {
    "gamma_initializer": _normal(1.0, 1.0),
    "beta_initializer": _normal(0.0, 1.0),
}
_SWITCHES = {"center": [False], "scale": [False]}
entry(
    "BatchNormalization",
    ANY,
    {
        **_AFFINE,
        "moving_mean_initializer": _normal(0.0, 1.0),
        "moving_variance_initializer": [keras.initializers.RandomUniform(0.01, 4.0)],
    },
    {"epsilon": [0.1, 1e-5], "axis": [-1, 1], "renorm": [True], **_SWITCHES},
    4.0,
)
_EPSILON = {"epsilon": [0.5, 0.01, 1e-3]}
_AXES = {"axis": lambda k, x: k.pick([-1, 1, list(range(1, len(x.shape)))])}
entry("LayerNormalization", ANY, _AFFINE, {**_EPSILON, **_AXES, **_SWITCHES}, 1.5)
entry("GroupNormalization", ANY, {"groups": [-1, 1, 2], **_AFFINE}, {**_EPSILON, **_SWITCHES}, 0.7)
CATALOGUE["GroupNormalization"].optional["axis"] = [-1, 1]
entry("RMSNormalization", ANY, {}, {**_EPSILON, **_AXES}, 0.5)
entry("UnitNormalization", ANY, {}, _AXES, 0.5)
entry("Rescaling", ANY, {"scale": [0.1, 3.0, -2.0]}, {"offset": [0.3]})
entry(
    "Normalization",
    ANY,
    {"mean": [0.5], "variance": [0.01, 4.0]},
    {"invert": [True], "axis": [-1, None]},
)

# What moves entries or changes nothing at inference ----------------------------------------------
entry("Flatten", ANY, {}, {"data_format": _format}, 1.5)
entry("Reshape", ANY, {"target_shape": [(-1,), (-1, 1)]})
entry("Permute", ANY, {"dims": lambda k, x: _permuted(k, x)})
entry("RepeatVector", VECTOR, {"n": [2, 3]})
entry("Identity", ANY, {}, {}, 0.5)
entry("Dropout", ANY, {"rate": [0.5]}, {"noise_shape": [None]}, 0.5)
entry("AlphaDropout", ANY, {"rate": [0.5]}, {"noise_shape": [None]}, 0.3)
entry("GaussianDropout", ANY, {"rate": [0.5]}, {}, 0.3)
entry("GaussianNoise", ANY, {"stddev": [0.5]}, {}, 0.3)
entry("ActivityRegularization", ANY, {}, {"l1": [0.1], "l2": [0.1]}, 0.3)
entry("Masking", SEQUENCE, {}, {"mask_value": [0.0, 1.0]}, 0.3)


def _permuted(k, x):
    return tuple(int(i) for i in k.rng.permutation(len(x.shape) - 1) + 1)


_FILL = {"fill_mode": ["constant", "reflect", "nearest"], "fill_value": [0.5]}
_SMOOTH = {"interpolation": ["bilinear", "nearest"]}
_RANGE = {"value_range": [(0, 1)]}
_FORMAT = {"data_format": _format}
entry(
    "Resizing",
    IMAGE,
    {"height": [2, 3, 5], "width": [2, 4]},
    {
        "interpolation": ["bilinear", "nearest", "bicubic", "lanczos5"],
        "crop_to_aspect_ratio": [True],
        "pad_to_aspect_ratio": [True],
        "antialias": [True],
        "fill_mode": ["constant"],
        "fill_value": [0.5],
        **_FORMAT,
    },
)
entry("CenterCrop", IMAGE, {"height": [2], "width": [2, 3]}, _FORMAT)
entry("RandomCrop", IMAGE, {"height": [2], "width": [2]}, _FORMAT, 0.3)
_SLIGHT = 0.12
for _name, _needs, _may in (
    ("RandomFlip", {}, {"mode": ["horizontal"]}),
    ("RandomRotation", {"factor": [0.1]}, {**_FILL, **_SMOOTH}),
    ("RandomZoom", {"height_factor": [0.1]}, {"width_factor": [0.1], **_FILL, **_SMOOTH}),
    ("RandomTranslation", {"height_factor": [0.1], "width_factor": [0.1]}, {**_FILL, **_SMOOTH}),
    ("RandomShear", {}, {"x_factor": [0.1], "y_factor": [0.1], **_FILL, **_SMOOTH}),
    ("RandomPerspective", {}, {"factor": [0.5], "scale": [0.5], "fill_value": [0.5], **_SMOOTH}),
    (
        "RandomElasticTransform",
        {},
        {"factor": [0.5], "scale": [0.5], **_FILL, **_SMOOTH, **_RANGE},
    ),
    ("RandomErasing", {}, {"factor": [0.5], "scale": [(0.1, 0.2)], "fill_value": [0.5], **_RANGE}),
    ("RandomGaussianBlur", {}, {"factor": [0.5], "kernel_size": [3], "sigma": [2.0], **_RANGE}),
    ("RandomGrayscale", {}, {"factor": [0.9]}),
    ("RandomInvert", {}, {"factor": [0.9], **_RANGE}),
    *((f"Random{_n}", {"factor": [0.5]}, _RANGE) for _n in ("Brightness", "Contrast", "Hue")),
    *((f"Random{_n}", {"factor": [0.5]}, _RANGE) for _n in ("Saturation", "Sharpness")),
    ("RandomColorDegeneration", {"factor": [0.5]}, _RANGE),
    ("RandomPosterization", {"factor": [4]}, _RANGE),
    (
        "RandomColorJitter",
        {},
        {f"{c}_factor": [0.5] for c in ("brightness", "contrast", "saturation", "hue")} | _RANGE,
    ),
    ("RandAugment", {}, {"num_ops": [1], "factor": [0.9], **_RANGE, **_SMOOTH}),
    (
        "AugMix",
        {},
        {
            **{"num_chains": [1], "chain_depth": [2], "factor": [0.5], "alpha": [0.5]},
            **{"all_ops": [False], **_RANGE, **_SMOOTH},
        },
    ),
    ("Solarization", {}, {"addition_factor": [0.1], "threshold_factor": [0.5], **_RANGE}),
    ("AutoContrast", {}, _RANGE),
    ("Equalization", {}, {"bins": [16], **_RANGE}),
    (
        "ContrastLimitedAdaptiveHistogramEqualization",
        {},
        {"clip_limit": [2.0], "tile_grid_size": [(2, 2)], **_RANGE},
    ),
    ("CutMix", {}, {"factor": [0.5]}),
    ("MixUp", {}, {"alpha": [0.5]}),
):
    _named = "AutoContrast RandomBrightness RandomContrast Solarization".split()
    entry(_name, IMAGE, _needs, {**_may, **({} if _name in _named else _FORMAT)}, _SLIGHT)
entry("Pipeline", IMAGE, {"layers": lambda k, x: [L.CenterCrop(2, 2), L.Rescaling(2.0)]}, {}, 0.3)

# Several signals, states, whole numbers, other layers --------------------------------------------
_ATTENTION = {"dropout": [0.5]}
entry("Attention", SEQUENCE, {}, {"use_scale": [True], "score_mode": ["concat"]}, 0.5, _pair)
entry("AdditiveAttention", SEQUENCE, {}, {"use_scale": [False]}, 0.3, _pair)
CATALOGUE["Attention"].optional.update(_ATTENTION)
CATALOGUE["AdditiveAttention"].optional.update(_ATTENTION)
_HEADS = {"use_bias": [False], "sliding_window": [2], "use_gate": [True], **_ATTENTION}
entry(
    "MultiHeadAttention",
    SEQUENCE,
    {"num_heads": [1, 2], "key_dim": [2]},
    {"value_dim": [1], "output_shape": [3], "attention_axes": [(1,)], **_HEADS},
    0.5,
    _twice,
)
entry(
    "GroupQueryAttention",
    SEQUENCE,
    {"head_dim": [2], "num_query_heads": [2], "num_key_value_heads": [1, 2]},
    _HEADS,
    0.3,
    _twice,
)
_RUNS = {"return_sequences": [True], "go_backwards": [True], "return_state": [True]}
_UNROLL = {"unroll": [True]}
_DROPS = {"dropout": [0.5], "recurrent_dropout": [0.5], "use_bias": [False]}
_GATES = {"activation": ["relu"], **_DROPS}
_LSTM = {**_GATES, "recurrent_activation": ["hard_sigmoid"], "unit_forget_bias": [False]}
_GRU = {**_GATES, "recurrent_activation": ["hard_sigmoid"], "reset_after": [False]}
_CELLS = {
    "SimpleRNN": (_GATES, 0.15),
    "LSTM": (_LSTM, 0.1),
    "GRU": (_GRU, 0.1),
}
for _name, (_may, _weight) in _CELLS.items():
    entry(_name, SEQUENCE, {"units": [2]}, {**_may, **_RUNS, **_UNROLL}, _weight, _states)
    entry(f"{_name}Cell", SEQUENCE, {"units": [2]}, _may, 0.05, lambda k, c, x: L.RNN(c)(x))
for _n, _ranks in ((1, IMAGE), (2, VOLUME)):
    entry(
        f"ConvLSTM{_n}D",
        _ranks,
        {"filters": [2], "kernel_size": [1, 2]},
        {**_LSTM, **_RUNS, **_TAPS, **_FORMAT},
        0.03,
        _states,
    )


def _cells(k, x):
    return [L.SimpleRNNCell(2), L.GRUCell(2)]


entry("StackedRNNCells", SEQUENCE, {"cells": _cells}, {}, 0.05, lambda k, c, x: L.RNN(c)(x))
entry(
    "RNN",
    SEQUENCE,
    {"cell": lambda k, x: L.SimpleRNNCell(2)},
    {**_RUNS, **_UNROLL, "zero_output_for_mask": [True]},
    0.05,
    _states,
)
entry(
    "Bidirectional",
    SEQUENCE,
    {"layer": lambda k, x: L.SimpleRNN(2)},
    {
        "merge_mode": ["sum", "mul", "ave"],
        "backward_layer": lambda k, x: L.SimpleRNN(2, go_backwards=True),
    },
    0.1,
)
entry("TimeDistributed", (2, 3, 4), {"layer": _inner}, {}, 0.7)
entry("SpectralNormalization", VECTOR, {"layer": _inner}, {"power_iterations": [2]}, 0.7)
entry(
    "Embedding",
    VECTOR,
    {"input_dim": [5], "output_dim": [2]},
    {"mask_zero": [True], "lora_rank": [1], "lora_alpha": [0.5]},
    0.3,
    _integers,
)
entry(
    "ReversibleEmbedding",
    VECTOR,
    {"input_dim": [5], "output_dim": [2]},
    {
        **{"tie_weights": [False], "mask_zero": [True], "reverse_dtype": ["float32"]},
        "logit_soft_cap": [5.0],
    },
    0.2,
    lambda k, e, x: e(_integers(k, e, x), reverse=True) if k.chance(0.5) else _integers(k, e, x),
)
entry(
    "Discretization",
    VECTOR,
    {"bin_boundaries": [[-0.5, 0.0, 0.7]]},
    {"output_mode": ["one_hot", "multi_hot", "count"]},
    0.3,
)
entry(
    "CategoryEncoding",
    VECTOR,
    {"num_tokens": [4]},
    {"output_mode": ["one_hot", "multi_hot", "count"]},
    0.2,
    _integers,
)
entry(
    "Hashing",
    VECTOR,
    {"num_bins": [4]},
    {"mask_value": [0], "salt": [3], "output_mode": ["multi_hot"]},
    0.05,
    _integers,
)
entry(
    "IntegerLookup",
    VECTOR,
    {"vocabulary": [[1, 2, 3]]},
    {"num_oov_indices": [0, 2], "output_mode": ["multi_hot", "one_hot", "count"]},
    0.05,
    _integers,
)
entry(
    "STFTSpectrogram",
    VECTOR,
    {"frame_length": [2], "fft_length": [2], "frame_step": [1]},
    {
        **{"mode": ["real", "imag", "magnitude", "psd"], "window": ["hann", "hamming", None]},
        **{"periodic": [True], "scaling": ["spectrum"], "padding": ["same"]},
    },
    0.2,
    lambda k, layer, x: layer(ops.expand_dims(x, -1)),
)
entry(
    "MelSpectrogram",
    VECTOR,
    {"fft_length": [4], "sequence_stride": [1], "num_mel_bins": [2], "sampling_rate": [100]},
    {
        **{"sequence_length": [4], "window": ["hamming"], "min_freq": [1.0], "max_freq": [40.0]},
        **{"power_to_db": [False], "top_db": [20.0], "mag_exp": [1.0], "min_power": [1e-3]},
        "ref_power": [2.0],
    },
    0.1,
)


def _scaled(x, factor=2.0):
    return factor * x


entry(
    "Lambda",
    ANY,
    {"function": [_scaled, functools.partial(_scaled, factor=7.0), keras.activations.relu]},
    {"arguments": [None], "output_shape": [None], "mask": [None]},
    0.5,
)


# Layers that merge: one signal, the same through a dense layer, or an array.
def _with_another(k, layer, x):
    side = L.Dense(x.shape[-1], k.pick([None, "relu", "tanh"]))(x)
    return layer([x, side])


for _name in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"):
    entry(_name, ANY, {}, {}, 1.0, _with_another)
entry("Concatenate", ANY, {}, {"axis": [1, -1]}, 1.0, _with_another)
entry("Dot", VECTOR, {"axes": [-1, 1]}, {"normalize": [True]}, 0.4, _with_another)
