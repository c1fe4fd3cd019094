# %% [markdown]
# # MATLAB and back
#
# [![Run in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tf-lyapunov/tf_lyapunov/blob/main/docs/tutorials/matlab_round_trip.ipynb)
#
# Weights, the design and the certificate go to a `.mat` file, which MATLAB and GNU Octave read without YALMIP or MOSEK; what
# comes back is checked against the model. `matlab_compat/` in the repository holds the functions for the other side.

# %% tags=["skip-execution"]
# In Colab, or wherever the library is not installed:
# %pip install -q "tf_lyapunov[tensorflow,datasets] @ git+https://github.com/tf-lyapunov/tf_lyapunov"

# %%
import keras
from sklearn.datasets import load_digits

import tf_lyapunov as tfl

keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")  # pixels in [0, 1]
x_train, y_train, x_test, y_test = x[:1500], y[:1500], x[1500:], y[1500:]

# %%
leaky, linear = tfl.Sector.of("leaky_relu", negative_slope=0.1), tfl.Sector.linear()
design = tfl.spectral_design(tfl.Indices(delta=0.4, nu=-2.0), sectors=[leaky, linear])
model = keras.Sequential(
    [keras.Input((64,)), keras.layers.Dense(16), keras.layers.LeakyReLU(negative_slope=0.1),
     keras.layers.Dense(10)]
)  # fmt: skip
tfl.constrain(model, design)
model.compile("adam", tfl.losses.TemperatureCrossEntropy(temperature=0.1))
model.fit(x_train, y_train, epochs=10, verbose=0)
proof = tfl.certify(model, x_test, y_test)

# %% [markdown]
# ## Out

# %%
import pathlib
import tempfile

from tf_lyapunov.matlab import export_mat, import_mat

folder = pathlib.Path(tempfile.mkdtemp())
export_mat(folder / "network.mat", model=model, design=design, certificate=proof)
print((folder / "network.mat").stat().st_size, "bytes")
# from the shell: tf-lyapunov export-mat RUN network.mat

# %% [markdown]
# In MATLAB or Octave, with `matlab_compat/` of the repository on the path:
#
# ```matlab
# addpath matlab_compat
# [nu, delta, sn, kc] = get_indexes(-2, 0.4, [0.1 1], [1 1]);   % claim -> spectral bounds
# [proved, report] = check_certificate('network.mat');          % norms and gains, computed again there
# ```
#
# Where Octave is installed and the repository is the working directory, this runs it:

# %%
import shutil
import subprocess

script = f"addpath matlab_compat; check_certificate('{folder / 'network.mat'}');"
if shutil.which("octave-cli") and pathlib.Path("matlab_compat").exists():
    shown = subprocess.run(
        ["octave-cli", "--no-history", "--norc", "--eval", script], capture_output=True, text=True
    )
    print((shown.stdout or shown.stderr).replace(str(folder), "FOLDER"))
else:
    print("no Octave here; in MATLAB:", script)

# %% [markdown]
# ## Back

# %%
back = import_mat(folder / "network.mat")
print(back.design.verdict, [round(budget, 4) for budget in back.design.budgets])
weights = model.get_weights()
back.assign_to(model)  # edited weights void the certificate: certify again
print(
    "the same weights:",
    all((a == b).all() for a, b in zip(weights, model.get_weights(), strict=True)),
)

# %% [markdown]
# Networks that other tools wrote (chains of dense layers as cell arrays, structs or variables in order) come in with
# `tf-lyapunov import-mat theirs.mat --weights weights --biases biases --activation relu --out theirs.keras`; see
# [certificates](../certificates.md).
