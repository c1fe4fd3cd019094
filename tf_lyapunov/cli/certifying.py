"""`certify` and `verify`: what is proved about a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import emit, say, work
from .application import (
    NOT_PROVED,
    Data,
    DataDir,
    Download,
    Json,
    Label,
    Out,
    Pixels,
    Samples,
    Split,
    Target,
    model_file,
    open_target,
    read_model,
)


def certify(
    target: Target,
    data: Data = None,
    label: Label = None,
    pixels: Pixels = None,
    split: Split = "test",
    samples: Samples = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RADIUS:ACCURACY",
            help="Exit with 1 unless this certified accuracy is reached, e.g. 0.2:0.8.",
        ),
    ] = None,
    require_proof: Annotated[
        bool, typer.Option("--require-proof", help="Exit with 1 unless radii and claim are proved.")
    ] = False,
    radius: Annotated[
        list[float] | None, typer.Option(help="Radii to print. Default: those of the run.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="composition, lipsdp, eclipse, local, linear, box, auto, ...")
    ] = "composition",
    norm: Annotated[str, typer.Option(help="Of the radii: l2, linf or l1.")] = "l2",
    bounds: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Valid inputs, which changes stay within (linear and auto). Default: all numbers.",
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Processes that search around inputs; -1: one per core.")
    ] = 1,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep finished inputs there, and continue from it."),
    ] = None,
    time_budget: Annotated[
        float, typer.Option(metavar="SECONDS", help="For the search for bounds, about.")
    ] = 60.0,
    proof: Annotated[
        Path | None,
        typer.Option(metavar="PROOF.npz", help="Write a proof file, for `verify`."),
    ] = None,
    out: Out = None,
    data_dir: DataDir = None,
    download: Download = False,
    json_: Json = False,
) -> None:
    """Prove for every input a radius within which the prediction cannot change.

    Example: [bold]tf-lyapunov certify runs/digits --require 0.3:0.8[/bold]
    """
    demands = [_demand(text) for text in require or []]
    if proof is not None and proof.suffix != ".npz":
        raise ValueError(f"`--proof` must end in .npz. Received: {proof}.")
    with work(json_):
        from ..experiments import runner

        with open_target(target, data, data_dir, download, label, pixels) as opened:
            certificate = runner.certify_target(
                opened,
                split,
                samples,
                method=method,
                norm=norm,
                bounds=bounds,
                jobs=jobs,
                state=state,
                time_budget=time_budget,
                out=out,
            )
            if proof is not None:
                certificate.save(proof)
            radii, proved = radius or opened.radii, opened.is_proved
        table = [
            {"radius": r, "certified_accuracy": float(certificate.certified_accuracy(r))}
            for r in radii
        ]
        failed = [
            {"radius": r, "required": a, "reached": float(certificate.certified_accuracy(r))}
            for r, a in demands
            if not float(certificate.certified_accuracy(r)) >= a
        ]
        if json_:
            emit(
                {
                    "target": str(target),
                    "verdict": certificate.verdict,
                    "norm": certificate.norm,
                    "within": certificate.within,
                    "claim_proved": proved,
                    "gain_upper_bound": certificate.gain_upper_bound,
                    "examples": len(certificate.radius),
                    "certified": table,
                    "failed": failed,
                }
            )
        else:
            typer.echo(certificate.explain())
            for row in table:
                typer.echo(
                    f"certified accuracy at radius {row['radius']:g}: "
                    f"{row['certified_accuracy']:.4f}"
                )
    for item in failed:
        say(
            f"Not proved: accuracy {item['required']} at radius {item['radius']}; reached "
            f"{item['reached']:.4f}."
        )
    if require_proof and not proved:
        say(
            "Not proved: "
            + ("the design's claim." if certificate.verdict == "PROVED" else "any radius.")
        )
    if failed or (require_proof and not proved):
        raise typer.Exit(NOT_PROVED)


def _demand(text: str) -> tuple[float, float]:
    try:
        radius, accuracy = (float(part) for part in text.split(":"))
        if not (0 <= radius < float("inf") and 0 <= accuracy <= 1):
            raise ValueError
    except ValueError:
        raise ValueError(
            "`--require` is RADIUS:ACCURACY with a radius of at least 0 and an accuracy between 0 "
            f"and 1, for example 0.2:0.8. Received: {text!r}."
        ) from None
    return radius, accuracy


def verify(
    proof: Annotated[Path, typer.Argument(metavar="PROOF.npz", help="Proof file.")],
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The .keras or .onnx file that it is about.")
    ],
    input_shape: Annotated[
        str | None,
        typer.Option(
            "--input-shape", metavar="N,N,…", help="Of one input, for a model with open sizes."
        ),
    ] = None,
    prop: Annotated[
        Path | None,
        typer.Option(
            "--property",
            metavar="PROP.vnnlib",
            help="Check too that the proof files make this property `unsat`.",
        ),
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PROOF-2.npz",
            help="More proof files of the property; may be repeated.",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Check a proof file against a model's weights, without any solver; exit with 1 if it fails.

    An ONNX file is read as a Keras model with its weights first, and compared with onnxruntime on
    random inputs. With --property, the claims are compared with a VNN-LIB file.

    Example: [bold]tf-lyapunov verify proof.npz runs/digits/model.keras[/bold]
    """
    with work(json_):
        from ..verification import verify as check

        shape = None
        if input_shape is not None:
            try:
                shape = tuple(int(n) for n in input_shape.split(","))
            except ValueError:
                raise ValueError(
                    "`--input-shape` is a list of whole numbers, for example 28,28,1. "
                    f"Received: {input_shape!r}."
                ) from None
        if also and prop is None:
            raise ValueError("`--also` goes with `--property`. Received: no property.")
        opened, words = read_model(model_file(model))
        results = [check(path, opened, shape) for path in (proof, *(also or []))]
        holds, told = all(result.holds for result in results), {}
        if prop is not None:
            told = _compared(prop, opened, results, holds)
            holds = holds and told["property_is_unsat"]
        if words is not None:
            told["read_as"] = words
        if json_:
            record = {"proof": str(proof), "model": str(model), **told, **results[0].fields()}
            emit(record | {"also": [result.fields() for result in results[1:]]} if also else record)
        else:
            typer.echo("\n".join([*(r.explain() for r in results), *_sentences(told, prop)]))
    if not holds:
        raise typer.Exit(NOT_PROVED)


def _compared(prop: Path, model, results, holds: bool) -> dict:
    """Whether claims that were verified are those of a property file, and why not."""
    from ..program.network import read_network
    from ..verification.properties import PropertyVerification
    from ..vnnlib.covering import uncovered
    from ..vnnlib.files import read_vnnlib

    if not all(isinstance(result, PropertyVerification) for result in results):
        raise ValueError("`--property` is about proof files of properties. Received: others.")
    if (last := read_network(model).decision) is not None:
        reasons = [f"The proof is about logits, and the model ends in {last}."]
    else:
        reasons = uncovered(read_vnnlib(prop), [result.claim for result in results])
    return {"property_is_unsat": holds and not reasons, "property_reasons": reasons}


def _sentences(told: dict, prop: Path | None) -> list[str]:
    lines = []
    if told.get("property_is_unsat"):
        lines.append(f"VERIFIED: {prop.name} is unsat, for its sets are among those above.")
    elif prop is not None:
        reasons = told["property_reasons"] or ["A proof file does not hold."]
        lines.append(f"NOT VERIFIED: whether {prop.name} is unsat. {' '.join(reasons)}")
    if "read_as" in told:
        lines.append(told["read_as"])
    return lines
