# %% [markdown]
# # Tighter than products, and proof files
#
# [![Run in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tf-lyapunov/tf_lyapunov/blob/main/docs/tutorials/tighter_certificates.ipynb)
#
# The product of norms bounds the gain of a network as if the worst input of every layer were the worst output of the one
# before. Other methods look at layers together (`liplt`, `eclipse`, `lipsdp`), or at the ball around each input (`linear`).
# The weights stay the same; the radii grow. What was proved can be written to a file that another program re-checks.

# %% tags=["skip-execution"]
# In Colab, or wherever the library is not installed:
# %pip install -q "tf_lyapunov[tensorflow,datasets,sdp,report] @ git+https://github.com/tf-lyapunov/tf_lyapunov"

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
    [keras.Input((64,)), keras.layers.Dense(24, "relu"), keras.layers.Dense(16, "relu"),
     keras.layers.Dense(10)]
)  # fmt: skip
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(x_train, y_train, epochs=15, verbose=0)
images, labels = x_test[:12], y_test[:12]

# %% [markdown]
# ## Methods
#
# `lipsdp` finds multipliers $\Lambda = \operatorname{diag}(\lambda) \succeq 0$ of the activations' slopes that make a matrix
# inequality hold; whatever the solver says, the inequality is then verified in float64:
#
# $$\begin{bmatrix} \rho I + 2\alpha\beta\,W_0^\top \Lambda W_0 & -(\alpha+\beta) W_0^\top \Lambda \\
# -(\alpha+\beta)\Lambda W_0 & 2\Lambda - W_1^\top W_1 \end{bmatrix} \succeq 0
# \quad\Longrightarrow\quad L \le \sqrt\rho$$

# %%
for method in ("composition", "liplt", "eclipse", "lipsdp", "linear"):
    proof = tfl.certify(model, images, labels, method=method, time_budget=10)
    radius = float(np.median(proof.radius))
    print(
        f"{method:12} median radius {radius:.4f}   right within 0.15: {proof.certified_accuracy(0.15):.0%}"
    )

# %% [markdown]
# `method="auto"` tries what fits the network and keeps the best of all for every input. How long each takes depends on the
# widths: [benchmarks](../benchmarks.md).

# %%
best = tfl.certify(model, images, labels, method="auto", time_budget=10)
print("auto: median radius", float(np.median(best.radius)).__round__(4))
attack = tfl.attacks.DDN(steps=100)(model, images, labels)
print("an attack needs     ", float(np.nanmedian(attack.distance)).__round__(4))

# %% [markdown]
# ## A proof file
#
# `save("….npz")` writes the multipliers. `tf-lyapunov verify` re-derives every bound from the file and the model's weights
# with outward-rounded arithmetic, in code that shares nothing with the search: NumPy, no solver.

# %%
import pathlib
import tempfile

from tf_lyapunov.verification import verify

folder = pathlib.Path(tempfile.mkdtemp())
model.save(folder / "model.keras")
proof.save(folder / "proof.npz")
print(verify(folder / "proof.npz", model))
# the same from the shell: tf-lyapunov verify proof.npz model.keras

# %% [markdown]
# A model that is not the one of the proof is refused:

# %%
weights = model.get_weights()
model.set_weights([w * 1.01 for w in weights])
print(verify(folder / "proof.npz", model))
model.set_weights(weights)
