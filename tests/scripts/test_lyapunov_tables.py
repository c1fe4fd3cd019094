"""The MNIST rebuild states what its numbers say: findings, contradictions and proofs."""

import copy
import importlib
import pathlib
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def rebuild():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("lyapunov.rebuild")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def tables(rebuild):
    return importlib.import_module("lyapunov.tables")


def records(rebuild, change=0.1, gain=1.0):
    """Records of all models whose measured output change is `change` × radius."""
    found = []
    for job in rebuild.jobs(rebuild.Settings.of(False, 0)):
        record = {"name": job.name, "label": job.label, "part": job.part}
        record.update(job=rebuild.describe(job), clean=0.9, gain_upper_bound=gain, epochs=1)
        if job.part == "table_2":
            record["rows"] = [
                {
                    "radius": radius,
                    "mean": change * radius,
                    "max": change * radius,
                    "gain_max": change,
                    "certified": 0.5,
                    "proved": gain * radius,
                }
                for radius in (0.1, 0.2, 0.3)
            ]
        else:
            good = 0.8 if "spectral" in job.label else 0.4
            record["rows"] = [
                {
                    "radius": radius,
                    "clean": 0.9,
                    "certified": 0.2,
                    "attacked": {"FGM": good, "PGD": good},
                    "gain": {"PGD": {"mean": change, "max": change}},
                    "broken": {"PGD": 0},
                }
                for radius in (0.0, 0.3, 0.75)
            ]
        found.append(record)
    return found


def test_only_our_designs_are_proved(rebuild):
    for job in rebuild.jobs(rebuild.Settings.of(False, 0)):
        proved = getattr(job.bounds, "is_proved", False)
        assert proved == (job.name.endswith("sound")), job.name


def test_all_designs_of_both_papers_are_there_once(rebuild):
    names = [job.name for job in rebuild.jobs(rebuild.Settings.of(False, 0))]
    assert len(names) == len(set(names)) == 3 * 3 + 1 + 4
    assert len(rebuild.jobs(rebuild.Settings.of(True, 0))) == 3 + 1 + 4


def test_the_printed_bounds_and_the_papers_violations_are_found(rebuild, tables):
    lines = tables.table_2_lines([r for r in records(rebuild) if r["part"] == "table_2"])
    findings = tables.table_2_findings(lines)
    assert "(to 0.003): **yes**" in findings[0]
    assert "**no** (9 of 9 exceed it)" in findings[1]
    first = lines[0]
    assert round(first["printed_bound"], 3) == 0.435 and round(first["corrected_bound"], 3) == 0.138


@pytest.mark.parametrize(("change", "answer"), [(0.1, "**yes**"), (2.0, "**no**")])
def test_findings_follow_the_measurements(rebuild, tables, change, answer):
    found = [r for r in records(rebuild, change) if r["part"] == "table_2"]
    text = "\n".join(tables.table_2_findings(tables.table_2_lines(found)))
    assert f"{answer} below the corrected bound" in text


def test_the_order_of_figure_1_is_read_from_the_numbers(rebuild, tables):
    found = [r for r in records(rebuild) if r["part"] == "figure_1"]
    findings = tables.figure_1_findings(tables.figure_1_lines(found))
    assert len(findings) == 8 and all("**yes** (2 of 2 radii)" in text for text in findings)
    for row in found[0]["rows"]:
        row["attacked"]["PGD"] = 0.85
    findings = tables.figure_1_findings(tables.figure_1_lines(found))
    assert sum("**no** (0 of 2 radii)" in text for text in findings) == 2


def test_contradictions_of_proofs_are_reported(rebuild, tables):
    assert tables.contradictions(records(rebuild, change=0.9)) == []
    assert len(tables.contradictions(records(rebuild, change=1.1))) == 10 * 3 + 4 * 3
    broken = copy.deepcopy(records(rebuild))
    broken[-1]["rows"][1]["broken"]["PGD"] = 1
    assert len(tables.contradictions(broken)) == 1


def test_all_files_are_written(rebuild, tables, tmp_path):
    how = {"settings": {"quick": True}, "versions": {"keras": "3"}, "command": "c"}
    how.update(date="2026-01-01", machine="m", cores=2, data="d")
    text = tables.write_results(records(rebuild), how, tmp_path)
    assert "smoke test" in text and "No attack broke a certificate" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "RESULTS.md",
        "figure_1.csv",
        "figure_1.png",
        "figure_1.svg",
        "results.json",
        "table_2.csv",
        "table_2.png",
        "table_2.svg",
    ]


def test_a_missing_data_set_is_an_error_without_traceback(rebuild, tmp_path, capsys):
    assert rebuild.main(["--quick", "--data-dir", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "not prepared" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
