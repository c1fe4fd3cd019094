"""Images that benchmarks train and attack on."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def mnist_or_digits():
    """MNIST training images with a channel axis, or digits enlarged, where MNIST is absent."""
    import numpy as np

    from tf_lyapunov import datasets

    try:
        data = datasets.load("mnist", data_dir=_data_dir())
        return data.x_train, data.y_train, "MNIST"
    except ValueError:
        data = datasets.load("digits")
        images = np.asarray(data.x_train).reshape(-1, 8, 8, 1)
        return np.kron(images, np.ones((1, 3, 3, 1), "float32")), data.y_train, "digits, enlarged"


def _data_dir():
    if os.environ.get("TFDS_DATA_DIR"):
        return os.environ["TFDS_DATA_DIR"]
    beside = ROOT.parent / "shared" / "tfds"
    return str(beside) if beside.is_dir() else None
