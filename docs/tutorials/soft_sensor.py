# %% [markdown]
# # A soft sensor with a proved gain
#
# [![Run in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tf-lyapunov/tf_lyapunov/blob/main/docs/tutorials/soft_sensor.ipynb)
#
# Two tanks in a row, and a level that nobody measures. A recurrent network estimates it from the pump's voltage and the first
# tank's level, both noisy. Two are trained on the same data: a contracting recurrent equilibrium network, of which it is proved
# that it forgets its initial state and how far noise can move it, and Keras' LSTM, of which nothing is known but its error.

# %% tags=["skip-execution"]
# In Colab, or wherever the library is not installed:
# %pip install -q "tf_lyapunov[tensorflow,sdp] @ git+https://github.com/tf-lyapunov/tf_lyapunov"

# %%
import keras
import numpy as np

import tf_lyapunov as tfl
from tf_lyapunov.dynamics import Contracting, certify_dynamics

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)

# %% [markdown]
# ## The plant
#
# Torricelli's law: the flow out of a tank goes with the root of its level. The pump's voltage is held for some steps and then
# changes at random. What is estimated is the second level, less its mean.


# %%
def simulated(count, steps=100, noise=0.02):
    """Inputs (count, steps, 2), noisy, and the second level (count, steps, 1)."""
    pump = np.repeat(rng.uniform(0.3, 1.0, (count, steps // 10)), 10, axis=1)
    levels, seen, wanted = rng.uniform(0.2, 0.8, (count, 2)), [], []
    for voltage in pump.T:
        seen.append(np.stack([voltage, levels[:, 0]], axis=1))
        wanted.append(levels[:, 1:])
        flows = 0.25 * np.sqrt(np.maximum(levels, 0.0))
        into = np.stack([0.25 * voltage, flows[:, 0]], axis=1)
        levels = np.maximum(levels + 0.5 * (into - flows), 0.0)
    x, y = np.stack(seen, axis=1) - 0.5, np.stack(wanted, axis=1) - 0.5
    return (x + noise * rng.normal(size=x.shape)).astype("float32"), y.astype("float32")


x, y = simulated(40)
x_test, y_test = simulated(40)

# %% [markdown]
# ## Two estimators of eight states
#
# `Contracting(0.99)`: at every value of the weights, two states approach each other by at least one percent a step, in a metric
# that is trained too.


# %%
def trained(layer):
    model = keras.Sequential([keras.Input((None, 2)), layer, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, y, batch_size=10, epochs=40, verbose=0)
    return model


sensor = tfl.layers.RecurrentEquilibrium(
    4, states=8, supply=Contracting(0.99), blocks=1, return_sequences=True
)
network = trained(sensor)
lstm = trained(keras.layers.LSTM(8, return_sequences=True))


def error(model, x, y):
    """Root of the mean square, once the first 20 steps are over."""
    return float(np.sqrt(np.mean((model.predict(x, verbose=0) - y)[:, 20:] ** 2)))


print(f"error of the equilibrium network: {error(network, x_test, y_test):.4f}")
print(f"error of the LSTM:                {error(lstm, x_test, y_test):.4f}")
print(f"the level itself varies by        {np.std(y_test):.4f}")

# %% [markdown]
# ## What is proved of the first
#
# The gain is that of the whole estimator, over sequences of every length: noise of l2 norm r on the measurements moves the
# estimates by no more than gain · r. It is read of the float32 weights and proved by a matrix inequality with outward rounding.

# %%
proof = certify_dynamics(network)
forgetting = certify_dynamics(sensor, claim=Contracting(0.99))
print(proof)
print(forgetting.verdict, f"contraction at rate {forgetting.rate:.5f} a step")

# %% [markdown]
# From below: the largest change that a random search finds, in both networks. That of the first stays under its bound; that of
# the second is only what was found.


# %%
def found(model, x, size=0.1, rounds=15):
    """Largest ‖Δy‖/‖Δu‖ found around sequences, uphill from random changes."""
    kept, best = rng.normal(size=x.shape), np.zeros(len(x))
    before = model.predict(x, verbose=0)
    for _ in range(rounds):
        change = kept + 0.3 * np.linalg.norm(kept) / np.sqrt(kept.size) * rng.normal(size=x.shape)
        change *= size / np.sqrt(np.sum(change**2, axis=(1, 2), keepdims=True))
        moved = model.predict((x + change).astype("float32"), verbose=0) - before
        ratio = np.sqrt(np.sum(moved**2, axis=(1, 2))) / size
        kept = np.where((ratio > best)[:, None, None], change, kept)
        best = np.maximum(best, ratio)
    return float(np.max(best))


print(f"equilibrium network: {found(network, x_test[:8]):.3f} <= {float(proof):.3f}")
print(f"LSTM:                {found(lstm, x_test[:8]):.3f}, bound: none")

# %% [markdown]
# ## A sensor that jumps
#
# At step 40 the level's measurement is off by ten times what training has shown, for five steps. The equilibrium network must
# come back, by its proof.

# %%
import matplotlib.pyplot as plt

one, truth = x_test[:1].copy(), y_test[0, :, 0]
jumped = one.copy()
jumped[0, 40:45, 1] += 5.0
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for axis, name, model in zip(axes, ("equilibrium", "LSTM"), (network, lstm), strict=True):
    axis.plot(truth, color="0.5", label="level")
    axis.plot(model.predict(one, verbose=0)[0, :, 0], label="estimate")
    axis.plot(model.predict(jumped, verbose=0)[0, :, 0], label="with the jump")
    axis.set(title=name, xlabel="step")
axes[0].legend()
plt.show()

# %% [markdown]
# The claim can travel with the model: `proof.save("sensor.npz")` writes a proof file, which `tf-lyapunov verify` re-checks from
# the weights with NumPy alone. [Systems with memory](../howto/memory.md) has the rest.

# %%
import pathlib
import tempfile

folder = pathlib.Path(tempfile.mkdtemp())
proof.save(folder / "sensor.npz")
print(tfl.verification.verify(folder / "sensor.npz", network))
