"""The plan as tables for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tf_lyapunov.planning.estimate import GOAL, Plan, Setting

# Fits 80 columns.
_TIGHT = {"box": None, "padding": (0, 1, 0, 0), "header_style": "bold underline"}


def plan_tables(plan: Plan, layers: bool = False) -> Group:
    """Tables of counts, memory, time and alternatives.

    Args:
        plan: `Plan`.
        layers: whether every layer has a row.

    Returns:
        What `rich` prints.
    """
    parts = [_summary(plan)]
    if layers:
        parts.append(_layers(plan))
    parts += [_settings(plan), Text(_notes(plan), style="dim")]
    return Group(*parts)


def _summary(plan):
    totals, chosen, device = plan.totals(), plan.chosen, plan.cluster.device
    table = Table(title=f"{plan.name}: {plan.model} on {plan.cluster}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row(
        "parameters (trainable)", f"{_si(totals['parameters'])} ({_si(totals['trainable'])})"
    )
    table.add_row(
        "FLOPs per sample, forward + backward",
        f"{_si(totals['forward_flops'])} + {_si(totals['backward_flops'])}",
    )
    table.add_row("FLOPs of all guaranteed bounds, once", _si(totals["bound_flops"]))
    table.add_section()
    used = chosen.memory
    for name in ("weights", "gradients", "optimizer", "activations", "constraints"):
        table.add_row(f"memory: {name}", _bytes(getattr(used, name)))
    verdict = "fits" if chosen.fits else "does not fit"
    table.add_row(f"memory: in all, of {_bytes(device.memory)}", f"{_bytes(used.total)}: {verdict}")
    table.add_section()
    table.add_row(
        f"step: compute ({chosen.precision}, batch {chosen.batch})", _time(chosen.step.compute)
    )
    table.add_row(f"step: constraints ({_guarantee(chosen)})", _time(chosen.step.constraints))
    table.add_row("step: all-reduce", _time(chosen.step.all_reduce))
    table.add_row("step with constraints / without", f"{chosen.step.overhead:.3f}")
    if plan.bounds:
        least = "none listed" if plan.least_every is None else f"every {plan.least_every} steps"
        table.add_row(f"bounds for at most {GOAL:.2f}", least)
    table.add_section()
    table.add_row(f"epoch of {plan.examples} examples", _time(chosen.epoch_seconds))
    table.add_row(f"{plan.epochs} epochs", _time(chosen.epoch_seconds * plan.epochs))
    return table


def _layers(plan):
    bounds = {}
    for bound in plan.bounds:
        bounds[bound.name] = bounds.get(bound.name, 0) + bound.flops
    table = Table(title="Per layer and sample", **_TIGHT)
    for column in ("layer", "kind", "weights", "forward", "backward", "kept", "bound", "count"):
        text = column in ("layer", "kind", "count")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    for cost in plan.costs:
        numbers = (
            cost.parameters,
            cost.forward,
            cost.backward,
            cost.kept,
            bounds.get(cost.name, 0),
        )
        table.add_row(cost.name, cost.kind, *(_si(n) for n in numbers), cost.how)
    return table


def _settings(plan):
    table = Table(title=f"Settings at batch {plan.chosen.batch}, and the quickest of all", **_TIGHT)
    columns = ("precision", "batch", "guarantee", "memory", "step", "ratio", "epoch", "")
    for column in columns:
        table.add_column(column, no_wrap=True)
    same = [s for s in plan.settings if s.batch == plan.chosen.batch and s != plan.quickest]
    for setting in [*filter(None, [plan.quickest]), *same]:
        note = "quickest" if setting == plan.quickest else "given"
        table.add_row(
            setting.precision.removeprefix("mixed_"),
            str(setting.batch),
            _guarantee(setting),
            _bytes(setting.memory.total),
            _time(setting.step.total),
            f"{setting.step.overhead:.3f}",
            _time(setting.epoch_seconds),
            "does not fit"
            if not setting.fits
            else note
            if setting == plan.chosen or note == "quickest"
            else "",
        )
    return table


def _guarantee(setting: Setting) -> str:
    return {0: "none", 1: "every step"}.get(setting.every, f"every {setting.every}")


def _notes(plan):
    device = plan.cluster.device
    shares = device.efficiency
    traced = [cost.name for cost in plan.costs if cost.how == "traced"]
    notes = [
        f"{device.name}: peaks, memory and links: {device.source}; shares of the peaks "
        f"(products {shares.product:.2f}, convolutions {shares.convolution:.2f}, memory "
        f"{shares.bandwidth:.2f}): {shares.source}.",
        "Input pipeline, validation and checkpoints are not in it; nothing overlaps the "
        f"all-reduce. Bounds are computed in {plan.dtype}. A batch other than the configured one "
        "changes training: scale the learning rate.",
    ]
    if traced:
        notes.append(f"Counted by the backend, not exactly: {', '.join(traced)}.")
    return "\n".join(notes)


def _si(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 10 * limit or (number >= limit and unit != "k"):
            return f"{number / limit:.4g}{unit}"
    return f"{number:g}"


def _bytes(number: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:g} B"


def _time(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.3g} h"
    if seconds >= 120:
        return f"{seconds / 60:.3g} min"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms"
