"""The benchmark's topics are discovered, and sections that are not measured again are kept."""

import importlib.util
import json
import pathlib
import sys
import types

import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPTS / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [n for n in sys.modules if n == "benchmarks" or n.startswith("benchmarks.")]:
        del sys.modules[name]


def topic(value):
    rows = [{"value": value}]
    return types.SimpleNamespace(TITLE="Test", measure=lambda quick: {"rows": rows})


def test_every_module_with_a_measure_is_a_topic_in_the_stated_order(benchmark):
    names = list(benchmark.TOPICS)
    assert names[:3] == ["norms", "overhead", "clipping"] and "machine" not in names
    for module in benchmark.TOPICS.values():
        assert module.TITLE and callable(module.measure)


def test_only_the_sections_named_are_measured_again(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "TOPICS", {"a": topic(1.0), "b": topic(2.0), "c": topic(3.0)})
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"a": {"rows": []}, "old": {"rows": [{"value": 9}]}}))
    benchmark.main(only=["b,c"], quick=True, out=tmp_path)
    results = json.loads(path.read_text())
    assert results["a"] == {"rows": []} and results["old"]["rows"] == [{"value": 9}]
    assert results["b"]["rows"] == [{"value": 2.0}] and results["c"]["quick"] is True
    assert "cpu" in results["c"]["machine"]


def test_an_infinite_figure_and_an_unknown_topic_are_refused(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "TOPICS", {"a": topic(float("inf"))})
    with pytest.raises(SystemExit, match="infinity"):
        benchmark.main(only=None, quick=True, out=tmp_path)
    with pytest.raises(Exception, match="Unknown topics"):
        benchmark.main(only=["b"], quick=True, out=tmp_path)


def test_the_large_networks_run_with_scale_alone(benchmark, monkeypatch, tmp_path):
    large = topic(2.0)
    large.SCALE = True
    monkeypatch.setattr(benchmark, "TOPICS", {"a": topic(1.0), "large": large})
    for scale, expected in ((False, {"a"}), (True, {"a", "large"})):
        benchmark.main(only=None, scale=scale, quick=True, out=tmp_path)
        assert set(json.loads((tmp_path / "benchmark.json").read_text())) == expected
