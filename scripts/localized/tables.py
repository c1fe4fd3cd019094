"""Tables and RESULTS.md of `localized/rebuild.py`, from its records alone."""

from __future__ import annotations

import json
from pathlib import Path

from localized.figures import draw_all
from localized.findings import findings
from localized.measures import problems
from localized.models import CHAINS, METHODS
from lyapunov.tables import markdown, write_csv
from tf_lyapunov.evaluation.measures import SuiteResult
from tf_lyapunov.evaluation.results import plain
from tf_lyapunov.evaluation.wording import number, percent, percent_down, round_up
from tf_lyapunov.writing import write_text

# Bontonou et al., Table 2 (CIFAR-10, PreActResNet18): errors clean and corrupted, relative mCE.
PRINTED = {
    "vanilla": (0.119, 0.316, 100),
    "parseval": (0.102, 0.305, 103),
    "laplacian": (0.132, 0.313, 92),
    "pgd": (0.128, 0.188, 30),
    "l2nn": (0.209, 0.285, 39),
}
TABLE_1 = """| method | domain R | slope α | locality r | metric |
| --- | --- | --- | --- | --- |
| P | everywhere | yes, softly | no | l2 (and l∞) |
| L2NN | everywhere | yes | no | l2 |
| L | training set | approximately | yes | l2 of features, cosine |
| PGD | training set, moved | no | yes | l∞ |
| our spectral bounds | everywhere | yes, proved | no | l2 |"""


def suite(record):
    """The evaluation suite of a record."""
    return SuiteResult(record["cells"])


def curve(record, outputs="softmax", norm="l2"):
    """A record's α_lim curve, or None."""
    kinds = [c for c in record["curves"] if (c["outputs"], c["norm"]) == (outputs, norm)]
    return kinds[0] if kinds else None


def comparison(records, settings):
    """One flat row a method: everything of the comparison table."""
    base = suite(records["vanilla"])
    lines = []
    for name in (n for n in METHODS if n in records):
        record, own = records[name], suite(records[name])
        line = {
            "method": record["label"],
            "parameters": record["parameters"],
            "clean": record["clean"],
            "pgd_linf": own.of_kind("pgd")[0]["accuracy"],
            "pgd_l2": record["attacked_l2"],
        }
        for row in (*own.of_kind("noise"), *own.of_kind("fgsm")):
            line[f"{row['kind']}_{row['level']:g}_dB"] = row["accuracy"]
        for radius, share in record["certified"].items():
            line[f"certified_{radius}"] = share
        line["corrupted_error"] = own.corrupted_error
        summary = own.summary(base)
        line["mce"], line["relative_mce"] = summary["mce"], summary["relative_mce"]
        line["relative_mce_paper"] = PRINTED.get(name, (None,) * 3)[2]
        for row in curve(record)["rows"]:
            if row["radius"] in settings["shown"]:
                for key in ("monte_carlo", "gradient", "certified"):
                    line[f"alpha_{key}_{row['radius']:g}"] = float(row[key])
        line["gain_upper_bound"] = float(record["gain_upper_bound"])
        line["training_seconds"] = record["training_seconds"]
        lines.append(line)
    return lines


def curve_rows(records):
    """Every α_lim curve as flat rows."""
    return [
        {
            "method": record["label"],
            "outputs": c["outputs"],
            "norm": c["norm"],
            "points": c["points"],
            "directions": c["directions"],
            **row,
        }
        for name, record in records.items()
        if name in METHODS or name in CHAINS
        for c in record["curves"]
        for row in c["rows"]
    ]


def bracket(line, radius):
    """Monte-Carlo, ascent and proof of one radius, in one cell."""
    m, g, c = (line[f"alpha_{k}_{radius:g}"] for k in ("monte_carlo", "gradient", "certified"))
    return f"{number(m, 2)} / {number(g, 2)} / {round_up(c, 2)}"


def comparison_markdown(lines, settings):
    """The comparison table of all methods."""
    ratios = [key for key in lines[0] if key.startswith("noise_")]
    snr = ratios[len(ratios) // 2]
    certified = [key for key in lines[0] if key.startswith("certified_")]
    columns = {
        "training": lambda line: line["method"],
        "clean": lambda line: percent(line["clean"]),
        f"PGD, l∞ {settings['adversary'][0]:.3g}": lambda line: percent(line["pgd_linf"]),
        f"noise, {snr.split('_')[1]} dB": lambda line: percent(line[snr]),
    }
    for key in (certified[0], certified[-1]):
        columns[f"certified, l2 {key.split('_')[1]}"] = lambda line, key=key: percent_down(
            line[key]
        )
    for radius in settings["shown"]:
        columns[f"α_lim({radius:g})"] = lambda line, radius=radius: bracket(line, radius)
    return markdown(columns, lines)


def corruption_markdown(lines):
    """Table 2: errors under corruptions."""

    def score(key):
        return lambda line: "n/a" if line[key] is None else number(line[key], 3)

    return markdown(
        {
            "training": lambda line: line["method"],
            "clean error": lambda line: percent(1 - line["clean"]),
            "corrupted error": lambda line: percent(line["corrupted_error"]),
            "mCE": score("mce"),
            "relative mCE": score("relative_mce"),
            "relative mCE, paper": score("relative_mce_paper"),
        },
        lines,
    )


def linear_markdown(record):
    """Sampling against proof on linear maps."""
    return markdown(
        {
            "norm": lambda row: {"l2": "l2", "linf": "l∞"}[row["norm"]],
            "inputs": lambda row: row["dimension"],
            "Monte-Carlo": lambda row: number(row["monte_carlo"], 3),
            "ascent": lambda row: number(row["gradient"], 6),
            "certified": lambda row: round_up(row["certified"], 6),
            "Monte-Carlo / truth": lambda row: percent(row["monte_carlo_share"]),
            "ascent below proof by": lambda row: f"{row['disagreement']:.0e}",
        },
        record["rows"],
    )


def chain_markdown(records, settings):
    """Dense chains: what is proved ball by ball."""

    def alpha(radius):
        def show(record):
            row = next(r for r in curve(record)["rows"] if r["radius"] == radius)
            return bracket({f"alpha_{k}_{radius:g}": float(v) for k, v in row.items()}, radius)

        return show

    columns = {
        "network": lambda record: record["label"],
        "clean": lambda record: percent(record["clean"]),
        "proved gain": lambda record: round_up(float(record["gain_upper_bound"])),
    }
    columns |= {f"α_lim({r:g})": alpha(r) for r in settings["shown"]}
    return markdown(columns, [records[n] for n in CHAINS if n in records])


def layerwise_markdown(records):
    """Proposition 1 on the dense chains."""
    lines = [
        {"label": records[n]["label"], **records[n]["layerwise"]} for n in CHAINS if n in records
    ]
    return markdown(
        {
            "network": lambda line: line["label"],
            "r": lambda line: number(line["radius"]),
            "α_l, layer by layer": lambda line: ", ".join(
                f"{name} {number(a, 3)}"
                for name, a in zip(line["names"], line["estimates"], strict=True)
            ),
            "Π α_l": lambda line: number(line["product"], 3),
            "α_lim, sampled": lambda line: number(line["network"], 3),
            "all α_l ≤ 1": lambda line: "yes" if line["contracts"] else "no",
            "α_lim ≤ Π α_l": lambda line: "yes" if line["is_consistent"] else "no",
        },
        lines,
    )


def pairs_text(record):
    """What was counted, and how long it took."""
    took = record["took"]
    near, norm = record["nearest"], {"l2": "l2", "linf": "l∞"}[record["norm"]]
    return (
        f"- {norm}, {record['samples']:,} samples, {record['opposite_pairs']:,} opposite-class "
        f"pairs, all compared exactly: nearest opposite-class sample {number(near['smallest'])} to "
        f"{number(near['largest'])}, median {number(near['median'])}; {record['duplicates']} at "
        f"distance 0. Every pair fits only with α ≥ {round_up(record['needed_slope'])}. "
        f"{took['cpu_seconds']:.0f} s of CPU time, {took['seconds']:.0f} s on a shared "
        f"machine, peak memory {took['peak_gib']:.2f} GiB."
    )


def limits(records, settings):
    """What the numbers are not."""
    c, count = curve(records["vanilla"]), settings["test"]
    missing = [METHODS[n] for n in settings["methods"] if n not in records]
    missing += [n for n in ("pairs_l2", "pairs_linf") if n not in records]
    spread = (0.1 * 0.9 / count) ** 0.5
    lines = [
        f"One seed, {records['vanilla']['epochs']} epochs on {settings['train'] or 'all'} training "
        f"images. An error of 10% on {count} test images has a standard error of "
        f"{percent(spread)}; smaller differences between methods mean nothing.",
        f"α_lim over {c['points']} points and {c['directions']} directions; the paper takes 100 "
        "and 1000. One point near the boundary decides it, which is why ascent is flat over r.",
        "Certificates are those of the composition rule; of residual sums it is loose, so that "
        "“certified 0%” is a limit of the proof and not a measurement.",
        "L2NN and the spectral network are bounded and train for as few epochs as the others, "
        "which is far from enough for them.",
    ]
    if settings.get("mix", 1.0) < 1:
        lines.append(
            f"PGD trains on adversarial inputs with weight {settings['mix']} and on clean ones: "
            "alone they end in a constant network here."
        )
    return lines + ([f"Not done: {', '.join(missing)}."] if missing else [])


def write_results(records: dict, how: dict, out: Path) -> str:
    """Tables, figures and RESULTS.md from the records that are there; returns the text."""
    settings = how["settings"]
    title = {"mnist": "MNIST", "cifar10": "a CIFAR-10 subset"}[settings["dataset"]]
    parts = [f"# Localized robustness on {title}", ""]
    if settings["quick"]:
        parts += ["**A smoke test on a few images: its numbers mean nothing.**", ""]
    drawn = draw_all(records, settings, out)

    def picture(name, text):
        return [f"![{text}]({name}.svg)", ""] if name in drawn else []

    if "vanilla" in records:
        lines = comparison(records, settings)
        write_csv(out / "comparison.csv", lines)
        write_csv(out / "curves.csv", curve_rows(records))
        c = curve(records["vanilla"])
        network = f"the network of `{settings['config']}`" if settings["config"] else (
            f"a residual network of filters {settings['filters']} without normalisation"
        )  # fmt: skip
        parts += [
            "## Comparison of the training methods",
            "",
            f"V, P, L, P+L and PGD train {network}; L2NN and the spectral network have gains of at "
            "most 1 before the scale of the logits, which is that of their losses and part of the "
            "deployed network. All train for equally many epochs. α_lim is that of the "
            f"softmax outputs in l2 over {c['points']} training images, as “Monte-Carlo with "
            f"{c['directions']} directions / ascent / proof”: the truth lies between the last two. "
            "“Certified” holds for every attack; the other accuracies are measured. "
            f"{len(lines)} methods, {settings['test']} test images.",
            "",
            comparison_markdown(lines, settings),
            "",
            *picture("brackets", "α_lim by radius, bracketed"),
            "## Table 2: corruptions",
            "",
            f"15 corruptions at severities {settings['severities']}, our own implementation.",
            "",
            corruption_markdown(lines),
            "",
            "## Figure 4: Gaussian noise",
            "",
            *picture("noise", "Accuracy by signal-to-noise ratio"),
            "## Figure 5: α_lim by radius, as published (Monte-Carlo) and by ascent",
            "",
            *picture("figure_5", "α_lim by radius and method"),
        ]
    parts += ["## Table 1: what each method bounds, after the paper", "", TABLE_1, ""]
    for heading, names in (("Figures 1 and 3: pairs", ("pairs_l2", "pairs_linf")),):
        found = [records[n] for n in names if n in records]
        if found:
            parts += [f"## {heading}", "", *(pairs_text(r) for r in found), ""]
            if "pairs_l2" in records:
                took, more = found[0]["took"], (1e6 / found[0]["samples"]) ** 2
                parts += [
                    "Time grows as the square of the number of samples, memory linearly: 10⁶ "
                    f"samples take {more:.0f} times as long as the l2 line, "
                    f"{more * took['cpu_seconds'] / 3600:.0f} CPU hours, and at most "
                    f"{1e6 / found[0]['samples'] * took['peak_gib']:.0f} GiB.",
                    "",
                ]
            for record in found:
                write_csv(out / f"{record['name']}.csv", record["rows"])
                parts += picture(f"{record['name']}", "Share of incompatible pairs by slope")
    if "sigmoid" in records:
        record = records["sigmoid"]
        parts += [
            "## Figure 2: the sigmoid",
            "",
            f"The chord from ±10 touches the curve at distance {number(record['touch'], 6)}; "
            f"ascent is within {record['error']:.0e} of the closed form at every radius.",
            "",
            *picture("sigmoid", "α_lim of the sigmoid"),
        ]
    if "linear" in records:
        write_csv(out / "linear.csv", records["linear"]["rows"])
        parts += [
            "## Linear maps: how far sampling falls behind",
            "",
            "Ten outputs, 2 points, 1000 directions.",
            "",
            linear_markdown(records["linear"]),
            "",
        ]
    if any(n in records for n in CHAINS):
        parts += [
            "## Dense chains: proofs ball by ball, and Proposition 1",
            "",
            "784-50-20-10, leaky slope 0.1; Monte-Carlo / ascent / proof of the softmax in l2. Far "
            "from the boundary the proof uses the slopes of the ball around the point. The "
            "design's gain of 4 is before the logits' scale of 2.5.",
            "",
            chain_markdown(records, settings),
            "",
            "Sampled, so that a product can fall below the truth. The proof of the proposition "
            "does not need α_l ≤ 1.",
            "",
            layerwise_markdown(records),
            "",
        ]
    parts += ["## Which claims of the paper hold here", ""]
    parts += [f"- {line}" for line in findings(records, settings)]
    if "vanilla" in records:
        parts += ["", "## Limits", "", *(f"- {line}" for line in limits(records, settings))]
    broken = [text for record in records.values() for text in problems(record)]
    parts += ["", "## Proofs against measurements", ""]
    parts += [f"- CONTRADICTION: {text}" for text in broken] or [
        "On every model, point and radius: Monte-Carlo ≤ ascent ≤ certified. No attack broke a "
        "certificate."
    ]
    parts += ["", "## How it was made", "", f"- command: `{how['command']}`"]
    parts += [f"- {key}: {how[key]}" for key in ("date", "machine", "data")]
    parts += [f"- versions: {', '.join(f'{k} {v}' for k, v in how['versions'].items())}"]
    parts += [f"- settings: {json.dumps(settings)}", ""]
    text = "\n".join(parts)
    write_text(out / "results.json", json.dumps(plain({"how": how}), indent=1) + "\n")
    write_text(out / "RESULTS.md", text)
    return text
