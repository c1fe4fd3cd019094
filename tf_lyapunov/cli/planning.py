"""`plan`: what an experiment's training would take on given devices."""

from __future__ import annotations

from typing import Annotated

import typer

from ..terminal import console, emit, say, work
from .application import Config, Json, Set


def plan(
    config: Config,
    devices: Annotated[
        str, typer.Option(help="[HOSTSx][COUNTx]NAME: 8xH100, 4x8xA100, cpu.")
    ] = "cpu",
    precision: Annotated[
        str, typer.Option(help="float32, mixed_bfloat16 or mixed_float16.")
    ] = "float32",
    measure: Annotated[
        bool, typer.Option("--measure", help="Time this machine first, about two minutes.")
    ] = False,
    network: Annotated[float, typer.Option(help="Gbit/s between hosts, one way.")] = 400.0,
    layers: Annotated[bool, typer.Option("--layers", help="A row for every layer.")] = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Parameters, memory, FLOPs, cost of the guarantee and epoch time; nothing is trained.

    Example: [bold]tf-lyapunov plan configs/lyapunov/cifar10.yaml --devices 8xH100[/bold]
    """
    import dataclasses

    from ..experiments.reading import load_config

    experiment = load_config(config, list(set_ or []))
    with work(json_):
        from ..planning.devices import parse_devices
        from ..planning.estimate import plan as make_plan

        cluster = parse_devices(devices, network * 1e9 / 8)

        if measure:
            from ..planning.measuring import measure as calibrate

            say(f"measuring {cluster.device.name}")
            cluster = dataclasses.replace(cluster, device=calibrate(cluster.device.name))
        found = make_plan(experiment, cluster, precision=precision)
        if json_:
            emit(found.to_dict())
        else:
            from ..planning.tables import plan_tables

            console(stderr=False).print(plan_tables(found, layers))
