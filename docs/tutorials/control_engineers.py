# %% [markdown]
# # (δ, ν) for control engineers
#
# [![Run in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tf-lyapunov/tf_lyapunov/blob/main/docs/tutorials/control_engineers.ipynb)
#
# A layer, like a plant, can be *incrementally input-feedforward output-feedback passive*, IIFOFP(δ, ν): for any two inputs
#
# $$\Delta u^\top \Delta y \;\ge\; \nu\,\|\Delta u\|^2 + \delta\,\|\Delta y\|^2 .$$
#
# $\delta > 0$ is output strictness (it bounds the gain), $\nu$ is input feedforward. Passivity composes, so that indices of
# layers give indices of a network: the route of Rahnama et al. (2020) and Aquino et al. This notebook goes from a claim to
# budgets, trains under them, measures the indices that came out, and says which of the published rules are proofs.

# %% tags=["skip-execution"]
# In Colab, or wherever the library is not installed:
# %pip install -q "tf_lyapunov[tensorflow,datasets,sdp] @ git+https://github.com/tf-lyapunov/tf_lyapunov"

# %%
import keras
from sklearn.datasets import load_digits

import tf_lyapunov as tfl
from tf_lyapunov.errors import DesignInfeasible

claim = tfl.Indices(delta=0.4, nu=-2.0)
print("slopes of the cone:", [round(s, 3) for s in claim.slopes], " gain:", round(claim.gain, 3))

# %% [markdown]
# (δ, ν) is a cone: $\Delta y$ lies between the slopes $a < b$ with $\delta = 1/(a+b)$ and $\nu = ab/(a+b)$, for
# scalars literally, for vectors as $\|\Delta y - c\,\Delta u\| \le r\,\|\Delta u\|$ with centre $c$ and radius $r$:

# %%
a, b = claim.slopes
print("δ, ν from the slopes:", round(1 / (a + b), 6), round(a * b / (a + b), 6))
print("back:", tfl.Indices.from_slopes(a, b))

# %% [markdown]
# ## From the claim to budgets
#
# Activations are sectors $[\alpha, \beta]$. The sound rule asks for norms whose product stays within the cone.

# %%
leaky, linear = tfl.Sector.of("leaky_relu", negative_slope=0.1), tfl.Sector.linear()
design = tfl.spectral_design(claim, sectors=[leaky, leaky, linear])
print(design.explain())

# %% [markdown]
# The published rules give other budgets, and `verdict` says whether they prove the claim: they usually do not
# ([errata](../papers.md#errata-of-the-papers)). `rule="lyapunov"` is for ν ≥ 0 alone.

# %%
for rule in ("sound", "dissipativity"):
    other = tfl.spectral_design(claim, sectors=[leaky, leaky, linear], rule=rule)
    print(f"{rule:14} {other.verdict:11} budgets {[round(b, 3) for b in other.budgets]}")

# %% [markdown]
# ## Train under the claim

# %%
keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")
model = keras.Sequential([keras.Input((64,))])
for width in (32, 16):
    model.add(keras.layers.Dense(width))
    model.add(keras.layers.LeakyReLU(negative_slope=0.1))
model.add(keras.layers.Dense(10))
tfl.constrain(model, design)
model.compile("adam", tfl.losses.TemperatureCrossEntropy(temperature=0.1), metrics=["accuracy"])
model.fit(
    x[:1500], y[:1500], epochs=15, verbose=0, callbacks=[tfl.callbacks.LyapunovMonitor(design)]
)
proof = tfl.certify(model, x[1500:], y[1500:])
print(
    "claimed gain",
    round(claim.gain, 3),
    " proved for this network",
    round(proof.gain_upper_bound, 3),
)
print(f"proved right within 0.2: {proof.certified_accuracy(0.2):.1%}")

# %% [markdown]
# ## Which indices did the layers get?
#
# `layer_indices` solves the matrix inequality of a trained layer: for a given δ the largest ν that can be proved.
#
# $$\begin{bmatrix} \Lambda - \delta I & \tfrac12 I - m \Lambda W \\ (\tfrac12 I - m\Lambda W)^\top & p\,W^\top\Lambda W - \nu I
# \end{bmatrix} \succeq 0, \qquad m = \tfrac{\alpha+\beta}{2},\quad p = \alpha\beta$$

# %%
for layer in (model.layers[0], model.layers[2]):
    found = tfl.layer_indices(layer, leaky, delta=0.4, progress=False)
    print(f"{layer.name}: δ = 0.4, ν ≥ {found.nu:.4f}")

# %% [markdown]
# ## What (δ, ν) cannot say
#
# For ReLU networks ν > 0 is empty, and a classifier with fewer outputs than inputs never has ν > 0: the design says so,
# with the nearest claims that are possible, instead of returning budgets that prove nothing.

# %%
try:
    tfl.spectral_design(
        tfl.Indices(delta=0.4, nu=0.2), sectors=[tfl.Sector.of("relu")] * 2, widths=[64, 32, 10]
    )
except DesignInfeasible as error:
    print(error)
