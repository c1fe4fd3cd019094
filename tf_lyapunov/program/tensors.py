"""Arrays to tensors and back, without the rounding that data adapters apply."""

import keras
import numpy as np


def as_tensor(x, dtype):
    """A tensor of exactly this dtype, which some backends' adapters would not keep."""
    x = np.asarray(x)
    x = x.astype("float32") if dtype == "bfloat16" else x.astype(dtype)
    return keras.ops.cast(keras.ops.convert_to_tensor(x, dtype=str(x.dtype)), dtype)


def as_array(tensor):
    """float64 copy of a tensor."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    return np.asarray(keras.ops.convert_to_numpy(tensor)).astype(np.float64)
