"""Writes the golden files that run_tests.m compares with:  python matlab_compat/make_golden.py

Everything comes from the public functions of tf_lyapunov and fixed seeds of NumPy.
"""

from __future__ import annotations

import argparse
import io
import pathlib

import numpy as np
from scipy.io import savemat

from tf_lyapunov.bounds.layer_indices import layer_indices
from tf_lyapunov.design import spectral_design
from tf_lyapunov.errors import DesignInfeasible
from tf_lyapunov.matlab import export_mat, map_record
from tf_lyapunov.theory.cascade import allowed_gain_product, cascade_matrix, scaled_cascade_matrix
from tf_lyapunov.theory.dissipativity import (
    gain_budget,
    get_indexes_budget,
    theorem_1_matrix,
    theorem_4_budget,
)
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap, convolution_matrix
from tf_lyapunov.theory.sectors import Indices, Sector
from tf_lyapunov.theory.spectra import smallest_eigenvalue

FOLDER = pathlib.Path(__file__).resolve().parent / "golden"
RELU, LEAKY, LINEAR, GELU = Sector(0, 1), Sector(0.1, 1), Sector(1, 1), Sector(-0.13, 1.13)

# (claim, sectors): paper 2's, its quoted cone, one layer, many layers, slopes outside [0, 1], and
# claims with extreme indices.
DESIGNS = (
    (Indices(0.4, -2.0), (LEAKY, LEAKY, LINEAR)),
    (Indices(4.0, -0.4), (LEAKY, LEAKY, LINEAR)),
    (Indices(0.525, -0.476), (LEAKY,)),
    (Indices(1.0, -6.0), (RELU, GELU)),
    (Indices(1e3, -1e-3), (RELU,) * 5),
    (Indices(1e-3, -5.0), (RELU, Sector(0, 0.25), LINEAR)),
    (Indices(0.25, -0.75), (LEAKY,) * 20),
)
# (claim, layers, weights): the papers' test, one layer, a singular case, mixed signs.
CASCADES = (
    (Indices(1.0, 0.0), (Indices(1.0, 0.1), Indices(2.0, 0.1)), (1.0, 1.0)),
    (Indices(0.2, -1.0), (Indices(1.0, -0.6),), (0.7,)),
    (Indices(0.5, -2.0), (Indices(1.0, -1.0), Indices(1.0, -1.0)), (0.5, 2.0)),
    (Indices(0.85, 0.29), (Indices(0.74, 0.33),) * 4 + (Indices(0.86, 0.29),), (1.0,) * 5),
    (Indices(0.89, 0.28), (Indices(0.253, 0.98), Indices(0.551, 0.45), Indices(1.597, 0.15)),
     (1.0, 1.1, 0.9)),
)  # fmt: skip


def designs():
    """Claims with what Python's sound rule makes of them."""
    for claim, sectors in DESIGNS:
        design = spectral_design(claim, sectors)
        product = np.prod([b * s.magnitude for b, s in zip(design.budgets, sectors, strict=True)])
        allowed = allowed_gain_product(claim)
        yield {
            "nu": claim.nu,
            "delta": claim.delta,
            "k1": np.array([s.alpha for s in sectors]),
            "k2": np.array([s.beta for s in sectors]),
            "kc": np.array(claim.slopes),
            "gain": claim.gain,
            "sn_vec": np.array(design.budgets),
            "allowed": allowed,
            "reserve": 1 - product / allowed,
        }


def infeasible():
    """Claims with nu >= 0, and the nearest ones that Python offers, as rows (nu, delta)."""
    for claim in (Indices(0.89, 0.28), Indices(2.0, 0.0)):
        try:
            spectral_design(claim, [RELU] * 3, widths=(4, 3, 3, 2))
        except DesignInfeasible as error:
            nearest = np.array([[c.nu, c.delta] for c in error.nearest])
            yield {"nu": claim.nu, "delta": claim.delta, "nearest": nearest}


def cascades():
    """Cascade matrices with their smallest eigenvalues."""
    for claim, layers, weights in CASCADES:
        m = scaled_cascade_matrix(claim, layers, weights)
        value, bound = smallest_eigenvalue(m)
        yield {
            "nu": claim.nu,
            "delta": claim.delta,
            "nu_vec": np.array([layer.nu for layer in layers]),
            "delta_vec": np.array([layer.delta for layer in layers]),
            "p_vec": np.array(weights),
            "A": cascade_matrix(claim, layers),
            "M": m,
            "value": value,
            "bound": bound,
        }


def bounds():
    """Layer indices with the sound bound, the released script's and Theorem 4's."""
    for layer, sector in (
        (Indices(0.525, -0.476), LEAKY),
        (Indices(0.5, -1.5), RELU),
        (Indices(0.4, -2.0), LINEAR),
        (Indices(1e3, -1e-2), GELU),
    ):
        sound_4 = sector.alpha >= 0
        yield {
            "nu": layer.nu,
            "delta": layer.delta,
            "k1": sector.alpha,
            "k2": sector.beta,
            "sn": gain_budget(layer, sector),
            "sn_script": get_indexes_budget(layer, sector),
            "sn_theorem_4": theorem_4_budget(layer, sector) if sound_4 else np.nan,
        }


def lmis():
    """Matrices of Theorem 1 for square, wide and tall layers."""
    rng = np.random.default_rng(7)
    for shape, sector, layer in (
        ((3, 3), LEAKY, Indices(0.525, -0.476)),
        ((2, 4), RELU, Indices(1.0, -2.0)),
        ((4, 2), GELU, Indices(2.0, -1.0)),
        ((3, 3), LINEAR, Indices(0.5, 0.3)),
        ((2, 2), RELU, Indices(1.0, -2.0)),
    ):
        weight = rng.standard_normal(shape) / 8
        if sector is LINEAR:
            weight = np.eye(3) + weight / 8
        if shape == (2, 2):
            weight = -1.1 * np.eye(2)  # the claim allows a norm of 1
        lam = rng.uniform(0.5, 4.0, shape[0])
        m = theorem_1_matrix(weight, sector, layer, lam)
        value, bound = smallest_eigenvalue(m)
        yield {
            "W": weight,
            "alpha": sector.alpha,
            "beta": sector.beta,
            "delta": layer.delta,
            "nu": layer.nu,
            "Lambda": lam,
            "M": m,
            "value": value,
            "bound": bound,
        }


def indices():
    """Largest nu for a given delta by one multiplier per output: square, wide and tall layers."""
    rng = np.random.default_rng(11)
    for shape, sector, delta in (
        ((3, 3), LEAKY, 0.525),
        ((2, 4), RELU, 1.0),
        ((4, 2), GELU, 0.0),
        ((5, 5), RELU, -0.2),
        ((3, 4), LINEAR, 0.3),
        ((4, 3), RELU, 2.0),
    ):
        weight = np.eye(*shape) + rng.standard_normal(shape) / 2
        if shape == (4, 3):
            weight[1] = 0.0  # its multiplier has no optimum: the larger the better
        found = layer_indices(weight.T, sector, delta=delta)
        yield {
            "W": weight,
            "alpha": sector.alpha,
            "beta": sector.beta,
            "delta": delta,
            "nu": found.nu,
            "gain": np.linalg.norm(weight, 2) * sector.magnitude,
        }


MAPS = (
    ("dense", (4, 3), LinearMap("dense", (4,))),
    ("conv1d", (3, 2, 3), LinearMap("conv", (7, 2), padding="causal", dilation=2)),
    ("conv2d_same", (3, 2, 2, 3), LinearMap("conv", (5, 4, 2), padding="same")),
    ("conv2d_strided", (3, 3, 1, 2), LinearMap("conv", (6, 5, 1), strides=2, padding="same")),
    ("conv2d_grouped", (2, 2, 1, 4), LinearMap("conv", (4, 4, 2), groups=2)),
    ("conv2d_one_output", (3, 3, 2, 1), LinearMap("conv", (5, 5, 2))),
    ("conv3d", (2, 2, 2, 1, 2), LinearMap("conv", (3, 4, 3, 1), padding="same")),
    ("depthwise", (3, 3, 2, 2), LinearMap("depthwise", (5, 5, 2), strides=2)),
    ("transposed", (3, 3, 2, 3), LinearMap("conv_transpose", (3, 4, 3), strides=2, padding="same")),
    ("conv1d_large", (5, 2, 2), LinearMap("conv", (1800, 2), padding="same", strides=2)),
    ("causal_large", (4, 2, 2), LinearMap("conv", (801, 2), padding="causal", dilation=3)),
    ("transposed_large", (3, 2, 2, 2), LinearMap("conv_transpose", (30, 30, 2), strides=(2, 1))),
    ("conv2d_large", (3, 3, 3, 2), LinearMap("conv", (16, 60, 3), padding="same")),
    ("conv3d_large", (3, 2, 2, 2, 2), LinearMap("conv", (10, 10, 9, 2), padding="same")),
)


def maps():
    """Linear maps of every kind with matrix (small ones) and norm; the last ones by frequency."""
    for seed, (name, shape, linear_map) in enumerate(MAPS):
        # One seed each: the largest gains then lie at frequencies inside (0, 1/2), where an error
        # in the period or the dilation shows.
        kernel = np.random.default_rng(seed).standard_normal(shape)
        small = not name.endswith("large")
        # Octave's choice, whatever is fastest in Python.
        method = "auto" if linear_map.kind == "dense" else "materialised" if small else "frequency"
        bound = norm_upper_bound(kernel, linear_map, method=method)
        matrix = convolution_matrix(kernel, linear_map).toarray() if small else np.zeros((0, 0))
        yield {
            "map": map_record(name, name, kernel, linear_map),
            "matrix": matrix,
            "upper": bound.value,
            "method": bound.method,
        }


def dense_network():
    """A constrained 6-5-4-3 network with its design and certificate, both proved."""
    import keras

    from tf_lyapunov.certification import certify

    rng = np.random.default_rng(5)
    design = spectral_design(Indices(0.4, -2.0), [LEAKY, LEAKY, LINEAR])
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6,), name="image"),
            layers.Dense(5, name="first"),
            layers.LeakyReLU(0.1, name="first_slope"),
            layers.Dense(4, name="second"),
            layers.LeakyReLU(0.1, name="second_slope"),
            layers.Dense(3, name="logits"),
            layers.Softmax(name="softmax"),
        ],
        name="golden",
    )
    for name, budget in zip(("first", "second", "logits"), design.budgets, strict=True):
        layer = model.get_layer(name)
        kernel = rng.standard_normal(layer.kernel.shape)
        # 2⁻²⁰ keeps the kernel within its budget after rounding to float32.
        kernel *= budget * (1 - 2.0**-20) / np.linalg.norm(kernel, 2)
        layer.set_weights([kernel, 0.1 * rng.standard_normal(kernel.shape[1])])
    x = rng.standard_normal((8, 6)).astype("float32")
    return {"model": model, "design": design, "certificate": certify(model, x)}


def branched_network():
    """Convolutions, folded batch normalization, pooling, a residual sum and a concatenation."""
    import keras

    from tf_lyapunov.certification import certify

    layers = keras.layers
    image = keras.Input((6, 6, 2), name="image")
    h = layers.Conv2D(3, 3, padding="same", use_bias=False, name="conv")(image)
    h = layers.BatchNormalization(name="folded")(h)
    h = layers.ReLU(name="relu")(h)
    branch = layers.SeparableConv2D(3, 3, padding="same", activation="tanh", name="separable")(h)
    h = layers.Add(name="residual")([h, branch])
    h = layers.MaxPooling2D(3, 2, name="pool")(h)
    flat = layers.Flatten(name="flat")(h)
    sides = [layers.Dense(3, name="left")(flat), layers.Dense(2, name="right")(flat)]
    out = layers.Dense(4, name="logits")(layers.Concatenate(name="both")(sides))
    model = keras.Model(image, out, name="branched")
    rng = np.random.default_rng(3)
    weights = [rng.standard_normal(w.shape) / 4 for w in model.get_weights()]
    model.set_weights(weights)
    norm = model.get_layer("folded")
    norm.set_weights([np.array([0.5, 1.0, -2.0]), np.zeros(3), np.ones(3), np.full(3, 0.7)])
    x = rng.standard_normal((4, 6, 6, 2)).astype("float32")
    return {"model": model, "certificate": certify(model, x)}


def conic_network():
    """Square layers near the identity with a claim of nu > 0, proved by the conic rule."""
    import keras

    rng = np.random.default_rng(9)
    sector = Sector(0.8, 1.0)
    design = spectral_design(Indices.from_slopes(0.2, 2.0), [sector, sector])
    layers = [keras.Input((4,), name="signal")]
    for k, (center, radius) in enumerate(design.balls):
        layers.append(keras.layers.Dense(4, name=f"square_{k}"))
        layers.append(keras.layers.LeakyReLU(0.8, name=f"slope_{k}"))
        noise = rng.standard_normal((4, 4))
        noise *= radius * (1 - 2.0**-10) / np.linalg.norm(noise, 2)
        layers[-2].build((None, 4))
        layers[-2].set_weights([center * np.eye(4) + noise, np.zeros(4)])
    model = keras.Sequential(layers, name="conic")
    return {"model": model, "design": design}


def write(folder=FOLDER):
    """Writes all golden files into `folder`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    theory = {
        name: cell(list(make()))
        for name, make in (
            ("designs", designs),
            ("infeasible", infeasible),
            ("cascades", cascades),
            ("bounds", bounds),
            ("lmis", lmis),
            ("indices", indices),
        )
    }
    save(folder / "theory.mat", theory)
    save(folder / "maps.mat", {"maps": cell(list(maps()))})
    export_mat(folder / "dense_network.mat", **dense_network())
    export_mat(folder / "branched_network.mat", **branched_network())
    export_mat(folder / "conic_network.mat", **conic_network())


def cell(items):
    """A list as a MATLAB cell array."""
    array = np.empty((1, len(items)), dtype=object)
    array[0, :] = items
    return array


def save(path, content):
    """A .mat file whose header holds no date."""
    buffer = io.BytesIO()
    savemat(buffer, content, do_compression=True, oned_as="row", long_field_names=True)
    header = b"MATLAB 5.0 MAT-file, written by make_golden.py".ljust(116)
    path.write_bytes(header + buffer.getvalue()[116:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=FOLDER, type=pathlib.Path, help="folder to write into")
    write(parser.parse_args().out)
