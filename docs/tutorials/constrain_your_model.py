# %% [markdown]
# # Constrain your own model
#
# [![Run in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tf-lyapunov/tf_lyapunov/blob/main/docs/tutorials/constrain_your_model.ipynb)
#
# Keep the gain of any Keras model below 1 while `fit` runs: the same layers, the same optimizer, one line more. The radius of
# an input is then at least its margin, $\tfrac{1}{\sqrt 2}(f_c - f_j)$.

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
def network():
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, "relu"),
            keras.layers.Dense(32, "relu"),
            keras.layers.Dense(10),
        ]
    )


plain, model = network(), network()

# %% [markdown]
# ## From a gain to budgets
#
# A design divides the gain among the layers: budgets $b_1, \dots, b_n$ with $\prod_l b_l\,\beta_l \le L$, where $\beta_l$ is
# the largest slope of the activation. `constrain` sets them as kernel constraints, and projects the kernels at once.

# %%
relu, linear = tfl.Sector.of("relu"), tfl.Sector.linear()
design = tfl.spectral_design(gain=1.0, sectors=[relu, relu, linear])
print(design.verdict, design.budgets)
tfl.constrain(model, design)
print(type(model.layers[0].kernel_constraint).__name__, model.layers[0].kernel_constraint.max_gain)

# %% [markdown]
# ## Train as always, with a loss that knows
#
# A network with gain 1 cannot make its logits large, so plain cross-entropy never gets confident. A low temperature in the
# *loss* mends that and changes no certificate. `LyapunovMonitor` reports the proved gain after every epoch.

# %%
loss = tfl.losses.TemperatureCrossEntropy(temperature=0.1)
plain_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
plain.compile("adam", plain_loss, metrics=["accuracy"])
plain.fit(x_train, y_train, epochs=20, verbose=0)
model.compile("adam", loss, metrics=["accuracy"])
history = model.fit(
    x_train, y_train, epochs=20, verbose=0, callbacks=[tfl.callbacks.LyapunovMonitor(design)]
)
print("proved gain at the end:", history.history["gain_upper_bound"][-1])

# %% [markdown]
# ## What it bought

# %%
import matplotlib.pyplot as plt

radii = np.linspace(0, 0.8, 17)
figure, axes = plt.subplots(figsize=(6, 3))
for name, trained in (("plain training", plain), ("gain at most 1", model)):
    proof = tfl.certify(trained, x_test, y_test)
    print(f"{name}: clean {proof.certified_accuracy(0):.1%}, gain ≤ {proof.gain_upper_bound:.3g}")
    axes.plot(radii, [proof.certified_accuracy(r) for r in radii], label=name)
axes.set(xlabel="radius (l2)", ylabel="proved accuracy", ylim=(0, 1))
axes.legend()
plt.show()
assert proof.gain_upper_bound <= 1.0

# %% [markdown]
# ## Loading and `set_weights`
#
# Keras applies constraints in the optimizer's step and nowhere else. After loading weights or averaging them, project:

# %%
model.layers[0].set_weights([3 * w for w in model.layers[0].get_weights()])
print("after set_weights:", round(tfl.certify(model, x_test[:5]).gain_upper_bound, 3))
tfl.project(model)
print("after project:    ", round(tfl.certify(model, x_test[:5]).gain_upper_bound, 3))

# %% [markdown]
# Convolutions, pools, batch normalization, residual blocks and nested models take the same call: budgets go to stages, in
# order, or to layers by name: `tfl.constrain(model, {"dense": 0.7})`; one number is a budget for every stage.
