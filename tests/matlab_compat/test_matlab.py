"""Export to and import from `.mat` files, without Octave."""

import dataclasses
import pathlib
import subprocess
import sys
import zlib

import keras
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from tf_lyapunov import matlab
from tf_lyapunov.bounds.composition import Contribution
from tf_lyapunov.certification import Certificate, certify, lipschitz_upper_bound, read_network
from tf_lyapunov.design import Design, equal_gain_design, spectral_design
from tf_lyapunov.errors import ModelFileError, UnsupportedLayerError
from tf_lyapunov.matlab import MatFile, container, export_mat, import_mat
from tf_lyapunov.theory.sectors import Indices, Sector

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "matlab_compat" / "golden"
LEAKY, LINEAR = Sector(0.1, 1.0), Sector(1.0, 1.0)


def _designs():
    return [
        spectral_design(Indices(0.4, -2.0), [LEAKY, LEAKY, LINEAR]),
        spectral_design(Indices(0.4, -2.0), [LEAKY]),
        equal_gain_design(1.5, [LEAKY, LINEAR], weights=[2.0, 1.0]),
        spectral_design(Indices.from_slopes(0.2, 2.0), [Sector(0.8, 1.0)] * 2),
        spectral_design(Indices(0.89, 0.28), [LEAKY] * 3, rule="lyapunov"),
        spectral_design(
            Indices(0.4, -2.0), [LEAKY] * 2, rule="dissipativity", smallest_singular_values=[0.1, 0]
        ),
    ]


@pytest.fixture
def network():
    layers = keras.layers
    image = keras.Input((6, 6, 2))
    h = layers.Conv2D(4, 3, strides=2, padding="same", groups=2, name="grouped")(image)
    h = layers.BatchNormalization()(h)
    h = layers.ReLU()(h)
    h = layers.Conv2DTranspose(2, 3, strides=2, padding="same", activation="tanh")(h)
    h = layers.DepthwiseConv2D(3, depth_multiplier=2)(h)
    h = layers.SeparableConv2D(1, 2, activation="elu")(h)
    h = layers.Flatten()(h)
    out = layers.Dense(1)(h)
    return keras.Model(image, out)


@pytest.fixture
def exported(tmp_path, network):
    path = tmp_path / "network.mat"
    x = np.random.default_rng(0).standard_normal((3, 6, 6, 2)).astype("float32")
    certificate = certify(network, x)
    export_mat(path, model=network, certificate=certificate)
    return path, network, certificate


@pytest.mark.parametrize("design", _designs(), ids=lambda d: f"{d.rule}-{d.target_gain}")
def test_a_design_of_every_rule_survives_the_round_trip(tmp_path, design):
    export_mat(tmp_path / "design.mat", design=design)
    found = import_mat(tmp_path / "design.mat")
    assert found.design == design and found.design.to_json() == design.to_json()
    assert found.certificate is None and found.weights is None


def test_every_constructor_argument_of_a_design_is_exported():
    # A field that is added to Design must be added to the file too, or proofs would be lost.
    assert {f.name for f in dataclasses.fields(Design) if f.init} == {
        "claim", "sectors", "rule", "budgets", "indices", "variant", "balls",
        "smallest_singular_values", "target_gain", "scaling",
    }  # fmt: skip


def test_a_stored_verdict_is_not_believed(tmp_path):
    design = spectral_design(Indices(0.4, -2.0), [LEAKY] * 2)
    export_mat(tmp_path / "design.mat", design=design)
    content = loadmat(tmp_path / "design.mat")
    content["design"]["sn_vec"][0, 0] = 10 * content["design"]["sn_vec"][0, 0]
    _save(tmp_path / "changed.mat", content)
    found = import_mat(tmp_path / "changed.mat").design
    assert design.is_proved and not found.is_proved


def test_a_certificate_survives_the_round_trip_in_every_field(tmp_path):
    certificate = Certificate(
        radius=np.array([0.1, 0.0, np.inf]),
        predictions=np.array([2, 0, 1]),
        labels=np.array([2, 1, 1]),
        margins=np.array([1 / 3, -2.0, np.inf]),
        gain_upper_bound=2 / 3,
        contributions=(
            Contribution("input", "input", 1.0, 1.0, "model input"),
            Contribution(
                'dénse "1\\2"', "linear", 0.7, 2 / 3, "svd, γ ≤ 1", "declared", ("input",)
            ),
        ),
        assumptions=("exact arithmetic – on the stored weights", "‖e‖ finite"),
        method="composition",
        verdict="PROVED",
        float_allowance=1e-6,
        model_digest="sha256:0",
    )
    export_mat(tmp_path / "certificate.mat", certificate=certificate)
    found = import_mat(tmp_path / "certificate.mat").certificate
    for field in dataclasses.fields(Certificate):
        expected, value = getattr(certificate, field.name), getattr(found, field.name)
        if isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(value, expected, strict=True)
        else:
            assert value == expected, field.name


def test_one_input_and_no_layers_are_not_mistaken_for_scalars(tmp_path):
    one = np.array([1.0])
    certificate = Certificate(one, one, one, one, 1.0, (), (), "m", "PROVED", 0.0, "")
    export_mat(tmp_path / "certificate.mat", certificate=certificate)
    found = import_mat(tmp_path / "certificate.mat").certificate
    assert found.to_json() == certificate.to_json()


def test_weights_return_bit_for_bit(exported):
    path, network, certificate = exported
    before = [np.array(v) for v in network.get_weights()]
    for variable in network.weights:
        variable.assign(np.zeros(variable.shape))
    found = import_mat(path)
    assert found.assign_to(network) is network
    for a, b in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    assert found.certificate.to_json() == certificate.to_json()
    assert found.model_digest == certificate.model_digest == read_network(network).digest()


def test_the_file_holds_what_a_checker_needs(exported):
    path, network, _ = exported
    content = loadmat(path, simplify_cells=True)["network"]
    maps = {m["name"]: m for m in content["maps"]}
    grouped = maps["grouped"]
    assert grouped["groups"] == 2 and grouped["axes"].tolist() == [[3, 2, 1, 6, 3, 0]] * 2
    # Normalization follows the convolution, so that it is folded into its map.
    norm = network.layers[2]
    np.testing.assert_allclose(grouped["scale"], 1 / np.sqrt(1 + norm.epsilon), rtol=1e-6)
    kinds = [m["kind"] for m in content["maps"]]
    assert kinds == ["conv", "conv_transpose", "depthwise", "depthwise", "conv", "dense"]
    gains = [node["gain"] for node in content["nodes"]]
    bound = lipschitz_upper_bound(network).gain_upper_bound
    # A chain: every product is rounded up once.
    assert abs(np.prod(gains) / bound - 1) <= 2 * len(gains) * np.finfo(float).eps


def test_equal_contents_give_equal_bytes(tmp_path, exported):
    path, network, certificate = exported
    export_mat(tmp_path / "again.mat", model=network, certificate=certificate)
    assert path.read_bytes() == (tmp_path / "again.mat").read_bytes()


def test_mixed_precision_exports_the_kernels_used_at_inference(tmp_path):
    layer = keras.layers.Dense(3, dtype=keras.DTypePolicy("mixed_bfloat16"))
    model = keras.Sequential([keras.Input((4,)), layer])
    export_mat(tmp_path / "mixed.mat", model=model)
    kernel = import_mat(tmp_path / "mixed.mat").weights[layer.kernel.path]
    expected = keras.ops.cast(keras.ops.cast(layer.kernel.value, "bfloat16"), "float32")
    np.testing.assert_array_equal(kernel, np.array(expected).astype(float))
    assert not np.array_equal(kernel, np.array(layer.kernel).astype(float))


def test_another_model_is_refused_and_keeps_its_weights(exported):
    path, _, _ = exported
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="only")])
    before = [np.array(v) for v in other.get_weights()]
    with pytest.raises(ValueError, match="same variables"):
        import_mat(path).assign_to(other)
    wider = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, name="d")], name="m")
    narrow = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="d")], name="m")
    weights = {v.path: np.array(v).astype(float) for v in wider.weights}
    with pytest.raises(ValueError, match="must have shape"):
        MatFile(weights=weights).assign_to(narrow)
    for a, b in zip(before, other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="holds no weights"):
        MatFile().assign_to(other)


def test_a_certificate_of_another_model_is_refused(tmp_path, exported):
    _, _, certificate = exported
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="must be this model's"):
        export_mat(tmp_path / "both.mat", model=other, certificate=certificate)
    assert not (tmp_path / "both.mat").exists()


def test_what_cannot_be_exported_is_refused_by_name(tmp_path):
    path = tmp_path / "model.mat"
    with pytest.raises(ValueError, match="nothing to write"):
        export_mat(path)
    with pytest.raises(ValueError, match=r"end in \.mat"):
        export_mat(tmp_path / "model.m", design=_designs()[0])
    open_size = keras.Sequential(
        [keras.Input((None, None, 1)), keras.layers.Conv2D(2, 3, name="open_size")]
    )
    with pytest.raises(ValueError, match="open_size"):
        export_mat(path, model=open_size)
    unknown = keras.Sequential([keras.Input((3,)), keras.layers.UnitNormalization(name="norm")])
    with pytest.raises(UnsupportedLayerError, match="norm"):
        export_mat(path, model=unknown)
    assert list(tmp_path.iterdir()) == []
    export_mat(path, model=open_size, input_shapes=[(None, 5, 5, 1)])
    axes = loadmat(path, simplify_cells=True)["network"]["maps"]["axes"]
    assert axes[:, 3].tolist() == [5, 5]


def test_truncated_files_are_refused_at_every_length(tmp_path):
    data = (GOLDEN / "dense_network.mat").read_bytes()
    path = tmp_path / "short.mat"
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises(ModelFileError):
            import_mat(path)


def test_flipped_bits_are_refused_or_without_effect(tmp_path):
    data = bytearray((GOLDEN / "dense_network.mat").read_bytes())
    whole = import_mat(GOLDEN / "dense_network.mat")
    path, rng, refused = tmp_path / "flipped.mat", np.random.default_rng(0), 0
    for position in rng.integers(0, 8 * len(data), 300):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            found = import_mat(path)
        except ModelFileError:
            refused += 1
            continue
        # The text ahead of the data, and bits that fill up the last byte of a block, say nothing.
        assert found.design == whole.design
        assert found.certificate.to_json() == whole.certificate.to_json()
    assert refused > 250


def test_a_decompression_bomb_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "_LARGEST_CONTENT", 2**20)
    header = (GOLDEN / "dense_network.mat").read_bytes()[:128]
    packed = zlib.compress(bytes(2**25), 9)
    tag = (15).to_bytes(4, "little") + len(packed).to_bytes(4, "little")
    (tmp_path / "bomb.mat").write_bytes(header + tag + packed)
    with pytest.raises(ModelFileError, match="unpacks to more than"):
        import_mat(tmp_path / "bomb.mat")


@pytest.mark.parametrize(
    ("start", "advice"),
    [
        (b"\x89HDF\r\n\x1a\n", "v7.3"),
        (b"MATLAB 7.3 MAT-file, Platform: GLNXA64", "v7.3"),
        (b"# Created by Octave 7.3.0", "Octave's own format"),
        (b"PK\x03\x04", "not a MATLAB v7 file"),
        (b"", "not a MATLAB v7 file"),
    ],
)
def test_other_formats_are_refused_with_advice(tmp_path, start, advice):
    (tmp_path / "other.mat").write_bytes(start.ljust(200 if start else 0))
    with pytest.raises(ModelFileError, match=advice):
        import_mat(tmp_path / "other.mat")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match="no such file"):
        import_mat(tmp_path / "absent.mat")


@pytest.mark.parametrize(
    ("part", "field", "value", "reason"),
    [
        ("design", "delta", 10.0, "delta"),
        ("design", "nu", np.nan, "finite"),
        ("design", "p_vec", [[1.0, -1.0, 1.0]], "scaling"),
        ("design", "sn_vec", [[1.0]], "budgets"),
        ("design", "rule", "guess", "rule"),
        ("design", "k1", [[2.0, 2.0, 2.0]], "alpha"),
        ("certificate", "radius", [[-1.0] * 8], "adii"),
        ("certificate", "predictions", [[0.5] * 8], "integers"),
        ("certificate", "verdict", "MAYBE", "verdict"),
        ("certificate", "method", 3.0, "text"),
        ("network", "maps", 3.0, "cell array"),
        ("tf_lyapunov", "version", 2.0, "version 1"),
    ],
)
def test_impossible_contents_are_refused_with_the_reason(tmp_path, part, field, value, reason):
    content = loadmat(GOLDEN / "dense_network.mat")
    content["design"]["nu"][0, 0] = 0.3 if field == "delta" else content["design"]["nu"][0, 0]
    content[part][field][0, 0] = np.array(value) if not isinstance(value, str) else value
    _save(tmp_path / "changed.mat", content)
    with pytest.raises(ModelFileError, match=reason):
        import_mat(tmp_path / "changed.mat")


@pytest.mark.parametrize("part", ["design", "certificate", "network"])
def test_every_missing_field_is_named(tmp_path, part):
    content = loadmat(GOLDEN / "dense_network.mat", simplify_cells=True)
    read = {"design": content["design"], "certificate": content["certificate"]}.get(
        part, {"maps": 0, "variables": 0, "digest": 0}
    )
    for field in set(read) - {"kc", "verdict"} if part == "design" else read:
        fresh = loadmat(GOLDEN / "dense_network.mat")
        record = fresh[part][0, 0]
        fresh[part] = {name: record[name] for name in record.dtype.names if name != field}
        _save(tmp_path / "changed.mat", fresh)
        with pytest.raises(ModelFileError, match=f"'{field}' is missing"):
            import_mat(tmp_path / "changed.mat")


def test_nan_weights_are_refused(tmp_path):
    content = loadmat(GOLDEN / "dense_network.mat")
    content["network"]["maps"][0, 0][0, 0]["kernel"][0, 0][0, 0] = np.nan
    _save(tmp_path / "changed.mat", content)
    with pytest.raises(ModelFileError, match="NaN"):
        import_mat(tmp_path / "changed.mat")


def test_a_shared_kernel_with_two_values_is_refused(tmp_path):
    image = keras.Input((4,))
    shared = keras.layers.Dense(4, name="shared")
    model = keras.Model(image, shared(shared(image)))
    export_mat(tmp_path / "shared.mat", model=model)
    assert len(import_mat(tmp_path / "shared.mat").weights) == 2
    content = loadmat(tmp_path / "shared.mat")
    content["network"]["maps"][0, 0][0, 1]["kernel"][0, 0][0, 0] += 1
    _save(tmp_path / "changed.mat", content)
    with pytest.raises(ModelFileError, match="two different values"):
        import_mat(tmp_path / "changed.mat")


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "design.mat"
    export_mat(path, design=_designs()[0])
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        export_mat(path, design=_designs()[1])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["design.mat"]


def test_importing_the_module_loads_neither_keras_nor_scipy():
    # The package's own __init__ imports Keras; a bare package in its place shows what this adds.
    code = (
        "import sys, types; package = types.ModuleType('tf_lyapunov'); "
        f"package.__path__ = [{str(pathlib.Path(matlab.__file__).parents[1])!r}]; "
        "sys.modules['tf_lyapunov'] = package; import tf_lyapunov.matlab; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'keras', 'scipy', 'numpy'}))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "['numpy']", process.stderr


def _save(path, content):
    savemat(path, {k: v for k, v in content.items() if not k.startswith("__")})
