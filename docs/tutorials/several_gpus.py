# %% [markdown]
# # Several GPUs
#
# [![Run in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tf-lyapunov/tf_lyapunov/blob/main/docs/tutorials/several_gpus.ipynb)
#
# The guarantee holds on any number of devices: constraints act on the same weights on every replica. Here two *logical* CPU
# devices stand for two GPUs, so that the notebook runs anywhere; on a machine with GPUs leave the first cell out.

# %% tags=["skip-execution"]
# In Colab, or wherever the library is not installed:
# %pip install -q "tf_lyapunov[tensorflow,datasets] @ git+https://github.com/tf-lyapunov/tf_lyapunov"

# %%
import tensorflow as tf

tf.get_logger().setLevel("ERROR")  # not every collective operation is news

# Before anything else uses TensorFlow: one processor as two devices.
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(
    ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
)  # on GPUs: tf.distribute.MirroredStrategy()
print("replicas:", strategy.num_replicas_in_sync)

# %%
import keras
from sklearn.datasets import load_digits

import tf_lyapunov as tfl

keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")  # pixels in [0, 1]
x_train, y_train, x_test, y_test = x[:1500], y[:1500], x[1500:], y[1500:]

# %% [markdown]
# Model, constraints and optimizer are made within the strategy; `fit` divides every batch among the replicas.

# %%
design = tfl.spectral_design(gain=1.0, sectors=[tfl.Sector.of("relu"), tfl.Sector.linear()])
with strategy.scope():
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    )
    tfl.constrain(model, design)
    model.compile("adam", tfl.losses.TemperatureCrossEntropy(temperature=0.1), metrics=["accuracy"])
history = model.fit(
    x_train, y_train, batch_size=128, epochs=10, verbose=0,
    callbacks=[tfl.callbacks.LyapunovMonitor(design)],
)  # fmt: skip
print(
    "proved gain after each epoch:", [round(g, 4) for g in history.history["gain_upper_bound"]][-3:]
)

# %% [markdown]
# ## The same weights on every replica, and one certificate

# %%
first, second = (model.layers[0].kernel.value.values[i].numpy() for i in (0, 1))
print("replicas agree bit by bit:", bool((first == second).all()))
proof = tfl.certify(model, x_test, y_test)
print(
    "gain:",
    proof.gain_upper_bound,
    f" proved right within 0.2: {proof.certified_accuracy(0.2):.1%}",
)
assert proof.gain_upper_bound <= 1.0

# %% [markdown]
# ## From the command line
#
# An experiment file runs on all devices with one option, survives a kill, and trains to the weights of one device
# but for rounding ([at scale](../scale.md#several-devices-several-machines)):
#
# ```
# tf-lyapunov train lyapunov/digits --strategy mirrored --devices 2
# tf-lyapunov train lyapunov/digits --strategy mirrored --devices 2 --resume
# KERAS_BACKEND=jax tf-lyapunov train lyapunov/digits --strategy mirrored --devices 2
# ```
#
# What would it take on other machines? `plan` counts, and trains nothing:

# %%
from tf_lyapunov.experiments.reading import load_config
from tf_lyapunov.planning import parse_devices, plan

found = plan(load_config("lyapunov/digits"), parse_devices("8xH100"))
print("parameters:", sum(layer.parameters for layer in found.costs))
print("steps an epoch:", found.chosen.steps_per_epoch)
