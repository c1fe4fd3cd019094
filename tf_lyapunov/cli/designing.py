"""`design`: a claim about the network, budgets of its layers."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..terminal import emit, work
from .application import NOT_PROVED, Json, numbers


def design(
    delta: Annotated[float | None, typer.Option(help="Output index δ of the claim.")] = None,
    nu: Annotated[float | None, typer.Option(help="Input index ν of the claim.")] = None,
    gain: Annotated[float | None, typer.Option(help="Claim a plain l2 gain instead.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers with weights.")] = 3,
    activation: Annotated[str, typer.Option(help="Activation of the hidden layers.")] = "relu",
    negative_slope: Annotated[
        float | None, typer.Option(help="Slope of leaky_relu below zero.")
    ] = None,
    last_activation: Annotated[str, typer.Option(help="Activation of the last one.")] = "linear",
    rule: Annotated[
        str, typer.Option(help="sound, conic, lyapunov or dissipativity (as published).")
    ] = "sound",
    weights: Annotated[
        str | None, typer.Option(help="Relative budgets of the layers, e.g. 2,1,1.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="closed_form or remark_4 (lyapunov); theorem_4 or get_indexes."),
    ] = None,
    square_root: Annotated[
        bool, typer.Option("--square-root", help="lyapunov: budgets as derived, not as printed.")
    ] = False,
    recurrent: Annotated[
        str | None,
        typer.Option(help="Numbers of the layers with memory, from 1: their budgets are gains."),
    ] = None,
    require_proof: Annotated[
        bool, typer.Option("--require-proof", help="Exit with 1 unless the claim is proved.")
    ] = False,
    json_: Json = False,
) -> None:
    """Spectral budgets of the layers that prove a claim about the network.

    Example: [bold]tf-lyapunov design --delta 0.4 --nu -2 --layers 3 --activation leaky_relu
    --negative-slope 0.1 --rule sound[/bold]
    """
    if (gain is None) == (delta is None and nu is None) or (delta is None) != (nu is None):
        raise ValueError(
            "A claim is `--delta` with `--nu`, or `--gain`. Received: "
            f"delta={delta}, nu={nu}, gain={gain}."
        )
    with work(json_):
        from ..design import spectral_design
        from ..theory.sectors import Indices, Sector

        slope = {} if negative_slope is None else {"negative_slope": negative_slope}
        hidden = Sector.of(activation, **(slope if activation == "leaky_relu" else {}))
        last = Sector.of(last_activation, **(slope if last_activation == "leaky_relu" else {}))
        options: dict[str, Any] = {} if variant is None else {"variant": variant}
        if square_root:
            options["square_root"] = True
        if weights is not None:
            options["weights"] = numbers("--weights", weights)
        sectors = [hidden] * (layers - 1) + [last]
        chosen = _chosen(recurrent, layers)
        for number in chosen:
            sectors[number] = Sector.linear()
        if gain is not None:
            result = spectral_design(gain=gain, sectors=sectors, **options)
        else:
            result = spectral_design(Indices(delta, nu), sectors, rule=rule, **options)
        supplies = ()
        if chosen:
            from ..dynamics import supplies_of

            supplies = supplies_of(result, chosen)
        if json_:
            record = result.to_json()
            record = json.loads(record) if isinstance(record, str) else record
            emit(record | ({"recurrent": chosen} if chosen else {}))
        else:
            typer.echo(result.explain())
            for number in chosen:
                typer.echo(f"Layer {number + 1} has memory: supply={supplies[number]!r}.")
    if require_proof and not result.is_proved:
        raise typer.Exit(NOT_PROVED)


def _chosen(text: str | None, layers: int) -> list[int]:
    """Numbers of layers from 0, of a list of numbers from 1."""
    found = [] if text is None else numbers("--recurrent", text)
    if any(n != int(n) or not 1 <= n <= layers for n in found):
        raise ValueError(f"`--recurrent` must hold numbers from 1 to {layers}. Received: {text!r}.")
    return sorted({int(n) - 1 for n in found})
