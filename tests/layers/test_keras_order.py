"""Layers of this library in the place of Keras' ones: same places, same words, or a reason."""

import inspect
import warnings

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov import layers as ours
from tf_lyapunov.theory.operators import convolution_matrix

# Counterparts. A name of ours that stands for another one of Keras is given beside it.
DENSE = keras.layers.Dense, {"width": "units"}
CONV1D = keras.layers.Conv1D, {"width": "filters"}
CONV2D = keras.layers.Conv2D, {"width": "filters"}
AVERAGE = keras.layers.AveragePooling2D, {}
GLOBAL = keras.layers.GlobalAveragePooling2D, {}
COUNTERPARTS = {
    "AlmostOrthogonalConv1D": CONV1D,
    "AlmostOrthogonalConv2D": CONV2D,
    "AlmostOrthogonalDense": DENSE,
    "BatchCentering": (keras.layers.BatchNormalization, {}),
    "BjorckDense": DENSE,
    "BlockReflectorConv2D": CONV2D,
    "BlockReflectorDense": DENSE,
    "CayleyConv2D": CONV2D,
    "CayleyDense": DENSE,
    "ConvexPotentialConv1D": CONV1D,
    "ConvexPotentialConv2D": CONV2D,
    "ConvexPotentialDense": DENSE,
    "FrobeniusDense": DENSE,
    "GlobalL2NormPooling2D": GLOBAL,
    "InvertibleUpSampling": (keras.layers.UpSampling2D, {"pool_size": "size"}),
    "L2NormPooling2D": AVERAGE,
    "LipschitzPReLU": (keras.layers.PReLU, {"initial_slope": "alpha_initializer"}),
    "LpPooling2D": AVERAGE,
    "NormalizedDense": DENSE,
    "OrthogonalConv2D": CONV2D,
    "OrthogonalConv2DTranspose": (keras.layers.Conv2DTranspose, {}),
    "OrthogonalDense": DENSE,
    "SDPLipschitzConv1D": CONV1D,
    "SDPLipschitzConv2D": CONV2D,
    "SDPLipschitzDense": DENSE,
    "SandwichConv2D": CONV2D,
    "SandwichDense": DENSE,
    "ScaledAveragePooling2D": AVERAGE,
    "ScaledGlobalAveragePooling2D": GLOBAL,
    "SkewOrthogonalConv2D": CONV2D,
    "SpectralConv1D": CONV1D,
    "SpectralConv2D": CONV2D,
    "SpectralDense": DENSE,
}
# Layers that Keras has nothing like.
ALONE = {
    *("ChannelPadding", "ConvexCombination", "FullSort", "GroupSort", "Householder"),
    *("InvertibleDownSampling", "L2Attention", "LipschitzLayer", "LocalResponseNormalization"),
    *("MaxMin", "Padding2D", "PositionBias", "ShiftMixing"),
    # Their supply rate stands where Keras has an activation: no name means another thing there.
    *("RecurrentEquilibrium", "RecurrentEquilibriumCell"),
    *("SoftmaxPotential", "Truncate", "TwoSidedReLU", "refresh"),
}
WEIGHTED = [n for n, (k, _) in COUNTERPARTS.items() if k in (DENSE[0], CONV1D[0], CONV2D[0])]
# Its rows are normalised; their kernels are themselves orthogonal.
WITHOUT_GAIN = ("NormalizedDense", "OrthogonalConv2D", "OrthogonalDense")
# Values of Keras' arguments that every layer must take, since they are Keras' defaults or harmless.
HARMLESS = {
    "use_bias": True,
    "kernel_initializer": "glorot_uniform",
    "bias_initializer": "zeros",
    "kernel_regularizer": "l2",
    "bias_regularizer": "l2",
    "activity_regularizer": "l2",
    "kernel_constraint": None,
    "bias_constraint": None,
    "activation": "relu",
    "groups": 1,
    "dilation_rate": 1,
    "data_format": "channels_last",
    "lora_rank": None,
    "lora_alpha": None,
    "quantization_config": None,
    "strides": 1,
}


def made(name, **kwargs):
    kind = COUNTERPARTS[name][0]
    first = {"filters": 4, "kernel_size": 3} if "kernel_size" in parameters(kind) else {"units": 4}
    if "width" in parameters(getattr(ours, name)):
        first["width"] = 4
        first.pop("filters", first.pop("units", None))
    return getattr(ours, name)(**{**first, **kwargs})


def parameters(cls):
    return inspect.signature(cls.__init__).parameters


def test_every_layer_is_compared_with_keras_or_said_to_stand_alone():
    assert set(COUNTERPARTS) | ALONE == set(ours.__all__)


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_what_was_written_for_a_layer_of_keras_means_the_same(name):
    """The trouble: `SpectralDense(8, "relu")` dropped the activation in silence."""
    kind, renamed = COUNTERPARTS[name]
    theirs = [p for p in parameters(kind) if p != "self"]
    mine = [
        renamed.get(p.name, p.name)
        for p in parameters(getattr(ours, name)).values()
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"
    ]
    assert mine == theirs[: len(mine)]


@pytest.mark.parametrize("name", WEIGHTED)
def test_every_argument_of_the_layer_of_keras_is_taken(name):
    kind = COUNTERPARTS[name][0]
    kwargs = {n: HARMLESS[n] for n in parameters(kind) if n in HARMLESS}
    layer = made(name, **kwargs, **({} if name in WITHOUT_GAIN else {"max_gain": 0.5}))
    missing = set(parameters(kind)) - set(HARMLESS) - {"self", "kwargs", "padding"}
    assert missing <= {"filters", "units", "kernel_size"}
    assert layer.kernel_regularizer is not None
    again = type(layer).from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


@pytest.mark.parametrize("name", WEIGHTED)
def test_what_a_layer_cannot_do_is_refused_with_a_reason(name):
    asked = {"kernel_constraint": "non_neg", "lora_rank": 2}
    if "kernel_size" in parameters(COUNTERPARTS[name][0]):
        asked["padding"] = "reflect"
        if name.startswith(("ConvexPotential", "SDP")):
            asked["strides"] = 2
        if not name.startswith(("Spectral", "AlmostOrthogonal", "OrthogonalConv")):
            asked |= {"groups": 2, "data_format": "channels_first", "dilation_rate": 2}
    for argument, value in asked.items():
        with pytest.raises(ValueError, match=f"`{argument}`.*Received: {argument}="):
            made(name, **{argument: value})


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: ours.SpectralDense(8, True), {"shrink_only": True}),
        (lambda: ours.FrobeniusDense(8, False), {"shrink_only": False}),
        (lambda: ours.NormalizedDense(8, 2.0, True), {"row_norm": 2.0, "shrink_only": True}),
        (lambda: ours.BjorckDense(8, 3), {"iterations": 3}),
        (lambda: ours.SpectralConv2D(8, 3, True), {"shrink_only": True, "strides": (1, 1)}),
        (lambda: ours.SkewOrthogonalConv2D(8, 3, 2, 4, 9), {"terms": 4, "inference_terms": 9}),
        (lambda: ours.LpPooling2D(2, 1, "same", 3), {"p": 3.0}),
        (lambda: ours.BatchCentering(-1, 0.9, False), {"use_bias": False}),
        (lambda: ours.LipschitzPReLU(0.5, (1, 2)), {"shared_axes": (1, 2)}),
    ],
)
def test_code_in_the_former_order_still_means_what_it_did_and_is_told_so(call, meant):
    with pytest.warns(FutureWarning, match="next version") as found:
        layer = call()
    assert {n: getattr(layer, n) for n in meant} == meant
    assert found[0].filename == __file__


def test_an_activation_and_strides_by_position_are_those_of_the_layer():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.SpectralDense(8, "relu").activation is keras.activations.relu
        assert ours.FrobeniusDense(8, "relu").activation is keras.activations.relu
        assert ours.ConvexPotentialDense(8, "tanh").activation is keras.activations.tanh
        assert ours.SpectralConv2D(8, 3, 2).strides == (2, 2)
        assert ours.SpectralConv1D(8, 3, 1, "causal").padding == "causal"


def test_regularizers_are_part_of_the_loss():
    layer = ours.SpectralDense(3, kernel_regularizer="l2", bias_regularizer="l1", use_bias=True)
    layer.build((None, 4))
    expected = 0.01 * np.sum(np.square(keras.ops.convert_to_numpy(layer.kernel)))
    assert len(layer.losses) == 2
    np.testing.assert_allclose(sum(float(v) for v in layer.losses), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [ours.SpectralConv2D, ours.AlmostOrthogonalConv2D])
def test_grouped_convolutions_with_channels_first_are_bounded_and_read(kind):
    keras.utils.set_random_seed(0)
    layer = kind(6, 3, 2, "valid", "channels_first", 1, 2, "relu", bias_initializer="ones")
    model = keras.Sequential(
        [keras.Input((4, 7, 6)), layer, keras.layers.Flatten(), keras.layers.Dense(3)]
    )
    assert model.layers[0].output.shape == (None, 6, 3, 2)
    plain = keras.layers.Conv2D(6, 3, 2, "valid", groups=2, activation="relu")
    plain.build((None, 7, 6, 4))
    plain.set_weights([layer.effective_values()["kernel"], np.ones(6)])
    x = np.random.default_rng(0).standard_normal((5, 4, 7, 6)).astype("float32")
    own = keras.ops.convert_to_numpy(layer(x))
    last = keras.ops.moveaxis(x, 1, -1)
    grouped = np.concatenate(
        [
            keras.ops.convert_to_numpy(
                keras.ops.relu(
                    keras.ops.conv(last[..., 2 * g : 2 * g + 2], plain.kernel[..., part], 2) + 1.0
                )
            )
            for g, part in enumerate((slice(0, 3), slice(3, 6)))
        ],
        axis=-1,
    )
    np.testing.assert_allclose(np.moveaxis(own, 1, -1), grouped, atol=1e-5)
    matrix = convolution_matrix(layer.effective_values()["kernel"], layer.linear_map).toarray()
    assert np.linalg.norm(matrix, 2) <= layer.max_gain * layer.rounding_inflation + 1e-12
    proof = tfl.certify(model, x)
    assert np.all(proof.radius > 0)
    exported = tfl.export_plain(model)
    np.testing.assert_allclose(
        exported.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5
    )
