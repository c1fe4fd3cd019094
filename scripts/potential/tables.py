"""Tables, figures and text of `potential/rebuild.py`, from its records alone."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from potential.jobs import (
    MNIST,
    RELAXED,
    TABLE_2,
    TABLE_3,
    TABLE_4,
    TABLE_5,
    small_cifar_jobs,
)
from potential.training import ATTACKED, CURVE, PGD_STEPS
from tf_lyapunov.evaluation.drawing import new_figure, percent_formatter, save, style
from tf_lyapunov.evaluation.wording import number, percent, percent_down, round_up
from tf_lyapunov.writing import write_text

HEADER = ("layers", "clean", "36/255", "72/255", "108/255")
BENCHMARK = Path(__file__).resolve().parents[1] / "results" / "benchmark.json"
CIFAR_HEADER = ("network", "clean", "36/255", "72/255", "108/255", "epochs", "s an epoch")
PUBLISHED = {"table_2": TABLE_2, "table_3": TABLE_3}
MINUTES_ON_THEIR_GPU = "hours on the authors' GPU"


def write_results(out: Path) -> int:
    """Writes RESULTS.md, CSV and figures from `out`; the number of broken certificates."""
    paths = sorted((out / "models").glob("*.json"))
    records = [json.loads(p.read_text(encoding="utf-8")) for p in paths]
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    parts = {}
    for record in records:
        parts.setdefault(record["identity"]["part"], []).append(record)
    broken = sum(r["broken"] for r in records)
    text = [_introduction(facts, broken), _mnist(parts.get("mnist", []))]
    text += [_families(parts), _costs(), _depth(out / "depth.json")]
    text.append(_small_cifar(parts.get("cifar_small", []), facts["cifar"]))
    text += [_speed(out / "epoch_time.json"), _cifar(parts)]
    write_text(out / "RESULTS.md", "\n\n".join(t for t in text if t) + "\n")
    if records:
        write_text(out / "networks.csv", _csv(records))
    try:
        _figures(parts, out)
    except ImportError as error:  # a machine with a GPU and without Matplotlib
        print(f"No figures: {error}")
    return broken


def _introduction(facts, broken):
    versions = facts["machine"]
    backend = f"{versions['backend']}, Keras {versions['keras']}, Python {versions['python']}"
    machine = f"{versions['cores']} cores of {versions['cpu'] or 'an unnamed CPU'}, {backend}"
    verdict = "no attack broke a certificate" if not broken else f"{broken} CERTIFICATES BROKEN"
    lines = [
        "# 1-Lipschitz layers: convex potential, Cayley, SOC and later ones",
        "Command: `python scripts/potential/rebuild.py --data-dir DIR --cifar DIR --only "
        "mnist,families,equal_time,depth,cifar_small,epoch_time`"
        + (" `--quick`: a smoke test, no result." if facts["quick"] else "")
        + f"  \nMachine: {machine}; shared with other jobs, so read CPU seconds, not wall time."
        f"  \nDate: {facts['date']}. Data: MNIST of TensorFlow Datasets, x/255 - 0.5; radii in l2, "
        "pixels in [0, 1].",
        "\"Certified\" is what `certify` proves from the weights as stored, in float64, with the "
        "rounding of float32 evaluation included, over ℝⁿ (no clipping), by the margins of "
        "pairs of classes; percentages are rounded down. PGD: "
        f"{PGD_STEPS} steps of 2.5·radius/{PGD_STEPS}; {verdict}.",
    ]  # fmt: skip
    return "\n\n".join(lines)


def _mnist(records):
    if not records:
        return ""
    rows = [_accuracies(f"**ours, {_family(r)}**", r) for r in records]
    rows += [_row(f"published, {name}", values) for name, values in MNIST.items()]
    record = records[0]
    seconds, identity = record["seconds"], record["identity"]
    pgd = ", ".join(
        f"{percent(v)} at {number(r, 3)}" for r, v in zip(ATTACKED, record["pgd"], strict=False)
    )
    loss = identity["loss"]
    return "\n\n".join([
        "## MNIST, 2C2F: c(16,4,2).c(32,4,2).f100.f10",
        _table(HEADER, rows),
        "Published: LipKernel paper, Table 1, networks trained for gain 1. Ours: "
        f"{identity['epochs']} epochs of the 60,000 images, batch {identity['batch_size']}, Adam "
        f"{identity['learning_rate']} (triangular), cross-entropy of temperature "
        f"{loss.get('temperature')} and margin {loss.get('margin')}, last layer normalised; "
        f"{seconds['cpu']:.0f} CPU seconds ({seconds['wall']:.0f} s wall beside other jobs), "
        f"{seconds['cpu_per_epoch']:.1f} an epoch; {record['parameters']} parameters; proved gain "
        f"of the logits {round_up(record['gain_upper_bound'])}; certifying 10,000 images "
        f"{record['certify_cpu']:.0f} CPU s. No image was held out: family, temperature, margin "
        "and rate were chosen in five runs of two epochs judged on the test images; read the last "
        "digit accordingly."
        f" Accuracy of the first {identity['attacked']} test images under PGD: {pgd}.",
        "![Certified accuracy against radius](certified.svg)",
    ])  # fmt: skip


def _families(parts):
    text = []
    for part, title in (("equal_epochs", "equal epochs"), ("equal_time", "equal CPU time")):
        records = sorted(parts.get(part, []), key=lambda r: -r["certified"][2])
        if not records:
            continue
        header = (*HEADER, "epochs", "CPU s", "CPU s an epoch", "parameters")
        rows = [
            (*_accuracies(_family(r), r), len(r["epochs"]), f"{r['seconds']['cpu']:.0f}",
             f"{r['seconds']['cpu_per_epoch']:.2f}", r["parameters"])
            for r in records
        ]  # fmt: skip
        text += [f"## All families of layers at {title}", _table(header, rows)]
    if not text:
        return ""
    first = parts["equal_epochs"][0]["identity"]
    text.append(
        f"The first {first['train']} training and {first['test']} test images, 2C2F, one loss and "
        f"schedule (peak {first['learning_rate']}), one seed: a ranking of how fast the layers "
        "learn, not of what they reach. CPU s include compilation, CPU s an epoch do not "
        "(but for a single one). "
        + _equal_time(parts)
        + "Potential and SDP layers keep their width: images are rearranged and filled up with "
        "zero channels, so they have more parameters. skew: filters of side 5, Cayley's dense "
        "layers. bjorck: spectral convolutions."
    )
    text.append("![Families](families.svg)")
    return "\n\n".join(text)


def _equal_time(parts):
    if "equal_time" not in parts:
        return "Not run: the table at equal CPU time (`--only equal_time`). "
    return "Equal time: the epochs that fit into what the median family's took above. "


def _costs():
    """What `scripts/benchmark.py --only layers` found, where its results are kept."""
    if not BENCHMARK.exists():
        return ""
    section = json.loads(BENCHMARK.read_text(encoding="utf-8")).get("layers")
    if section is None:
        return ""
    ratios = ("epoch ratio, CPU", "epoch ratio, wall", "predict ratio, CPU", "predict ratio, wall")
    rows = [
        (r["model"], r["layers"], r["to"], *(f"{r[k]:.2f}" for k in ratios))
        for r in section["rows"]
    ]
    header = ("model", "layers", "ratio to", *ratios)
    machine, deel = section["machine"], section["deel_lip"]
    text = (
        "MLP 784-256-128-10 and convolutions 16-32-64 on 16×16, medians of rounds: "
        "`python scripts/benchmark.py --only layers`, "
        f"{machine['cores']} cores of a shared {machine['cpu']}, {machine['date']}, ±20%."
    )
    text += "".join(
        f" {r['layers']}: {r['epoch ratio, CPU']:.2f} times the CPU time of its {r['to']}."
        for r in deel.get("rows", ())
    )
    text += f" {deel['skipped']}." if "skipped" in deel else ""
    return "\n\n".join(["## Cost beside plain layers", _table(header, rows), text])


def _depth(path):
    if not path.exists():
        return ""
    records = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        (r["depth"], "yes" if r["rematerialised"] else "no", f"{r['losses'][0]:.3f}",
         f"{r['losses'][-1]:.3f}", len(r["losses"]), f"{r['cpu_per_step']:.1f}",
         f"{r['mb'] - r['mb_before']:.0f}")
        for r in records
    ]  # fmt: skip
    header = ("depth", "rematerialised", "first loss", "last loss", "steps", "CPU s a step", "MB")
    return "\n\n".join([
        "## Depth (Figure 3's networks on 8×8 digits, 30 channels)",
        _table(header, rows),
        "Convex potential convolutions 3×3 with the proven bound (`norm=\"bound\"`), batch 32, "
        "multi-margin 0.7, Adam 1e-3; MB is the growth of the largest resident size over training.",
    ])  # fmt: skip


def _small_cifar(records, copy):
    if not records:
        return ""
    rows = [
        (*_measured(r), r["parameters"], f"{r['seconds']['cpu']:.0f}",
         *(percent(v) for v in r["pgd"][:3]))
        for r in sorted(records, key=lambda r: -r["certified"][0])
    ]  # fmt: skip
    pgd = tuple(f"PGD at {number(r, 3)}" for r in ATTACKED[:3])
    identity = records[0]["identity"]
    loss = identity["loss"]
    return "\n\n".join([
        "## CIFAR-10 on two cores: small networks of the kinds of Table 2",
        _table((*CIFAR_HEADER, "parameters", "CPU s", *pgd), rows),
        f"Test images: the first {identity['test']}, under PGD {identity['attacked']}. One seed, "
        f"{identity['epochs']} epochs, batch {identity['batch_size']}, crops and flips, Adam "
        f"{identity['learning_rate']} (triangular), cross-entropy of temperature "
        f"{loss['temperature']} and margin {loss['margin']}, last layer normalised. Far from the "
        "published setting of 200 epochs of all 50,000 images with larger networks: it shows that "
        "the guarantees hold on these images, not what the layers reach."
        + (f" Data: {copy}." if copy else ""),
        "![CIFAR-10](cifar_small.svg)",
    ])  # fmt: skip


def _speed(path):
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        (r["network"], r["parameters"], f"{r['wall_per_epoch']:.0f}", f"{r['cpu_per_epoch']:.0f}",
         f"{r['wall_ratio']:.2f}", f"{r['cpu_ratio']:.2f}")
        for r in found["rows"]
    ]  # fmt: skip
    header = ("network", "parameters", "wall s", "CPU s", "wall ratio", "CPU ratio")
    machine = found["machine"]
    return "\n\n".join([
        "## Time of an epoch of CIFAR-10 beside a plain ResNet of as many parameters",
        _table(header, rows),
        f"Steps of batch {found['batch']} with Adam on random images, times 50,000 images; medians "
        f"of rounds in turns on {machine['cores']} cores of {machine['cpu'] or 'an unnamed CPU'}, "
        f"{machine['backend']}, {machine['date']}. Ratios are to the ResNet below, which has its "
        "parameters in convolutions; most of CPL-S's are in dense layers. \"Without norms\": "
        "`norm=None`, which guarantees nothing.",
    ])  # fmt: skip


def _cifar(parts):
    text = ["## CIFAR-10 and CIFAR-100: Tables 2-5, Figures 1-5, Appendix D.2"]
    for part, table in PUBLISHED.items():
        rows = []
        for label, values in table.items():
            rows.append((*_row(f"{label}, published", values[:4]), 200, values[4] or ""))
            rows += [_measured(r) for r in parts.get(part, []) if _label(r) == label]
        text += [f"### {part.replace('_', ' ').title()}", _table(CIFAR_HEADER, rows)]
    for part, table in (("table_4", TABLE_4), ("table_5", TABLE_5)):
        rows = []
        for size, line in table.items():
            for batch, values in zip((64, 128, 256), line, strict=True):
                label = f"CPL-{size}, batch {batch}"
                rows.append((*_row(f"{label}, published", values[:4]), 200, values[4]))
                rows += [_measured(r) for r in parts.get(part, []) if _label(r) == label]
        text += [f"### {part.replace('_', ' ').title()}", _table(CIFAR_HEADER, rows)]
    for part in ("figure_3", "figures_4_5"):
        if part in parts:
            rows = [_measured(r) for r in parts[part]]
            text += [f"### {part.replace('_', ' ').title()}", _table(CIFAR_HEADER, rows)]
    rows = []
    for step, (clean, pgd) in RELAXED.items():
        rows.append((f"h = {step}, published", f"{clean:.1f}%", f"{pgd:.1f}%"))
        rows += [
            (f"h = {step}, ours", percent(r["clean"]), percent(r["pgd"][0]))
            for r in parts.get("relaxed", [])
            if r["identity"]["model"]["step"] == step
        ]
    text += ["### Appendix D.2", _table(("step", "clean", "PGD at 36/255"), rows)]
    text.append(_needs())
    return "\n\n".join(text)


def _needs():
    """What a full run would cost, from the published seconds per epoch."""
    lines = []
    for name, rows in (
        ("Table 2, Figures 1 and 2", [v[4] for v in TABLE_2.values() if v[4]]),
        ("Table 3, Figures 1 and 2", [v[4] for v in TABLE_3.values() if v[4]]),
        ("Table 4", [v[4] for line in TABLE_4.values() for v in line]),
        ("Table 5", [v[4] for line in TABLE_5.values() for v in line]),
    ):
        hours = 200 * sum(rows) / 3600
        lines.append(f"- {name}: {len(rows)} networks, {hours:.0f} {MINUTES_ON_THEIR_GPU}")
    lines += [
        f"- Figures 4 and 5: 12 networks, {200 * 22 * 12 / 3600:.0f} {MINUTES_ON_THEIR_GPU}",
        f"- Appendix D.2: 3 networks, {200 * 22 * 3 / 3600:.0f} {MINUTES_ON_THEIR_GPU}",
        "- Figure 3: 5 networks of 100 to 1000 layers, no published time",
    ]
    return (
        "Rows marked \"ours\" with fewer than 200 epochs are smoke runs or cut short. Not run here "
        "for want of a GPU; 200 epochs of one seed (the paper averages three) would take:\n\n"
        + "\n".join(lines)
        + "\n\n`KERAS_BACKEND=jax python scripts/potential/rebuild.py --data-dir DIR --only "
        "table_2` on a machine with a GPU, with `DIR/cifar10.npz` written by `--prepare cifar10` "
        "elsewhere. `--cifar DIR` reads a TFDS copy of CIFAR-10 made of JPEG files: close to the "
        "published data, not comparable to the last digit."
    )  # fmt: skip


def _family(record):
    return record["identity"]["model"].get("family", record["identity"]["model"]["name"])


def _label(record):
    """The table's name of a CIFAR network."""
    identity, model = record["identity"], record["identity"]["model"]
    if identity["part"] == "cifar_small":
        return {job.name: job.label for job in small_cifar_jobs(False)}[identity["name"]]
    if model["name"] == "kw_large":
        return "Cayley (KW3)"
    if model["name"] == "lip_conv_net":
        return f"SOC-{model['depth']}"
    batch = (
        f", batch {identity['batch_size']}" if identity["part"] in ("table_4", "table_5") else ""
    )
    return f"CPL-{model['size']}{batch}"


def _measured(record):
    identity = record["identity"]
    images = f" ({identity['train']} images)" if identity["train"] else ""
    seconds = f"{record['seconds']['wall_per_epoch']:.1f}"
    name = f"**{_label(record)}, ours{images}**"
    if identity["part"] == "figure_3":
        name = f"**{identity['model']['depth']} layers**"
    return (*_accuracies(name, record), len(record["epochs"]), seconds)


def _accuracies(name, record):
    return (name, percent(record["clean"]), *map(percent_down, record["certified"]))


def _row(name, values):
    return (name, *(f"{v:.1f}%" for v in values))


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _csv(records):
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    pgd = [f"pgd_{r:.4f}" for r in ATTACKED]
    names = ["name", "part", "train", "epochs", "clean", "certified_36", "certified_72"]
    writer.writerow([*names, "certified_108", *pgd, "gain_upper_bound", "parameters", "cpu_s"])
    for r in records:
        identity = r["identity"]
        attacked = [*r["pgd"], *[""] * (len(ATTACKED) - len(r["pgd"]))]
        row = [identity["name"], identity["part"], identity["train"], len(r["epochs"]), r["clean"]]
        tail = [r["gain_upper_bound"], r["parameters"], round(r["seconds"]["cpu"], 1)]
        writer.writerow([*row, *r["certified"], *attacked, *tail])
    return stream.getvalue()


def _figures(parts, out):
    """Certified accuracy against the radius; the CIFAR figures where there are networks."""
    if "mnist" in parts:
        save(_curves({_family(r): r for r in parts["mnist"]}, 1.5, MNIST), out / "certified.svg")
    panels = {
        title: {_family(r): r for r in parts[part]}
        for part, title in (("equal_epochs", "equal epochs"), ("equal_time", "equal CPU time"))
        if part in parts
    }
    if panels:
        save(_panels(panels, 1.0), out / "families.svg")
    if "cifar_small" in parts:
        networks = {_label(r): r for r in parts["cifar_small"]}
        save(_curves(networks, 1.0, {}), out / "cifar_small.svg")
    for part, name in (("table_2", "figure_1_cifar10"), ("table_3", "figure_1_cifar100")):
        if part in parts:
            networks = {_label(r): r for r in parts[part]}
            save(_curves(networks, 1.0, PUBLISHED[part]), out / f"{name}.svg")
            pgd = name.replace("figure_1", "figure_2")
            save(_attacked(networks), out / f"{pgd}.svg")
    if "figures_4_5" in parts:
        margins = {str(r["identity"]["loss"]["margin"]): r for r in parts["figures_4_5"]}
        save(_curves(margins, 1.0, {}), out / "figure_4.svg")
        save(_attacked(margins), out / "figure_5.svg")
    if "figure_3" in parts:
        save(_training(parts["figure_3"]), out / "figure_3.svg")


def _curves(records, most, published):
    """Proved accuracy against the radius as lines, published rows as points, PGD as crosses."""
    with style("light") as colours:
        figure, (axes,) = new_figure(7, 3.8)
        for index, (name, record) in enumerate(records.items()):
            colour = [colours["certified"], *colours["others"]][index % 5]
            axes.plot(CURVE, record["curve"], color=colour, label=f"{name}, certified (proved)")
            if record["pgd"]:
                pgd = f"{name}, under PGD (measured)"
                axes.plot(ATTACKED, record["pgd"], "x", color=colour, label=pgd)
        radii = (0.0, 36 / 255, 72 / 255, 108 / 255)
        for name, marker in zip(published, "osD^vP<>*", strict=False):
            shares = [v / 100 for v in published[name][:4]]
            axes.plot(
                radii, shares, marker, mfc="none", color="#444b5a", label=f"published: {name}"
            )
        _finished(axes, most)
        return figure


def _panels(panels, most):
    with style("light"):
        figure, all_axes = new_figure(9, 3.8, columns=len(panels))
        for axes, (title, records) in zip(all_axes, panels.items(), strict=True):
            for index, (name, record) in enumerate(records.items()):
                axes.plot(CURVE, record["curve"], color=f"C{index}", label=name)
            _finished(axes, most)
            axes.set_title(title)
        return figure


def _attacked(records):
    with style("light"):
        figure, (axes,) = new_figure(7, 3.8)
        for index, (name, record) in enumerate(records.items()):
            points = [record["clean"], *record["pgd"]]
            axes.plot((0.0, *ATTACKED), points, "-o", color=f"C{index}", label=name)
        _finished(axes, max(ATTACKED))
        return figure


def _training(records):
    with style("light"):
        figure, (axes,) = new_figure(7, 3.8)
        for index, r in enumerate(records):
            epochs = [e["epoch"] for e in r["epochs"]]
            label = f"{r['identity']['model']['depth']} layers"
            axes.semilogx(epochs, [e["accuracy"] for e in r["epochs"]], f"C{index}", label=label)
        axes.set(xlabel="epoch", ylabel="training accuracy", ylim=(0, 1))
        axes.legend()
        return figure


def _finished(axes, most):
    axes.set(xlabel="radius (l2)", ylabel="accuracy", xlim=(0, most), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(percent_formatter())
    axes.legend(fontsize=8)
