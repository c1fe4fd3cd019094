# %% [markdown]
# # Attack and bracket
#
# [![Run in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tf-lyapunov/tf_lyapunov/blob/main/docs/tutorials/attack_and_bracket.ipynb)
#
# The smallest change that alters the class of an input is hard to find exactly. It is bracketed from both sides:
#
# $$\underbrace{\kappa(x)}_{\text{proved}} \;\le\; \min\{\|r\| : \text{arg max}\; f(x + r) \ne c\} \;\le\; \underbrace{\min_{a}\|r_a\|}_{\text{attacks } a}$$
#
# If the ends meet, the question is answered. If they do not, the ratio says how much either side may still gain.

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
model = keras.Sequential(
    [keras.Input((64,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(10)]
)
tfl.constrain(model, 2.0)
model.compile("adam", tfl.losses.TemperatureCrossEntropy(temperature=0.2), metrics=["accuracy"])
model.fit(x_train, y_train, epochs=20, verbose=0)
images, labels = x_test[:40], y_test[:40]

# %% [markdown]
# ## Attacks
#
# Attacks of a radius (`PGD`, `FGM`, `APGD`, `Square`, `AutoAttack`) and of least distance (`DeepFool`, `DDN`, `FMN`,
# `CarliniWagner`) share one call. A success is checked on the model itself: right class before, wrong after, norm within
# the ball in float64, pixels within `bounds`.

# %%
for attack in (
    tfl.attacks.FGM(tfl.L2(0.3), bounds=(0, 1)),
    tfl.attacks.PGD(tfl.L2(0.3), steps=40, bounds=(0, 1)),
    tfl.attacks.DDN(steps=100, bounds=(0, 1)),
):
    found = attack(model, images, labels)
    distance = np.nanmedian(found.distance)
    print(f"{found.attack:12.12} success {found.success_rate:.0%}, median distance {distance:.3f}")

# %% [markdown]
# ## The bracket

# %%
found = tfl.bracket(model, images, labels, time_budget=5, progress=False)
print(found)

# %%
import matplotlib.pyplot as plt

order = np.argsort(found.lower)
figure, axes = plt.subplots(figsize=(6, 3))
axes.vlines(range(len(order)), found.lower[order], found.upper[order], lw=3)
axes.set(
    xlabel="test image, by proved distance", ylabel="l2 distance", title="Truth is on each line"
)
plt.show()
assert (found.lower <= found.upper).all()

# %% [markdown]
# ## The weakest image
#
# What changes its class, and by how much:

# %%
weakest = int(np.argmin(np.where(found.lower > 0, found.lower, np.inf)))
result = tfl.attacks.DDN(steps=200)(
    model, images[weakest : weakest + 1], labels[weakest : weakest + 1]
)
shown = [images[weakest], result.x_adv[0], result.x_adv[0] - images[weakest]]
titles = ["image", "adversarial", "difference"]
figure, several = plt.subplots(1, 3, figsize=(6, 2.2))
for axes, image, title in zip(several, shown, titles, strict=True):
    axes.imshow(image.reshape(8, 8), cmap="gray" if title != "difference" else "coolwarm")
    axes.set_title(title)
    axes.axis("off")
plt.show()
print(
    f"proved: nothing below {found.lower[weakest]:.3f}; found: {result.distance[0]:.3f}, "
    f"class {labels[weakest]} becomes {result.predictions_adv[0]}"
)
