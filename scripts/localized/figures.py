"""Figures of `localized/rebuild.py`, from its records alone."""

from __future__ import annotations

from localized.models import METHODS
from tf_lyapunov.evaluation.drawing import new_figure, save, style
from tf_lyapunov.evaluation.incompatibility import incompatibility_figure
from tf_lyapunov.evaluation.measures import SuiteResult, noise_figure

_COLOURS = ("#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#aa4499", "#009e73", "#444b5a", "#7a5c00")


def draw_all(records, settings, out):
    """Writes the figures that the records allow; returns their names."""
    made = {}
    models = {n: records[n] for n in METHODS if n in records}
    if "vanilla" in models:
        suites = {r["label"]: SuiteResult(r["cells"]) for r in models.values()}
        made["noise"] = noise_figure(suites)
        made["figure_5"] = figure_5(models)
        made["brackets"] = brackets(records)
    for name in ("pairs_l2", "pairs_linf"):
        if name in records:
            rows = [{**r, "within": float(r["within"])} for r in records[name]["rows"]]
            made[name] = incompatibility_figure({settings["dataset"]: rows})
    if "sigmoid" in records:
        made["sigmoid"] = sigmoid(records["sigmoid"])
    for name, figure in made.items():
        save(figure, out / f"{name}.svg")
    return set(made)


def _softmax(record):
    found = next(c for c in record["curves"] if (c["outputs"], c["norm"]) == ("softmax", "l2"))
    return found["rows"]


def brackets(records):
    """Monte-Carlo, ascent and proof of a few networks, one panel each."""
    wanted = ("vanilla", "pgd", "l2nn", "pgd_spectral", "chain", "chain_spectral")
    chosen = [records[n] for n in wanted if n in records]
    with style("light"):
        figure, panels = new_figure(3.1 * min(len(chosen), 3), 2.9 * -(-len(chosen) // 3),
                                    min(len(chosen), 3), -(-len(chosen) // 3))  # fmt: skip
        for axes in panels[len(chosen) :]:
            axes.set_axis_off()
        for axes, record in zip(panels, chosen, strict=False):
            rows = _softmax(record)
            radii = [row["radius"] for row in rows]
            values = {k: [float(row[k]) for row in rows] for k in
                      ("monte_carlo", "gradient", "certified")}  # fmt: skip
            axes.fill_between(radii, values["gradient"], values["certified"], alpha=0.15,
                              color="#00795b", linewidth=0)  # fmt: skip
            axes.plot(radii, values["certified"], "-^", color="#00795b", label="proved above")
            axes.plot(radii, values["gradient"], "-o", color="#0072b2", label="ascent")
            axes.plot(radii, values["monte_carlo"], "--s", color="#d55e00",
                      label="Monte-Carlo, as published")  # fmt: skip
            axes.set(title=record["label"], xscale="log", yscale="log", xlabel="r (l2)")
            _radii(axes, radii)
        panels[0].set_ylabel("α_lim of the softmax")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return figure


def _radii(axes, radii):
    """Ticks at the radii alone: minor ones double the file."""
    axes.minorticks_off()
    axes.set_xticks(radii, [f"{r:g}" for r in radii])


def figure_5(models):
    """All methods in one picture, sampled on the left, ascended on the right."""
    with style("light"):
        figure, panels = new_figure(8.4, 3.8, 2)
        titles = (("monte_carlo", "Monte-Carlo, as published"), ("gradient", "ascent"))
        for axes, (key, title) in zip(panels, titles, strict=True):
            for record, colour in zip(models.values(), _COLOURS, strict=False):
                rows = _softmax(record)
                axes.plot([r["radius"] for r in rows], [r[key] for r in rows], "-o",
                          label=record["label"], color=colour)  # fmt: skip
            axes.set(title=title, xscale="log", xlabel="r (l2)", ylabel="α_lim of the softmax")
            axes.set_ylim(bottom=0)
            _radii(axes, [r["radius"] for r in rows])
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return figure


def sigmoid(record):
    """Figure 2: closed form, ascent and proof."""
    with style("light"):
        figure, (axes,) = new_figure(5, 3.2)
        rows = record["rows"]
        radii = [row["radius"] for row in rows]
        axes.plot(radii, [row["exact"] for row in rows], color="#1f2430", label="closed form")
        axes.plot(radii, [row["gradient"] for row in rows], "o", color="#0072b2", label="ascent")
        axes.plot(radii, [float(row["certified"]) for row in rows], "-^", color="#00795b",
                  label="proved above")  # fmt: skip
        axes.set(xlabel="r", ylabel="α_lim(σ, r)")
        axes.legend(loc="best")
        return figure
