"""What the reader of a page has already: small data and models, by page and number of the block."""

IMPORTS = "import keras\nimport numpy as np\nimport tf_lyapunov as tfl\n"
_IMAGES = """
rng = np.random.default_rng(0)
x = rng.uniform(size=({count}, {shape})).astype("float32")
y = rng.integers(0, 10, len(x))
x_train, y_train, x_test, y_test, image = x, y, x[:{tested}], y[:{tested}], x[0]
"""
_DENSE = """
model = keras.Sequential(
    [keras.Input(({inputs},)), keras.layers.Dense(8, "relu"), keras.layers.Dense({outputs})]
)
"""


def _images(shape, count=40, tested=20):
    return _IMAGES.format(shape=shape, count=count, tested=tested)


def _dense(inputs, outputs=10):
    return _DENSE.format(inputs=inputs, outputs=outputs)


def _with(*packages):
    """Skips the page where a package that it is about is not installed."""
    return "import pytest\n" + "".join(f"pytest.importorskip({name!r})\n" for name in packages)


_SMALL = """
model = keras.Sequential(
    [keras.Input((8, 8, 1)), keras.layers.Flatten(), *(
        layer for i in range(1, 4)
        for layer in (keras.layers.Dense(8), keras.layers.ReLU(name=f"relu_{i}"))
    ), keras.layers.Dense(10)]
)
"""
_SEVERAL = """
inputs = {"image": keras.Input((6,), name="image"), "context": keras.Input((3,), name="context")}
joined = keras.layers.Concatenate()([inputs["image"], inputs["context"]])
model = keras.Model(list(inputs.values()), keras.layers.Dense(4)(joined))
images, context = (rng.normal(size=(20, n)).astype("float32") for n in (6, 3))
"""
_SQUARE = """
model = keras.Sequential(
    [keras.Input((28, 28, 1)), keras.layers.Conv2D(2, 5, 3), keras.layers.Flatten(),
     keras.layers.Dense(10)]
)
"""
_CLAIMED = """
x, y = x[:4], np.argmax(model.predict(x[:4], verbose=0), axis=1)
proof = tfl.certify(model, x, method="linear", norm="linf")
"""
_ATTACKED = """
from tf_lyapunov.attacks import PGD
from tf_lyapunov import Linf
vanilla = tfl.evaluate(model, x_test, y_test, path="vanilla/suite")
"""

SETUPS = {
    ("README.md", 0): "",
    ("README.md", 1): _with("torch"),
    ("guide.md", 0): _images("784"),
    ("guide.md", 1): _SEVERAL,
    ("brackets.md", 0): _images("12", count=6) + _dense(12),
    ("certificates.md", 0): _images("12") + _dense(12),
    ("certificates.md", 1): _dense(12, 3) + "y, y_test = y % 3, y_test % 3\n",
    ("certificates.md", 2): _dense(12),
    ("certificates.md", 3): _dense(12),
    ("layers.md", 0): _images("28, 28, 1"),
    ("localized.md", 0): _images("8, 8, 1", tested=4) + _SMALL,
    ("localized.md", 1): _ATTACKED,
    ("onnx.md", 0): _images("28, 28, 1") + _SQUARE,
    ("onnx.md", 2): _images("1, 8, 8") + _with("torch"),
    ("vnnlib.md", 0): _images("12", tested=4) + _dense(12) + _CLAIMED,
    ("index.md", 0): _images("12") + _dense(12),
    ("howto/own_layer.md", 0): _images("12"),
    ("howto/own_data.md", 0): _images("12") + _dense(12),
    ("howto/mixed_precision.md", 0): _images("12"),
    ("howto/train_through_bounds.md", 0): _images("8, 8, 1"),
    ("howto/export.md", 1): _images("12"),
    ("howto/tuner.md", 0): "import pytest\npytest.importorskip('keras_tuner')\n" + _images("12"),
    ("howto/tensorboard.md", 0): "import pytest\npytest.importorskip('tensorboard')\n"
    + _images("12"),
    ("howto/scikit_learn.md", 0): _images("12"),
    ("howto/applications.md", 0): _images("32, 32, 3", tested=6),
    ("howto/from_deel_lip.md", 0): _images("12"),
    ("howto/from_foolbox.md", 0): _images("12") + _dense(12),
    ("howto/from_art.md", 0): _images("12") + _dense(12),
    ("howto/from_gloro.md", 0): _images("12"),
    ("scale.md", 0): _images("12", tested=4) + _dense(12),
}
