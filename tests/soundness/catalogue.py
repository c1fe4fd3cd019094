"""How a layer of Keras, or of ours, is drawn with random arguments; `entries` holds them as data.

`CATALOGUE` says for a layer's class which signals it takes (their number of axes without the
batch), which arguments it needs, and which it may be given. Choices are lists, or functions of the
run's `Kept` and of the signal. `NEVER` and `NEVER_ARGUMENTS` say what is left out, and why.
"""

import dataclasses

import keras
import numpy as np
from keras import ops

from tf_lyapunov import layers as ours

L = keras.layers
ANY, VECTOR, SEQUENCE, IMAGE, VOLUME = (1, 2, 3, 4), (1,), (2,), (3,), (4,)
# An optional argument is given in so many of the cases.
GIVEN = 0.3


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a layer is drawn."""

    ranks: tuple
    required: dict
    optional: dict
    weight: float
    apply: object


CATALOGUE = {}
NEVER = {
    "Layer": "the base class computes nothing",
    "Wrapper": "the base class computes nothing",
    "FlaxLayer": "holds a function of another framework",
    "JaxLayer": "holds a function of another framework",
    "TorchModuleWrapper": "holds a function of another framework",
    "TFSMLayer": "holds a graph of another framework",
    "ConvLSTM3D": "takes signals of five axes; those of three and four are drawn",
    "StringLookup": "takes text",
    "TextVectorization": "takes text",
    "MaxNumBoundingBoxes": "takes boxes, no signal",
    "HashedCrossing": "takes pairs of whole numbers, and gives hashes: no slope anywhere",
    "InputLayer": "made by `keras.Input`, with every type",
}
NEVER_ARGUMENTS = {
    "self": "the layer",
    "name": "a word",
    "kwargs": "`dtype`, `autocast` and `trainable` are drawn for every layer",
    "seed": "random numbers are drawn in training only",
    "activity_regularizer": "counts in training only",
    "use_cudnn": "chooses a device's kernel",
    "flash_attention": "chooses a device's kernel",
    "sparse": "sparse tensors have no gradient on every backend",
    "stateful": "such a layer is no function of its input",
    "quantization_config": "`model.quantize` draws it",
    "gptq_unpacked_column_size": "`model.quantize` draws it",
    "synchronized": "training on several devices only",
    "momentum": "training only",
    "renorm_momentum": "training only",
    "renorm_clipping": "training only",
    "weights": "an old way to assign values",
}
# On these backends they end the process: no test survives it.
NEVER_ON = {"tensorflow": ("AdaptiveMaxPooling1D", "AdaptiveMaxPooling2D", "AdaptiveMaxPooling3D")}
# By their endings: regularizers and constraints act in training, and values are drawn at random.
NEVER_ENDINGS = ("_regularizer", "_constraint", "_initializer")


def kind(name):
    """The class of this name: Keras' or, for layers whose weights are their own, ours."""
    return getattr(L, name, None) or getattr(ours, name)


def entry(names, ranks, required=(), optional=(), weight=1.0, apply=None):
    for name in names.split():
        CATALOGUE[name] = Entry(ranks, dict(required), dict(optional), weight, apply)


def chosen(k, x, choices):
    return choices(k, x) if callable(choices) else k.pick(choices)


def make(k, x, name):
    """A layer of this class with random arguments, for the signal `x`."""
    found = CATALOGUE[name]
    options = {key: chosen(k, x, c) for key, c in found.required.items()}
    options |= {key: chosen(k, x, c) for key, c in found.optional.items() if k.chance(GIVEN)}
    if k.chance(0.03):
        options["trainable"] = False
    if k.chance(0.03):
        dtype = k.pick(["float16", "float32", "mixed_float16", "bfloat16"])
        options["dtype"] = k.input_dtype or dtype
        k.names.append(f"dtype {dtype}")
    elif k.chance(0.01):
        options["autocast"] = False
    return kind(name)(**options)


def applied(k, x, name):
    """The layer called on `x`, by the way that its class takes signals."""
    found = CATALOGUE[name]
    k.names.append(name)
    layer = make(k, x, name)
    y = found.apply(k, layer, x) if found.apply else layer(x)
    y = y[0] if isinstance(y, (list, tuple)) else y
    return y if str(y.dtype).startswith(("float", "bfloat")) else ops.cast(y, k.compute)


def names_for(rank, weights=None):
    """Classes that take signals of this rank, and their weights as probabilities."""
    left_out = NEVER_ON.get(keras.backend.backend(), ())
    names = [n for n, e in CATALOGUE.items() if rank in e.ranks and n not in left_out]
    share = np.array([CATALOGUE[n].weight for n in names])
    return names, share / share.sum()


# Arguments that are left out of one class alone.
_REFUSED = "refused: it would move the kernel off the manifold"
NEVER_OF = {
    "OrthogonalDense": {
        "preserves": "refuses shapes, and changes no value",
        **dict.fromkeys(("lora_rank", "lora_alpha"), _REFUSED),
    },
    **{
        name: {
            "preserves": "refuses shapes, and changes no value",
            "max_gain": "a factor, for which Rescaling stands",
        }
        for name in (
            "OrthogonalConv2D",
            "OrthogonalConv2DTranspose",
            "BlockReflectorDense",
            "BlockReflectorConv2D",
        )
    },
    "IntegerLookup": {
        "max_tokens": "without a vocabulary only",
        "mask_token": "changes the vocabulary's numbers only",
        "oov_token": "for the inverse only",
        "vocabulary_dtype": "how the vocabulary is stored",
        "idf_weights": "with output_mode='tf_idf' only",
        "invert": "gives whole numbers back",
        "pad_to_max_tokens": "pads by zeros",
        "oov_method": "where unknown numbers go",
        "salt": "where unknown numbers go",
    },
    "Discretization": {
        "num_bins": "without boundaries only",
        "epsilon": "how boundaries are found",
    },
    "STFTSpectrogram": {
        "expand_dims": "one more axis",
        "data_format": "where that axis stands",
    },
}
