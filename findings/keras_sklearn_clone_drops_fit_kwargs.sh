#!/usr/bin/env bash
# Keras 3.15.1 with scikit-learn 1.9.1: `keras.wrappers.SKLearnClassifier(model, fit_kwargs={"epochs": n})`
# trains n epochs when it is fitted itself. In `cross_val_score` and `GridSearchCV`, which fit clones, it
# trains one: `sklearn.base.clone` of the wrapper returns one without `fit_kwargs`.
#
# Expected: a clone has all constructor arguments, as of every scikit-learn estimator, so that a search
# compares models that were trained as the final one is.
# Seen: batch size, epochs and callbacks fall back to Keras' defaults in every fold, without a warning.
# Whoever searches budgets or other settings so must pass the arguments through the search's `fit`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  keras==3.15.1 jax==0.10.2 scikit-learn==1.9.1
cd "$folder"
KERAS_BACKEND=jax "$folder/env/bin/python" - <<'END'
import keras
import numpy as np
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

epochs = []


class Count(keras.callbacks.Callback):
    def on_train_end(self, logs=None):
        epochs.append(self.params["epochs"])


def build(X, y, units):
    layers = [keras.Input(X.shape[1:]), keras.layers.Dense(units, "relu"), keras.layers.Dense(y.shape[1])]
    model = keras.Sequential(layers)
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    # Counts the epochs of every fit, whoever asks for it.
    fit = model.fit
    model.fit = lambda *a, **k: fit(*a, **{"verbose": 0, **k, "callbacks": [Count()]})
    return model


rng = np.random.default_rng(0)
x, y = rng.normal(size=(40, 3)).astype("float32"), rng.integers(0, 2, 40)
wrapper = keras.wrappers.SKLearnClassifier(
    build, model_kwargs={"units": 2}, fit_kwargs={"epochs": 5, "verbose": 0}
)
print("keras", keras.__version__)
wrapper.fit(x, y)
alone, epochs[:] = list(epochs), []
print("fitted itself: epochs", alone)
print("fit_kwargs of the wrapper and of its clone:", wrapper.fit_kwargs, clone(wrapper).fit_kwargs)
grid = {"model_kwargs": [{"units": 2}, {"units": 3}]}
search = GridSearchCV(wrapper, grid, scoring=lambda model, x, y: 0.0, cv=2, refit=False)
search.fit(x, y)
folds, epochs[:] = list(epochs), []
print("in a search: epochs of every fold", folds)
search.fit(x, y, epochs=5)
print("with epochs=5 given to the search's fit:", epochs)
assert alone == [5] and clone(wrapper).fit_kwargs is None, "changed"
assert folds == [1] * 4 and epochs == [5] * 4, "changed"
END
