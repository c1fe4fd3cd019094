"""The words and tables of `perturbation/rebuild.py`'s RESULTS.md, from its results."""

from __future__ import annotations

_NO_NIN = (
    "CIFAR-NIN (paper: bound 1.58e-17 and 0.313 found by FGS, per pixel) is not measured: training "
    "costs 12 ms of a CPU per image (measured), 4.5 hours for 30 epochs of 45000 images, which "
    "this run did not have. `--cifar DIR` trains and measures it.\n\n"
)
_NIN_PICTURES = "![Figure 5.9](figure_5_9.png)\n\n![Figure 5.10b](figure_5_10b.png)\n\n"
TITLE = "# Lower bounds beside perturbations found: published and measured"


def results_text(results) -> str:
    """Markdown of all parts that `results` holds."""
    machine = results["machine"]
    parts = [
        TITLE,
        f"Command: `{results['command']}` ({sum(results['CPU seconds'].values()):.0f} CPU seconds "
        f"on {machine['cpu']}, {machine['backend']} backend, {machine['date']}). All numbers are "
        "l2 norms.",
        _linear(results["Table 3.1"]),
        _mlps(results["Table 4.2"]),
        _trained(results["Table 4.3"]),
        _curves(results["Figure 4.3"]),
    ]
    lenets = {n: results[n] for n in sorted(results) if n.startswith(("LeNet", "CIFAR"))}
    if lenets:
        parts.append(_lenet(lenets))
    networks = {**results["Table 4.3"], "LeNet-5": results.get("LeNet-5", {})}
    parts.append(_around({n: row["around"] for n, row in networks.items() if "around" in row}))
    return "\n\n".join(parts) + "\n"


def _linear(rows):
    lines = [
        [
            number, row["inputs each"], row["classes"], _pm(row["interval"]),
            _pm(row["parameters"]), _three(row["published"]), _stats(row["as the paper"]),
            _stats(row["FGS with ε = 1"]), _stats(row["best - sound"]), row["below sound"],
        ]
        for number, row in enumerate(rows, 1)
    ]  # fmt: skip
    head = (
        "no.", "inputs", "classes", "samples", "parameters", "published", "FGS or FGV - bound",
        "abs(√d - bound)", "smallest found - bound", "violations",
    )  # fmt: skip
    return (
        "## Table 3.1: random linear classifiers\n\n"
        "Mean / median / standard deviation over all classifiers and samples. The bound is exact "
        "here: what is left is what the attack loses (and float32). `abs(√d - bound)` is the "
        "deviation of a sign step of size 1 that is not made smaller.\n\n"
        + _table(head, lines) + "\n\n![Figure 3.2](figure_3_2.svg)"
    )  # fmt: skip


def _mlps(rows):
    lines = [
        [
            number, row["inputs each"], row["layers"], row["units"], row["classes"],
            _pm(row["interval"]), _pm(row["parameters"]), _three(row["published"]),
            _stats(row["as the paper"]), _stats(row["best - sound"]),
            _median(row["best / sound"]), f"{row['found']}/{row['inputs']}",
            row["below published"], row["below sound"],
        ]
        for number, row in enumerate(rows, 1)
    ]  # fmt: skip
    head = (
        "no.", "inputs", "layers", "units", "classes", "samples", "parameters", "published",
        "FGS or FGV - published bound", "smallest found - sound bound", "median ratio", "found",
        "below published bound", "below sound bound",
    )  # fmt: skip
    return (
        "## Table 4.2: random MLPs\n\n"
        "tanh layers (the text names no activation), then the output layer. Mean / median / "
        "standard deviation over inputs on which a perturbation was found; none is limited in "
        "size, and where gradients vanish (large samples or parameters) few are found at all. A "
        "perturbation counts as below a bound if float64 confirms it.\n\n"
        + _table(head, lines) + "\n\n![Figure 4.1](figure_4_1.svg)"
    )  # fmt: skip


def _trained(rows):
    lines = [
        [
            name, row["net"], f"{row['test accuracy']:.1%}",
            " / ".join(_number(v) for v in row["published"]), _five(row["as the paper"]),
            _five(row["best - sound"]), _quartile(row["bracket"], "published"),
            _quartile(row["bracket"], "lower"), _quartile(row["bracket"], "upper"),
            _quartile(row["bracket"], "ratio"), row["bracket"]["violations"],
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    head = (
        "data", "net", "test accuracy", "published", "FGS or FGV - published bound",
        "smallest found - lower bound", "published bound", "lower bound", "smallest found",
        "ratio", "below published bound",
    )  # fmt: skip
    return (
        "## Table 4.3: trained tanh MLPs\n\n"
        "Deviations: mean / median / standard deviation / least / greatest. Then medians: of the "
        "bound as published, of the larger of sound bound and certified radius, of the smallest "
        "perturbation that FGS, FGV, DeepFool, DDN and FMN found, and of the ratio of the last "
        "two. Adam, cross-entropy; Iris and Wine: all samples, Spambase: 1000 or fewer test "
        "samples.\n\n"
        + _table(head, lines)
        + "\n\n![Figure 4.2](figure_4_2.svg)\n\n![Bracket of every Wine sample](bracket.svg)\n\n"
        "![Both ends of the brackets](histogram.svg)"
    )  # fmt: skip


def _curves(data):
    lines = [
        [
            name, kind, _number(point["weight"]), f"{point['accuracy']:.1%}",
            f"{point['error rate']:.1%}", _number(point["found"]), _number(point["sound bound"]),
        ]
        for name, kinds in data.items()
        for kind, points in kinds.items()
        for point in points
    ]  # fmt: skip
    head = ("data", "κ of", "ℓ", "accuracy", "error rate", "smallest found", "sound bound")
    pictures = "\n\n".join(f"![Figure 4.3, {name}](figure_4_3_{name.lower()}.svg)" for name in data)
    return (
        "## Figure 4.3: loss - ℓ·κ of the output layer\n\n"
        "Accuracy on all samples; error rate: share of 300 samples whose decision FGS (l∞) or FGV "
        "(l2) changes with ε ≤ 1; medians of the smallest perturbation found and of the sound "
        "bound. As published, κ is the distance from the boundary of the class that the network "
        "decides for; “true class” gives it a sign, so that mistakes are not rewarded.\n\n"
        + _table(head, lines) + "\n\n" + pictures
    )  # fmt: skip


def _lenet(rows):
    first = rows["LeNet-5"]
    pixel = first["per pixel"]
    lines = [
        [
            name, _share(row["published"][0]), f"{row['accuracy']:.2%}",
            " / ".join(_number(v) for v in row["published"][1:3]),
            " / ".join(_number(row["epsilon"][key]) for key in ("mean", "median")),
            _share(row["published"][3]), f"{row['rate']:.1%}",
            _number(row["per pixel"]["published bound"]), _number(row["per pixel"]["sound bound"]),
            _median(row["sound / published"]), _median(row["found / published"]),
            _median(row["found / sound"]),
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    head = (
        "network", "accuracy, paper", "accuracy", "ε, paper (mean / median)", "ε", "rate, paper",
        "rate", "published bound per pixel", "sound bound per pixel", "sound / published",
        "found / published", "found / sound",
    )  # fmt: skip
    return (
        "## Tables 5.1 to 5.3: LeNet-5 and LRN on MNIST\n\n"
        f"{first['training images']} training images, three epochs of Adam; the first "
        f"{first['images']} correctly classified test images. Norms in grey levels of 255. ε: FGS, "
        "at most 100. The last three columns are medians of ratios."
        + (_nin(rows["CIFAR-NIN"]) if "CIFAR-NIN" in rows else "")
        + "\n\n"
        + _table(head, lines)
        + "\n\nLeNet-5, norm divided by 784 pixels, paper / measured: published bound 7.27e-8 / "
        f"{_number(pixel['published bound'])}; our sound bound {_number(pixel['sound bound'])}, "
        f"{_number(pixel['sound bound'] / pixel['published bound'])} times the published rules' on "
        f"the same network and {_number(pixel['sound bound'] / 7.274294e-8)} times the printed "
        f"number; FGS 0.933 / {_number(pixel['found by FGS'])}; smallest found "
        f"{_number(pixel['smallest found'])}.\n\n"
        + ("" if "CIFAR-NIN" in rows else _NO_NIN)
        + "![Brackets of LeNet-5](bracket_lenet.svg)\n\n![Figure 5.10](figure_5_10a.png)\n\n"
        "![Figure 5.11](figure_5_11.svg)\n\n![Figure 5.8](figure_5_8.png)\n\n"
        "![Figure 2.5](figure_2_5.png)\n\n"
        + (_NIN_PICTURES if "CIFAR-NIN" in rows else "")
        + _scaling(first["kernels scaled"])
    )


def _around(rows):
    columns = {
        "proved by rules of layers": "layers", "proved by relaxations": "relaxations",
        "smallest found": "smallest found", "found / rules of layers": "found / layers",
        "found / relaxations": "found / relaxations",
    }  # fmt: skip
    lines = [
        [name, row["inputs"], _number(row["seconds"])]
        + [_quartile(row, key) for key in columns.values()]
        for name, row in rows.items()
    ]
    return (
        "## Brackets before and after relaxations around each input\n\n"
        "All tables above prove by rules of layers alone (`time_budget=0`). Here the first inputs "
        "for which a perturbation was found, with as many seconds for each as stated. Medians.\n\n"
        + _table(("data", "inputs", "seconds each", *columns), lines)
    )


def _nin(row):
    return (
        f" CIFAR-NIN (`{row['options']}`): {row['training images']} training images, "
        f"{row['epochs']} epochs, {row['images']} test images of a copy made of JPEG files"
        + (f", measured on {row['date']}." if "date" in row else ".")
    )


def _scaling(rows):
    lines = [
        [row["kernels"], _number(0.9 ** -row["kernels"])]
        + [_number(row[key]) for key in ("sound bound", "found")]
        for row in rows
    ]
    head = ("kernels scaled by 0.9", "claimed", "sound bound", "smallest found")
    return (
        "Figures 5.12 and 5.13 are formulas, which hold κ of the output layer fixed. It is not: "
        "the logits shrink with the kernels. Medians on LeNet-5, relative to the network as "
        "trained:\n\n" + _table(head, lines)
        + "\n\n![Figure 5.12](figure_5_12.svg)\n\n![Figure 5.13](figure_5_13.svg)"
    )  # fmt: skip


def _table(head, lines):
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def _number(value):
    return "none" if value is None else f"{value:.3g}"


def _share(value):
    return "not given" if value is None else f"{value:.2%}"


def _pm(value):
    return f"±{value}"


def _three(values):
    return " / ".join(_number(v) for v in values)


def _stats(found):
    return "none" if found is None else _three(found[key] for key in ("mean", "median", "std"))


def _five(found):
    names = ("mean", "median", "std", "min", "max")
    return "none" if found is None else _three(found[key] for key in names)


def _median(found):
    return "none" if found is None else _number(found["median"])


def _quartile(summary, name):
    return "none" if summary[name] is None else _number(summary[name][1])
