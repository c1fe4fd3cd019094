"""The report is self-contained, escapes what users type, and never fails for missing data."""

import dataclasses
import html.parser
import io
import json
import math
import sys
import types

import numpy as np
import pytest
from filled_results import HOSTILE, FakeCertificate, example, full_results

from tf_lyapunov.design import spectral_design
from tf_lyapunov.evaluation import pictures, plots, summaries
from tf_lyapunov.evaluation.report import render_report, terminal_table, write_report
from tf_lyapunov.evaluation.results import Results
from tf_lyapunov.theory.sectors import Indices


class Page(html.parser.HTMLParser):
    """Collects tags and attributes, and checks that tags are balanced."""

    VOID = ("meta", "img", "source", "br", "link", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def full_page():
    return render_report(full_results())


def test_the_page_asks_the_network_for_nothing(full_page):
    page = Page(full_page)
    links = [
        value
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in ("src", "srcset", "href", "action", "data", "poster")
    ]
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert all(link[1:] in targets for link in links if link[0] == "#")
    pictured = [link for link in links if link[0] != "#"]
    assert pictured and all(link.startswith("data:image/png;base64,") for link in pictured)
    assert "@import" not in full_page and "url(" not in full_page
    policy = page.all("meta")[2]
    assert policy["content"].startswith("default-src 'none'")


def test_what_users_typed_is_text_and_never_markup(full_page):
    page = Page(full_page)
    assert not page.all("script")
    # Title, heading, names, notes, assumptions, ...: each shown as typed.
    assert sum(HOSTILE in text for text in page.text) >= 12
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_every_chart_and_picture_has_an_alternative_text(full_page):
    page = Page(full_page)
    assert len(page.all("img")) == 6
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    charts = [a for a in page.all("svg") if a.get("class") == "chart"]
    # Three of two sizes each, a layer, the room left, and three of the training.
    assert len(charts) == 3 * 2 + 1 + 1 + 3
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in charts)


def test_tables_have_row_and_column_headers_and_scroll_by_keyboard_too(full_page):
    page = Page(full_page)
    scopes = {attrs.get("scope") for attrs in page.all("th")}
    assert scopes == {"row", "col", "colgroup"}
    regions = [a for a in page.all("div") if a.get("class") == "scroll"]
    assert len(regions) == len(page.all("table"))
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in regions)


def test_the_table_of_contents_leads_to_every_section(full_page):
    page = Page(full_page)
    links = [a["href"] for a in page.all("a")]
    sections = [f"#{a['id']}" for a in page.all("h2") if "id" in a]
    assert links == sections and len(links) == len(set(links)) == len(page.all("section")) - 1


def test_results_of_older_versions_are_rendered():
    record = full_results().to_dict()
    del record["examples"], record["classes"]
    text = seen(Results.from_dict({**record, "schema": 1}))
    assert "keeps what was promised" in text and "decided most narrowly" not in text


def test_the_weakest_inputs_are_shown_with_radius_down_and_distance_up(full_page):
    text = " ".join(" ".join(Page(full_page).text).split())
    assert "no change shorter than 0.1234 found" in text and ") 0.2346" in text
    # Whatever the name of the other class, and of a feature.
    assert f"{HOSTILE} turned into b (input 17)" in text and f"{HOSTILE} 1.5 1.75" in text


@pytest.mark.parametrize(
    "damage",
    [
        {"clean": "no base64"},
        {"clean": "AAAA"},
        {"shape": [10**9, 10**9, 1]},
        {"shape": None},
        {"change": 7},
        {"reach": "x"},
        {"high": None},
    ],
)
def test_damaged_pictures_are_left_out_and_the_rest_is_shown(damage):
    picture = pictures.encode(np.zeros((4, 5, 1)), np.ones((4, 5, 1)))
    results = Results(title="t", examples=[example(picture={**picture, **damage})])
    text = render_report(results)
    assert "0.1234" in text and "<img" not in text


def test_tests_that_the_proof_does_not_use_are_told_apart_from_it():
    design = spectral_design(Indices(0.4, -2.0), ["relu", "relu", "linear"])
    summary = summaries.design_summary(design, design.check(design.budgets))
    text = seen(Results(title="t", design=summary))
    assert summary["cascade_margin"] < -1e6 and "keeps what was promised" in text
    assert "weighted test smallest eigenvalue" in text
    before, after = text.split("The papers' own tests and formula")
    assert "quasi-dominant" not in before and "not quasi-dominant" in after
    assert "nothing follows" in after and "stands for infinity" in after
    published = spectral_design(Indices(0.89, 0.28), ["relu", "relu", "linear"], rule="lyapunov")
    text = seen(Results(title="t", design=summaries.design_summary(published)))
    assert "published test smallest eigenvalue" in text and "nothing follows" not in text


def test_an_attack_within_a_certified_radius_is_a_contradiction():
    broken = {**example(features=1, changed=0, changes=[]), "distance": 0.1}
    text = seen(Results(title="t", examples=[broken]))
    assert "Contradiction" in text and "within its certified radius 0.1234" in text


def test_the_page_shows_proofs_rounded_to_the_safe_side(full_page):
    text = " ".join(Page(full_page).text)
    assert "Proved: the trained network keeps what was promised" in text
    assert "at most 1.31 times the distance" in text
    assert "75.0% of the 4 test inputs" in text


# What a reader sees of each part, and of no other.
EVIDENCE = {
    "date": "by tf_lyapunov, 1 May 2026",
    "command": "tf-lyapunov run c.yaml",
    "config": "seed: 4711",
    "versions": "keras 3.15.1",
    "dataset": "4 test inputs, 3 classes",
    "model": "10 parameters",
    "design": "δ = 0.4, ν = -2",
    "layers": "1 1.1 yes 1",
    "history": "3 epochs",
    "certificate": "Method: composition.",
    "rows": "0.2 100.0% 50.0% 75.0%",
    "gain": "largest measured 1.1",
    "attacks": "PGD-40 : norm l2, steps 40",
    "examples": "no change shorter than 0.3",
    "classes": "Which class is taken for which",
    "bracket": "the 3 inputs that attacks changed, of 4",
    "notes": "A note of its own.",
    "seconds": "seconds, certification 12.5",
}


def told_results():
    """`full_results` in which every part says something of its own."""
    return dataclasses.replace(
        full_results(),
        title="a run",
        date="1 May 2026",
        command="tf-lyapunov run c.yaml",
        config={"seed": 4711},
        versions={"keras": "3.15.1"},
        attacks=[{"name": "PGD-40", "norm": "l2", "steps": 40}],
        examples=[{**example(features=1, changed=0, changes=[]), "radius": 0.3, "distance": 0.4}],
        bracket={"summary": {"inputs": 4, "found": 3, "lower": [0.05, 0.06, 0.07]}},
        notes=["A note of its own."],
        seconds={"certification": 12.5},
    )


def seen(results):
    """Text of the page as a reader sees it: entities resolved, white space folded."""
    page = Page(_render_without_figures(results))
    return " ".join(" ".join(page.text).split())


def printed(results):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(terminal_table(results))
    return console.file.getvalue()


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(Results) if f.name != "title"]
)
def test_each_part_may_be_missing_or_come_alone_and_is_shown_where_it_is(field):
    told, empty = told_results(), Results(title="a run")
    without = dataclasses.replace(told, **{field: getattr(empty, field)})
    alone = dataclasses.replace(empty, **{field: getattr(told, field)})
    others = {name: text for name, text in EVIDENCE.items() if name != field}
    text = seen(without)
    assert "a run" in text and EVIDENCE[field] not in text
    assert [name for name, evidence in others.items() if evidence not in text] == []
    headline = "No promise was made" if field == "design" else "Proved: the trained network keeps"
    assert headline in text and headline in printed(without)
    text = seen(alone)
    assert "a run" in text and EVIDENCE[field] in text
    assert [name for name, evidence in others.items() if evidence in text] == []
    headline = {
        "design": "Proved: the trained network keeps",
        "certificate": "No promise was made",
        "gain": "No promise was made",
    }.get(field, "Nothing is proved")
    assert headline in text and headline in printed(alone)


# What a reader sees of a single key.
KEYS = {
    ("design", "rule"): "rule <script>",
    ("design", "claim"): "δ = 0.4, ν = -2",
    ("design", "verdict"): "yes (PROVED)",
    ("design", "gain"): "at most 1.31 times the distance",
    ("design", "cascade_matrix"): "Cascade matrix A, unscaled",
    ("design", "cascade_margin"): "its smallest eigenvalue is 0.5",
    ("design", "explanation"): "In the design's own words",
    ("design", "check"): "holds, margin 0.1",
    ("certificate", "method"): "Method: composition.",
    ("certificate", "float_allowance"): "computed within 1e-6 of the exact ones",
    ("certificate", "contributions"): "What the certificate multiplies together",
    ("gain", "upper_bound"): "proved upper bound 1.3 ",
    ("gain", "claimed"): "promised 1.31",
    ("gain", "measured_max"): "largest measured 1.1",
    ("dataset", "num_classes"): "3 classes",
    ("dataset", "test"): "4 test inputs, ",
    ("dataset", "class_names"): "turned into b",
    ("model", "parameters"): "10 parameters",
}


@pytest.mark.parametrize("field", ["design", "certificate", "gain", "dataset", "model"])
def test_each_key_of_a_part_may_be_missing_or_none_and_then_claims_nothing(field):
    told = told_results()
    told.certificate["gain_upper_bound"] = None  # the gain table's own bound is shown
    whole = seen(told)
    for key in getattr(told, field):
        evidence = KEYS.get((field, key))
        assert evidence is None or evidence in whole
        without = {k: v for k, v in getattr(told, field).items() if k != key}
        for part in (without, {**without, key: None}):
            text = seen(dataclasses.replace(told, **{field: part}))
            assert evidence is None or evidence not in text
            assert "None" not in text and "nan" not in text.split()
            proves = (field, key) not in (("design", "verdict"), ("design", "check"))
            headline = "Proved: the trained network keeps" if proves else "Not proved"
            assert headline in text
    assert {key for part, key in KEYS if part == field} <= set(getattr(told, field))


def _render_without_figures(results):
    original = plots.report_figures
    plots.report_figures = lambda results: []
    try:
        return render_report(results)
    finally:
        plots.report_figures = original


def test_an_empty_run_gives_a_page_that_promises_nothing():
    text = " ".join(Page(render_report(Results(title="empty"))).text)
    assert "Nothing is proved" in text


def test_without_matplotlib_the_page_says_that_figures_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = dataclasses.replace(full_results(), bracket={"lower": [0.1]})
    page = render_report(results)
    text = " ".join(Page(page).text)
    assert "figures are left out" in text and "tf-lyapunov[report]" in text
    assert "<svg" in page and "figures are left out" not in render_report(full_results())


def test_without_jinja_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"tf-lyapunov\[report\]"):
        render_report(Results(title="t"))


def test_results_survive_the_way_through_json(tmp_path):
    results = full_results()
    again = Results.from_json(results.to_json())
    assert again.to_dict() == results.to_dict()
    results.save(tmp_path / "deep" / "results.json")
    assert Results.load(tmp_path / "deep" / "results.json") == again
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["results.json"]


def test_json_holds_no_nan_and_unpacks_arrays():
    results = Results(
        title="t",
        gain={"upper_bound": math.inf, "measured_max": np.float32(0.5)},
        rows=[{"radius": np.float64(0.1), "count": np.int64(3), "clean": math.nan}],
        layers=[{"sigma": np.arange(2.0), 1: {"a"}}],
    )
    record = json.loads(results.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert record["gain"] == {"upper_bound": None, "measured_max": 0.5}
    assert record["rows"] == [{"radius": 0.1, "count": 3, "clean": None}]
    assert record["layers"] == [{"sigma": [0.0, 1.0], "1": ["a"]}]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"title": 3}', '{"title": "t", "typo": 1}', '{"title": "t", "schema": 99}'],
)
def test_other_files_are_refused(text):
    with pytest.raises(ValueError, match="Received"):
        Results.from_json(text)


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(Results(title="t"), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_terminal_table_shows_names_literally_and_all_numbers():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(terminal_table(full_results()))
    text = console.file.getvalue()
    assert "Proved" in text and "75.0%" in text and "1.31" in text
    assert "[red]" in text


def test_layer_rows_refuse_columns_of_another_length():
    with pytest.raises(ValueError, match="budget"):
        summaries.layer_rows(["a", "b"], [1.0, 2.0], [1.0])


def test_the_certified_curve_and_histogram_agree_with_the_certificate():
    certificate = FakeCertificate([0.0, 0.1, 0.2, 0.4])
    summary = summaries.certificate_summary(certificate)
    assert summary["curve"]["radius"][0] == 0 and summary["curve"]["radius"][-1] == 0.4
    assert summary["curve"]["certified"][0] == 0.75 and summary["curve"]["certified"][-1] == 0.25
    assert sum(summary["histogram"]["counts"]) == 4


@pytest.mark.parametrize(
    ("radius", "headline"),
    [
        ([0.0, 0.0], "Nothing is proved: no decision could be certified"),
        ([np.inf, 0.1], "No promise was made; decisions are certified one by one"),
        ([np.inf, np.inf], "No promise was made; decisions are certified one by one"),
    ],
)
def test_certificates_without_a_finite_positive_radius_say_what_they_prove(radius, headline):
    certificate = summaries.certificate_summary(FakeCertificate(radius))
    results = Results(title="odd radii", certificate=certificate)
    text = " ".join(" ".join(Page(render_report(results)).text).split())
    assert "odd radii" in text and headline in text
    assert "scores by at most 1.3 × d" in text  # the gain is proved all the same
    assert "inf" not in text.split() and "nan" not in text.split()


def test_designs_are_summarised_whatever_they_lack():
    assert summaries.design_summary(types.SimpleNamespace())["claim"] is None
    claim = types.SimpleNamespace(delta=0.4, nu=-2.0)
    dominance = types.SimpleNamespace(holds=np.bool_(False))
    design = types.SimpleNamespace(
        claim=claim, quasi_dominance=dominance, cascade_matrix=np.eye(2), budgets=(1.0,), gain=3.0
    )
    summary = summaries.design_summary(design, types.SimpleNamespace(holds=True, margin=0.1))
    assert summary["claim"] == {"delta": 0.4, "nu": -2.0}
    assert summary["quasi_dominant"] is False
    assert summary["cascade_matrix"] == [[1.0, 0.0], [0.0, 1.0]]
    assert summary["check"] == {"holds": True, "margin": 0.1, "gain_upper_bound": None}
    assert json.dumps(summary)


def test_a_promised_gain_is_shown_as_a_gain():
    design = spectral_design(gain=1.5, sectors=["relu", "linear"])
    summary = summaries.design_summary(design, design.check(design.budgets))
    assert summary["claim"] == {"gain": 1.5} and summary["verdict"] == "PROVED"
    text = " ".join(Page(render_report(Results(title="t", design=summary))).text)
    assert "gain at most 1.5" in text and "keeps what was promised" in text


def test_published_rules_are_never_shown_as_proofs():
    sectors = ["relu", "relu", "linear"]
    design = spectral_design(Indices(0.89, 0.28), sectors, rule="lyapunov")
    summary = summaries.design_summary(design, design.check(design.budgets))
    text = " ".join(Page(render_report(Results(title="t", design=summary))).text)
    assert "Not proved" in text and "rebuild published results" in text
