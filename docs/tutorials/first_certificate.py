# %% [markdown]
# # First certificate
#
# [![Run in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tf-lyapunov/tf_lyapunov/blob/main/docs/tutorials/first_certificate.ipynb)
#
# You have a Keras model. How far may an input be moved before its class can change? A *certificate* gives every input a
# radius within which it does **not**, whatever the change. This notebook certifies an ordinary model, reads the certificate,
# and shows what limits it.

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
# An ordinary classifier, trained in the ordinary way:

# %%
model = keras.Sequential(
    [keras.Input((64,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(10)]
)
model.compile(
    "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
)
model.fit(x_train, y_train, epochs=15, verbose=0)
print("test accuracy:", round(model.evaluate(x_test, y_test, verbose=0)[1], 3))

# %% [markdown]
# ## One call
#
# `certify` reads the model once, bounds the norm of every linear map in float64, and rounds to the safe side. If
# $L$ bounds the gain, $\|f(u) - f(v)\|_2 \le L\,\|u - v\|_2$, and the logit of the class $c$ leads by a margin, then no change
# $r$ with
#
# $$\|r\|_2 < \min_{j \ne c} \frac{f_c(x) - f_j(x)}{L_{cj}}$$
#
# changes the class; $L_{cj}$ bounds the gain of the difference $f_c - f_j$.

# %%
proof = tfl.certify(model, x_test, y_test)
print("gain of the network, at most:", round(proof.gain_upper_bound, 2))
print("median certified radius:", float(np.median(proof.radius)).__round__(3))
for radius in (0.05, 0.1, 0.2):
    print(f"proved right within {radius}: {proof.certified_accuracy(radius):.1%}")

# %% [markdown]
# ## What the certificate says
#
# Everything that it assumes is written down: which layers it read, with which gain, and by which rule.

# %%
print(proof.explain())

# %% [markdown]
# ## Ask an attack
#
# A certificate is a lower bound on the truth, an attack an upper one. What the certificate proves, no attack can undo;
# between the two lies what neither knows.

# %%
import matplotlib.pyplot as plt

radii = [0.05, 0.1, 0.2, 0.3, 0.5]
proved = [proof.certified_accuracy(r) for r in radii]
attacked = [
    tfl.attacks.PGD(tfl.L2(r), steps=20)(model, x_test, y_test).robust_accuracy for r in radii
]
assert all(p <= a for p, a in zip(proved, attacked, strict=True))

figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(radii, attacked, "o-", label="right under PGD-20")
axes.plot(radii, proved, "o-", label="proved right")
axes.fill_between(radii, proved, attacked, alpha=0.15)
axes.set(xlabel="radius (l2)", ylabel="accuracy", ylim=(0, 1), title="Ordinary training")
axes.legend()
plt.show()

# %% [markdown]
# The gap has two causes: the model really has large gains, and the product of norms is a coarse bound of them.
# The first is mended by [training under a budget](constrain_your_model.ipynb), the second by
# [tighter certificates](tighter_certificates.ipynb): `certify(model, x, method="auto")`.
