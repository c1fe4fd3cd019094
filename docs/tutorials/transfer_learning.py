# %% [markdown]
# # Transfer learning with budgets
#
# [![Run in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tf-lyapunov/tf_lyapunov/blob/main/docs/tutorials/transfer_learning.ipynb)
#
# A backbone that somebody else trained, a new head of your own: budget the head alone, and certify the whole. The gain of
# the network is at most that of the backbone times that of the head,
#
# $$L \le L_{\text{backbone}} \cdot L_{\text{head}},$$
#
# so that the backbone's gain says what can be proved at all.

# %% tags=["skip-execution"]
# In Colab, or wherever the library is not installed:
# %pip install -q "tf_lyapunov[tensorflow,datasets,report] @ git+https://github.com/tf-lyapunov/tf_lyapunov"

# %%
import keras
import numpy as np
from sklearn.datasets import load_digits

import tf_lyapunov as tfl

keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")  # pixels in [0, 1]
x_train, y_train, x_test, y_test = x[:1500], y[:1500], x[1500:], y[1500:]

# %% [markdown]
# The backbone learns digits 0 to 4; the task is 5 to 9, with 200 images. (With the network at hand it would be one of
# `keras.applications`, which certify in the same way.)

# %%
backbone = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(64, "relu", name="features_1"),
        keras.layers.Dense(32, "relu", name="features_2"),
    ],
    name="backbone",
)
tfl.constrain(backbone, 1.0)  # gain at most 1 per layer; leave it out for a backbone as it comes
old = keras.Sequential([backbone, keras.layers.Dense(5)])
old.compile("adam", tfl.losses.TemperatureCrossEntropy(temperature=0.1), metrics=["accuracy"])
low = y_train < 5
old.fit(x_train[low], y_train[low], epochs=15, verbose=0)
print(
    "gain of the backbone, at most:", round(tfl.lipschitz_upper_bound(backbone).gain_upper_bound, 4)
)

# %% [markdown]
# ## Freeze it, and give the new head a budget

# %%
backbone.trainable = False
model = keras.Sequential(
    [keras.Input((64,)), backbone, keras.layers.Dense(16, "relu", name="hidden"),
     keras.layers.Dense(5, name="head")]
)  # fmt: skip
tfl.constrain(model, {"hidden": 1.0, "head": 1.0})
new = np.flatnonzero(y_train >= 5)[:200]
model.compile(
    keras.optimizers.Adam(0.01),
    tfl.losses.TemperatureCrossEntropy(temperature=0.1),
    metrics=["accuracy"],
)
before = backbone.get_weights()
model.fit(x_train[new], y_train[new] - 5, epochs=40, verbose=0)
assert all((a == b).all() for a, b in zip(before, backbone.get_weights(), strict=True))

# %%
task = y_test >= 5
proof = tfl.certify(model, x_test[task], y_test[task] - 5)
for radius in (0, 0.1, 0.2):
    print(f"proved right within {radius}: {proof.certified_accuracy(radius):.1%}")
print("gain of the whole, at most:", round(proof.gain_upper_bound, 4))

# %% [markdown]
# ## A backbone as it comes
#
# Without a budget its gain multiplies everything. `explain()` shows which layer to blame; a fine-tuning step with
# `constrain` on the worst ones (a mapping from names to budgets) is usually enough.

# %%
free = keras.Sequential(
    [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(32, "relu"),
     keras.layers.Dense(5)]
)  # fmt: skip
free.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
free.fit(x_train[new], y_train[new] - 5, epochs=40, verbose=0)
proof = tfl.certify(free, x_test[task], y_test[task] - 5)
print("gain without budgets, at most:", round(proof.gain_upper_bound, 1))
print(f"proved right within 0.1: {proof.certified_accuracy(0.1):.1%}")
