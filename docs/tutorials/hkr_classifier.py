# %% [markdown]
# # A 1-Lipschitz classifier with HKR
#
# [![Run in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tf-lyapunov/tf_lyapunov/blob/main/docs/tutorials/hkr_classifier.ipynb)
#
# Instead of constraining ordinary layers, build with layers that are 1-Lipschitz at *every* value of their weights, and train
# them with the hinge-regularised Kantorovich-Rubinstein loss (HKR) of optimal transport:
#
# $$\mathcal L(f) = \underbrace{\mathbb E_{y \ne k}[f_k] - \mathbb E_{y = k}[f_k]}_{\text{KR: separate the classes}}
#  + \alpha\,\underbrace{\mathbb E\,[\,(m - y f)_+\,]}_{\text{hinge: be right by } m}$$
#
# A large $\alpha$ asks for accuracy, a small one for distance between the classes: the trade of accuracy for robustness is a
# number that you choose.

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

# %%
from tf_lyapunov import layers as lip


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((64,)),
            lip.BjorckDense(64, activation=lip.GroupSort(2)),
            lip.BjorckDense(32, activation=lip.GroupSort(2)),
            lip.NormalizedDense(10),
        ]
    )


# %% [markdown]
# `GroupSort` keeps the norm of gradients, where `relu` loses it; `NormalizedDense` bounds every logit by itself, which
# is what a margin between two classes needs.

# %%
trained = {}
for alpha in (5, 250):
    model = network()
    model.compile(
        keras.optimizers.Adam(0.003),
        tfl.losses.MulticlassHKR(alpha=alpha, min_margin=0.4),
        metrics=["accuracy"],
    )
    model.fit(x_train, y_train, epochs=20, batch_size=64, verbose=0)
    lip.refresh(model)  # keeps the kernels that were just trained: `predict` computes none
    trained[alpha] = model

# %%
import matplotlib.pyplot as plt

radii = np.linspace(0, 1, 21)
figure, axes = plt.subplots(figsize=(6, 3))
for alpha, model in trained.items():
    proof = tfl.certify(model, x_test, y_test)
    curve = [proof.certified_accuracy(r) for r in radii]
    axes.plot(radii, curve, label=f"α = {alpha}")
    print(
        f"α = {alpha}: right {curve[0]:.1%}, "
        f"proved right within 0.3 {proof.certified_accuracy(0.3):.1%}, "
        f"median radius {np.median(proof.radius):.2f}"
    )
axes.set(xlabel="radius (l2)", ylabel="proved accuracy", ylim=(0, 1))
axes.legend()
plt.show()

# %% [markdown]
# ## Deploy without this library
#
# `export_plain` writes the network with Keras' own layers: the kernels that are used, as explicit numbers.

# %%
plain = tfl.export_plain(trained[250])
print([type(layer).__name__ for layer in plain.layers])
gap = np.abs(plain.predict(x_test, verbose=0) - trained[250].predict(x_test, verbose=0)).max()
print("largest difference of the logits:", f"{gap:.1g}")
assert gap < 1e-4

# %% [markdown]
# Convolutions have the same names (`CayleyConv2D`, `SkewOrthogonalConv2D`, `SandwichConv2D`, …): see
# [the layers](../layers.md), with measurements of each, and [migration from deel-lip](../howto/from_deel_lip.md).
