"""Tables, figures and findings of `lyapunov/rebuild.py`, from its records alone."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from tf_lyapunov.evaluation.results import plain
from tf_lyapunov.evaluation.wording import number, percent, percent_down, round_up
from tf_lyapunov.theory import lyapunov
from tf_lyapunov.theory.sectors import Indices
from tf_lyapunov.writing import write_text

# Rahnama, Nguyen, Raff (CVPR 2020), Table 2 as printed: (delta, nu) -> radius -> (mean of the
# output changes under PGD, "Lyapunov bound"), and the baseline's means.
TABLE_2_RADII = (0.1, 0.2, 0.3)
TABLE_2 = {
    (0.89, 0.28): ((0.244, 0.435), (0.490, 0.615), (0.736, 0.753)),
    (0.95, 0.26): ((0.202, 0.407), (0.406, 0.576), (0.610, 0.706)),
    (1.1, 0.22): ((0.170, 0.352), (0.340, 0.497), (0.511, 0.609)),
}
TABLE_2_BASELINE = (1.233, 2.446, 3.641)


def contradictions(records: list[dict]) -> list[str]:
    """Measurements that break a proof; there must be none."""
    found = []
    for record in records:
        gain = record["gain_upper_bound"] * (1 + 2**-10)  # float32 differences keep three digits
        for row in record["rows"]:
            where = f"{record['name']} at radius {row['radius']}"
            if row.get("gain_max", 0) > gain:
                found.append(f"{where}: gain {row['gain_max']} above {record['gain_upper_bound']}")
            if any((row.get("broken") or {}).values()):
                found.append(f"{where}: broken certificates {row['broken']}")
            if any(g["max"] > gain for g in (row.get("gain") or {}).values()):
                found.append(f"{where}: measured gain above the bound")
    return found


def table_2_lines(records: list[dict]) -> list[dict]:
    """One flat row a model and radius, with the paper's numbers beside ours."""
    lines = []
    for record in records:
        claim = record["job"]["claim"]
        for index, row in enumerate(record["rows"]):
            line = {
                "delta": claim and claim[0],
                "nu": claim and claim[1],
                "training": record["label"],
                "clean": record["clean"],
                "radius": row["radius"],
                "measured_mean": row["mean"],
                "measured_max": row["max"],
                "paper_measured_mean": TABLE_2_BASELINE[index],
                "paper_bound": None,
                "printed_bound": None,
                "corrected_bound": None,
                "proved_bound": row["proved"],
                "certified": row["certified"],
            }
            if claim:
                indices = Indices(*claim)
                paper = TABLE_2[tuple(claim)][index]
                line["paper_measured_mean"], line["paper_bound"] = paper
                line["printed_bound"] = lyapunov.table_2_bound(indices, row["radius"])
                line["corrected_bound"] = lyapunov.corollary_2(indices, row["radius"])
            lines.append(line)
    return lines


def figure_1_lines(records: list[dict]) -> list[dict]:
    """One flat row a model and radius."""
    return [
        {
            "training": record["label"],
            "radius": row["radius"],
            "clean": row["clean"],
            "fgm": row["attacked"]["FGM"],
            "pgd": row["attacked"]["PGD"],
            "certified": row["certified"],
            "gain_upper_bound": record["gain_upper_bound"],
        }
        for record in records
        for row in record["rows"]
    ]


def yes(condition: bool) -> str:
    return "**yes**" if condition else "**no**"


def table_2_findings(lines: list[dict]) -> list[str]:
    """What of Table 2 reproduces, from the numbers alone."""
    bounded = [line for line in lines if line["delta"] is not None]
    base = [line for line in lines if line["delta"] is None]
    near = [abs(line["printed_bound"] - line["paper_bound"]) <= 0.003 for line in bounded]
    # One entry a printed number, whatever number of our networks stands beside it.
    printed = {(line["delta"], line["nu"], line["radius"]): line for line in bounded}.values()
    paper = [line["paper_measured_mean"] <= line["corrected_bound"] for line in printed]
    found = [
        f"The printed bounds are √(c·ε), c = 1/δ²+2ν/δ (to 0.003): {yes(all(near))}. With ε an l2 "
        "norm the claim's bound is √c·ε, which is smaller for ε < 1.",
        f"The paper's own measurements respect the corrected bound √c·ε: {yes(all(paper))}"
        + (
            "."
            if all(paper)
            else f" ({paper.count(False)} of {len(paper)} exceed it), so its "
            "networks cannot have had the claimed indices."
        ),
    ]
    for label in dict.fromkeys(line["training"] for line in bounded):
        mine = [line for line in bounded if line["training"] == label]
        parts = [
            f"{yes(all(line['measured_mean'] <= line[key] for line in mine))} {words}"
            for key, words in (
                ("printed_bound", "below the printed bound"),
                ("corrected_bound", "below the corrected bound"),
                ("proved_bound", "below the proved bound (it must be)"),
            )
        ]
        found.append(f"Mean output change, {label}: {'; '.join(parts)}.")
    ratios = [line["measured_mean"] / line["paper_measured_mean"] for line in base]
    found.append(
        f"The baseline's mean output change is {number(min(ratios), 3)} to "
        f"{number(max(ratios), 3)} times the paper's (its training length is not in the text)."
    )
    return found


def figure_1_findings(lines: list[dict]) -> list[str]:
    """What of Figure 1 reproduces: the paper claims an order, its numbers are in no table."""
    by = {(line["training"], line["radius"]): line for line in lines}
    labels = list(dict.fromkeys(line["training"] for line in lines))
    radii = [radius for radius in dict.fromkeys(line["radius"] for line in lines) if radius >= 0.3]
    found = []
    for label in labels[2:]:
        for rival in labels[:2]:
            for attack in ("fgm", "pgd"):
                wins = [by[label, r][attack] >= by[rival, r][attack] for r in radii]
                found.append(
                    f"“{label}” is at least as accurate as “{rival}” under {attack.upper()} for "
                    f"ε ≥ 0.3: {yes(all(wins))} ({sum(wins)} of {len(wins)} radii)."
                )
    return found


def markdown(columns: dict, lines: list[dict]) -> str:
    """A Markdown table; `columns` maps headings to functions of a line."""
    rows = [list(columns), ["---"] * len(columns)]
    rows += [[str(show(line)) for show in columns.values()] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table_2_markdown(lines: list[dict]) -> str:
    def claim(line):
        return "none" if line["delta"] is None else f"({line['delta']}, {line['nu']})"

    return markdown(
        {
            "(δ, ν)": claim,
            "training": lambda line: line["training"],
            "clean": lambda line: percent(line["clean"]),
            "ε": lambda line: number(line["radius"]),
            "mean ‖Δ_n‖, ours": lambda line: number(line["measured_mean"], 3),
            "mean ‖Δ_n‖, paper": lambda line: number(line["paper_measured_mean"], 3),
            "printed √(c·ε)": lambda line: number(line["printed_bound"], 3),
            "corrected √c·ε": lambda line: number(line["corrected_bound"], 3),
            "proved, ours": lambda line: round_up(line["proved_bound"], 3),
        },
        lines,
    )


def figure_1_markdown(lines: list[dict]) -> str:
    wanted = {0.0, 0.1, 0.25, 0.3, 0.5, 0.75}
    return markdown(
        {
            "training": lambda line: line["training"],
            "proved gain": lambda line: round_up(line["gain_upper_bound"]),
            "ε": lambda line: number(line["radius"]),
            "FGM": lambda line: percent(line["fgm"]),
            "PGD": lambda line: percent(line["pgd"]),
            "certified": lambda line: percent_down(line["certified"]),
        },
        [line for line in lines if line["radius"] in wanted],
    )


def write_csv(path: Path, lines: list[dict]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, buffer.getvalue())


def draw(path: Path, panels: list, xlabel: str, ylabel: str) -> None:
    """Line panels as SVG and PNG; a panel is (title, [(label, x, y, style), …])."""
    from tf_lyapunov.evaluation import plots

    plots.require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(panels), 3.9), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
    ):
        for label, x, y, style in curves:
            axes.plot(x, y, label=label, markersize=4, **style)
        axes.set(title=title, xlabel=xlabel)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel(ylabel)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    widest = 0.6 + 0.085 * max(map(len, labels))  # inches, about
    columns = max(1, min(len(panels), int(figure.get_figwidth() / widest)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    for suffix in (".svg", ".png"):
        plots.save(figure, path.with_suffix(suffix))


def draw_table_2(path: Path, lines: list[dict]) -> None:
    colours = ("#d55e00", "#aa4499", "#00795b")
    panels = []
    for claim in dict.fromkeys((k["delta"], k["nu"]) for k in lines if k["delta"] is not None):
        here = [line for line in lines if (line["delta"], line["nu"]) == claim]
        labels, curves = list(dict.fromkeys(line["training"] for line in here)), []
        for label, colour in zip(labels, colours, strict=True):
            mine = [line for line in here if line["training"] == label]
            x = [line["radius"] for line in mine]
            style = {"color": colour, "marker": "o"}
            curves.append((f"measured: {label}", x, [k["measured_mean"] for k in mine], style))
        for key, label, style in (
            ("paper_measured_mean", "measured by the paper", {"color": "#444b5a", "marker": "x"}),
            ("printed_bound", "printed bound √(c·ε)", {"color": "#0072b2", "linestyle": ":"}),
            ("corrected_bound", "corrected bound √c·ε", {"color": "#0072b2", "linestyle": "--"}),
        ):
            curves.append((label, x, [line[key] for line in mine], style))
        panels.append((f"δ = {claim[0]}, ν = {claim[1]}", curves))
    draw(path, panels, "ε (l2)", "mean output change under PGD")


def draw_figure_1(path: Path, lines: list[dict]) -> None:
    styles = dict(
        zip(
            dict.fromkeys(line["training"] for line in lines),
            (
                {"color": "#0072b2", "linestyle": "--"},
                {"color": "#aa4499", "linestyle": ":"},
                {"color": "#d55e00", "linestyle": "-."},
                {"color": "#00795b", "linestyle": "-"},
            ),
            strict=True,
        )
    )
    panels = []
    for key, title in (("fgm", "under FGM"), ("pgd", "under PGD"), ("certified", "certified")):
        curves = [
            (
                label,
                [line["radius"] for line in lines if line["training"] == label],
                [line[key] for line in lines if line["training"] == label],
                style,
            )
            for label, style in styles.items()
        ]
        panels.append((title, curves))
    draw(path, panels, "ε (l2)", "test accuracy")


def write_results(records: list[dict], how: dict, out: Path) -> str:
    """Tables, figures and RESULTS.md from the models that are finished; returns the text."""
    table = table_2_lines([r for r in records if r["part"] == "table_2"])
    figure = figure_1_lines([r for r in records if r["part"] == "figure_1"])
    parts = ["# MNIST: what the papers printed, and what we measure and prove", ""]
    if how["settings"]["quick"]:
        parts += ["**A smoke test on a few images and epochs: its numbers mean nothing.**", ""]
    if table:
        write_csv(out / "table_2.csv", table)
        draw_table_2(out / "table_2", table)
        parts += [
            "## Paper 1 (Rahnama, Nguyen, Raff), Table 2",
            "",
            "Network 784-50-20-10, leaky slope 0.3; l2 PGD with step 0.02ε from the image, last "
            "iterate, labels = the model's own predictions, no clipping. The paper's own layer "
            "indices are in an appendix that we do not have: the budgets are those of our "
            "closed-form design for its rule. “Proved” is the certificate's gain times ε. The "
            "sound design is trained with a cold cross-entropy with a margin, the others with "
            "plain cross-entropy, in each case with Adam 1e-3, batch 128.",
            "",
            table_2_markdown(table),
            "",
            "![Mean output change by radius](table_2.svg)",
            "",
            "What reproduces:",
            "",
            *(f"- {finding}" for finding in table_2_findings(table)),
            "",
        ]
    if figure:
        write_csv(out / "figure_1.csv", figure)
        draw_figure_1(out / "figure_1", figure)
        parts += [
            "## Paper 2 (Aquino et al.), Figure 1",
            "",
            "Network 784-50-20-10, leaky slope 0.1; Adam 1e-3, batch 128, until the mean training "
            "accuracy of 5 epochs is 0.999 or the last epoch. l2-FGM and PGD (step 2ε/k) with true "
            "labels. The released bounds are imposed after every step by projection (the release "
            "divides by an estimate in the forward pass). Our sound design is trained with a cold "
            "cross-entropy with a margin. “Certified” holds for every attack.",
            "",
            figure_1_markdown(figure),
            "",
            "![Accuracy by radius](figure_1.svg)",
            "",
            "What reproduces (the paper claims this order; its numbers are in no table):",
            "",
            *(f"- {finding}" for finding in figure_1_findings(figure)),
            "",
        ]
    broken = contradictions(records)
    parts += ["## Proofs against measurements", ""]
    parts += [f"- CONTRADICTION: {text}" for text in broken] or [
        "No attack broke a certificate, and no measured gain exceeds its proved bound.",
    ]
    parts += ["", "## How it was made", "", f"- command: `{how['command']}`"]
    parts += [f"- {key}: {how[key]}" for key in ("date", "machine", "cores", "data")]
    parts += [f"- versions: {', '.join(f'{k} {v}' for k, v in how['versions'].items())}"]
    epochs = ", ".join(f"{r['name']} {r['epochs']}" for r in records)
    parts += [f"- settings: {json.dumps(how['settings'])}", f"- epochs trained: {epochs}", ""]
    text = "\n".join(parts)
    write_text(out / "results.json", json.dumps(plain({"how": how, "records": records}), indent=1))
    write_text(out / "RESULTS.md", text)
    return text
