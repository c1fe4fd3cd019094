"""`verify-property` and `export-vnnlib`: properties in the language VNN-LIB."""

from __future__ import annotations

import time
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
    Replace,
    Samples,
    Split,
    Target,
    begun,
    open_target,
)
from .exchange import refuse_existing


def verify_property(
    network: Annotated[Path, typer.Argument(metavar="NET", help="An .onnx or a .keras file.")],
    prop: Annotated[
        Path, typer.Argument(metavar="PROP.vnnlib", help="VNN-LIB 1.0 or 2.0, also as .gz.")
    ],
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="From the start of the command.")
    ] = 116.0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="RESULT.txt", help="Write the answer here, as the VNN-COMP has it."),
    ] = None,
    proof: Annotated[
        Path | None,
        typer.Option(
            metavar="PROOF.npz",
            help="Write a proof file of `unsat`, for `verify`; PROOF-2.npz and so on beside it "
            "where the file's inputs are several boxes.",
        ),
    ] = None,
    proof_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="For proof files, after the answer. Default: what is left."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the attack's random points.")] = 0,
    overwrite: Replace = False,
    json_: Json = False,
) -> None:
    """Decide a VNN-LIB property: sat with a counterexample, unsat, unknown or timeout.

    Exit with 0 if it is decided, with 1 if not, or if a proof file that was asked for cannot be
    written, in time or at all; RESULT.txt is there before that. A counterexample is printed only
    after onnxruntime (for an ONNX file) and the Keras model have both repeated it.

    Example: [bold]tf-lyapunov verify-property net.onnx prop.vnnlib --timeout 116 --out
    result.txt[/bold]
    """
    begin = begun()
    if proof is not None and proof.suffix != ".npz":
        raise ValueError(f"`--proof` must end in .npz. Received: {proof}.")
    if not 0 < timeout < float("inf"):
        raise ValueError(f"`--timeout` must be a positive number of seconds. Received: {timeout}.")
    if proof_timeout is not None and not proof_timeout > 0:
        raise ValueError(
            f"`--proof-timeout` must be a positive number of seconds. Received: {proof_timeout}."
        )
    _check_outputs([p for p in (out, proof) if p is not None], (network, prop), overwrite)
    with work(json_):
        from ..vnnlib.answers import result_text
        from ..writing import write_text

        try:
            decision = _decided(network, prop, begin + timeout, seed)
        except Exception:
            if out is not None:
                write_text(out, result_text("error"))
            raise
        text = result_text(decision.answer, decision.x, decision.y)
        if out is not None:
            write_text(out, text)
        seconds = time.monotonic() - begin
        end = begin + timeout
        if proof_timeout is not None:
            end = time.monotonic() + proof_timeout
        written, missing = _proofs(decision, proof, overwrite, end)
        if json_:
            since = time.monotonic() - begin - seconds
            emit(_record(network, prop, decision, seconds, written, missing, since))
        else:
            typer.echo(text, nl=False)
            say(f"{decision.reason} {seconds:.1f} seconds.")
            for path in written:
                say(f"Proof file: {path}. Check it: tf-lyapunov verify {path} {network}")
    if missing:
        say(f"No proof file was written: {missing}")
    if missing or not decision.is_decided:
        raise typer.Exit(NOT_PROVED)


def _check_outputs(outputs: list[Path], inputs: tuple[Path, Path], overwrite: bool) -> None:
    """Before the work rather than after it."""
    for path in outputs:
        if not path.resolve().parent.is_dir():
            raise ValueError(f"Results are written to directories that exist. Received: {path}.")
        if path.resolve() in [held.resolve() for held in inputs]:
            raise ValueError(f"A result does not replace what it is about. Received: {path}.")
    refuse_existing(outputs, overwrite)


def _decided(network: Path, prop: Path, deadline: float, seed: int):
    from ..vnnlib.deciding import TIMEOUT, Decision, decide
    from ..vnnlib.files import read_vnnlib
    from ..vnnlib.subjects import open_subject

    query = read_vnnlib(prop)
    subject = open_subject(network)
    rest = deadline - time.monotonic()
    if rest <= 0:
        return Decision(TIMEOUT, "The time was up before the search began.", None, None, [], 0.0)
    return decide(subject, query, timeout=rest, seed=seed)


def _proofs(decision, proof: Path | None, overwrite: bool, end: float):
    """`(paths, why not)` of the proof files of an `unsat` answer."""
    if proof is None or decision.answer != "unsat":
        return [], None
    if not decision.found:
        return [], decision.reason
    more = range(2, len(decision.found) + 1)
    paths = [proof, *(proof.with_name(f"{proof.stem}-{k}{proof.suffix}") for k in more)]
    refuse_existing(paths, overwrite)
    written = []
    for path, found in zip(paths, decision.found, strict=True):
        try:
            found.save(path, timeout=max(end - time.monotonic(), 0.0))
        except ValueError as error:
            # Files of some of the boxes alone would pass for the proof of all.
            for other in written:
                other.unlink()
            return [], str(error)
        written.append(path)
    return written, None


def _record(network, prop, decision, seconds, written, missing, proof_seconds):
    counterexample = None
    if decision.x is not None:
        counterexample = {"inputs": decision.x.tolist(), "outputs": decision.y.tolist()}
    return {
        "network": str(network),
        "property": str(prop),
        "answer": decision.answer,
        "reason": decision.reason,
        "seconds": seconds,
        "boxes": [
            {
                "status": found.status,
                "margin_lower_bound": found.bound,
                "branches": found.branches,
                "open": found.open,
                "seconds": found.seconds,
            }
            for found in decision.found
        ],
        "counterexample": counterexample,
        "proof": [str(path) for path in written],
        "proof_missing": missing,
        "proof_seconds": proof_seconds,
    }


def export_vnnlib(
    target: Target,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Directory to write to.")],
    data: Data = None,
    split: Split = "test",
    samples: Samples = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="C.json", help="Of these inputs, in norm linf.")
    ] = None,
    radius: Annotated[
        float | None, typer.Option(help="Instead of a certificate: the same for all inputs.")
    ] = None,
    bounds: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Valid inputs, which changes stay within."),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    overwrite: Replace = False,
    json_: Json = False,
) -> None:
    """Write an l∞ claim as an ONNX file and a VNN-LIB property per input, for other verifiers.

    Their `unsat` is the claim. With --radius it is about the data's labels.

    Example: [bold]tf-lyapunov export-vnnlib runs/digits claim --samples 20 --radius 0.01[/bold]
    """
    if (certificate is None) == (radius is None):
        raise ValueError(
            "Pass `--certificate` or `--radius`, one of them. Received: "
            f"--certificate {certificate}, --radius {radius}."
        )
    with work(json_):
        from ..certification.certificate import Certificate
        from ..vnnlib.exporting import export_vnnlib as export

        claim = {"radius": radius}
        if certificate is not None:
            claim = {"certificate": Certificate.load(certificate)}
            samples = len(claim["certificate"]) if samples is None else samples
        with open_target(target, data, data_dir, download) as opened:
            x, y = opened.arrays(split, samples)
            if certificate is None:
                claim["labels"] = y
            found = export(opened.model, x, out, bounds=bounds, overwrite=overwrite, **claim)
        if json_:
            emit(
                {
                    "network": str(found.network),
                    "properties": [str(path) for path in found.properties],
                    "inputs": list(found.positions),
                    "instances": str(found.instances),
                }
            )
        else:
            typer.echo(
                f"Written to {out}: {found.network.name}, {len(found.properties)} properties, and "
                f"{found.instances.name}."
            )
