"""Layers that change images in training alone: at inference they give back their input."""

import dataclasses

import keras

from tf_lyapunov.program.families.unchanged import unchanged_gain
from tf_lyapunov.program.refusal import refuse

_NAMES = (
    *("AugMix", "CutMix", "Equalization", "MixUp", "RandAugment", "Solarization"),
    *("MaxNumBoundingBoxes", "RandomBrightness", "RandomColorDegeneration", "RandomColorJitter"),
    *("RandomContrast", "RandomCrop", "RandomElasticTransform", "RandomErasing", "RandomFlip"),
    *("RandomGaussianBlur", "RandomGrayscale", "RandomHue", "RandomInvert", "RandomPerspective"),
    *("RandomPosterization", "RandomRotation", "RandomSaturation", "RandomSharpness"),
    *("RandomShear", "RandomTranslation", "RandomZoom"),
)
# Versions of Keras differ in what they have of these.
AUGMENTING = tuple(getattr(keras.layers, n) for n in _NAMES if hasattr(keras.layers, n))


def _rule(call):
    tensor, output = call.inputs[0], call.outputs[0]
    if tensor.shape != output.shape:
        refuse(
            call.operation,
            f"at inference it gives back its input of shape {tensor.shape}, which is not the "
            f"{output.shape} that the layers behind it were built for",
            advice="Crop by CenterCrop, or to the size of the input.",
        )
    return dataclasses.replace(unchanged_gain(call), method="identity at inference")


def _read(call):
    return []


READERS = dict.fromkeys(AUGMENTING, _read)
RULES = dict.fromkeys(AUGMENTING, _rule)
