"""The page on adding an operation is right: its family is certified as any other, and checked."""

import dataclasses
import pathlib
import re
import sys
import types

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov import certify, lipschitz_upper_bound, register_gain
from tf_lyapunov.certification import read_network
from tf_lyapunov.errors import UnfaithfulReading, UnsupportedLayerError
from tf_lyapunov.program import registry, vocabulary

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding-an-operation.md"


@pytest.fixture
def family(monkeypatch):
    """The family of the page, included for one test."""
    for name in ("READERS", "RULES", "BARE_READERS", "BARE_RULES"):
        monkeypatch.setattr(vocabulary, name, dict(getattr(vocabulary, name)))
    monkeypatch.setattr(vocabulary, "SEVERAL_INPUTS", list(vocabulary.SEVERAL_INPUTS))
    monkeypatch.setattr(registry, "_PROVEN", dict(registry._PROVEN))
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    module = types.ModuleType("bent")
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "bent", module)
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    return module


def network_of(family):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, "relu"),
            family.Bent(0.5),
            keras.layers.Dense(3),
        ]
    )
    x = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
    return model, x


def test_the_family_of_the_page_is_certified_and_bounded(family):
    model, x = network_of(family)
    with pytest.raises(UnsupportedLayerError, match="Bent"):
        lipschitz_upper_bound(model)
    vocabulary.include(family)
    kernels = [np.linalg.norm(w, 2) for w in model.get_weights() if np.ndim(w) == 2]
    bound = lipschitz_upper_bound(model).gain_upper_bound
    assert bound == pytest.approx(0.5 * np.prod(kernels), rel=1e-6)
    proof = certify(model, x, precision="float64")
    assert proof.verdict == "PROVED"
    program = read_network(model).program
    assert not program.unread and not program.declared
    first, second = (np.asarray(w, np.float64) for w in model.get_weights()[::2])
    logits = 0.5 * np.arctan(np.maximum(x @ first, 0)) @ second
    assert np.allclose(program.logits(x), logits, atol=1e-12)
    with pytest.raises(ValueError, match="proven rule"):
        register_gain(family.Bent, 1.0, assumption="it bends")


def test_a_mistake_in_a_family_is_noticed(family):
    @dataclasses.dataclass(frozen=True)
    class Wrong(family.Bend):
        def forward(self, signals, precision):
            found = super().forward(signals, precision)
            return dataclasses.replace(found, value=found.value * (1 + 1e-3))

    family.READERS[family.Bent] = lambda call: [Wrong(call.operation.size)]
    vocabulary.include(family)
    model, x = network_of(family)
    with pytest.raises(UnfaithfulReading, match="bent"):
        certify(model, x)


def test_settings_of_a_family_enter_the_digest(family):
    vocabulary.include(family)
    model, _ = network_of(family)
    before = read_network(model).digest()
    model.layers[1].size = 0.25
    assert read_network(model).digest() != before


@pytest.mark.parametrize("family", vocabulary.FAMILIES, ids=lambda f: f.__name__.split(".")[-1])
def test_every_family_exports_the_names_of_the_page_and_reads_what_it_bounds(family):
    names = {"READERS", "RULES", "BARE_READERS", "BARE_RULES", "SEVERAL_INPUTS"}
    for name in names:
        assert f"`{name}`" in PAGE.read_text()
    assert not {n for n in vars(family) if n.isupper() and n.startswith(("READER", "BARE"))} - names
    assert set(getattr(family, "RULES", ())) <= set(getattr(family, "READERS", ()))
    assert set(getattr(family, "BARE_RULES", ())) <= set(getattr(family, "BARE_READERS", ()))


def test_the_family_of_the_page_is_exported(family, tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model, _ = network_of(family)
    vocabulary.include(family)
    tfl.export_onnx(model, tmp_path / "net.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds == ["Gemm", "Relu", "Atan", "Mul", "Gemm"]
