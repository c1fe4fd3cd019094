"""`export-mat` and `import-mat` for MATLAB and GNU Octave, `export-onnx` for other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..digits import at_most
from ..terminal import emit, say, work
from .application import NOT_PROVED, Json, Replace, Target, load_model, model_file, numbers

_FOREIGN = "Networks of other tools"

InputShape = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SIZES", help="Sizes that the model leaves open, e.g. 28,28,1; once per input."
    ),
]


def export_mat(
    target: Target,
    out: Annotated[Path, typer.Argument(metavar="OUT.mat", help="File to write.")],
    design: Annotated[
        Path | None, typer.Option(help="Design (JSON). Default: the run's, if there is one.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Certificate (JSON). Default: the run's, if there is one.")
    ] = None,
    input_shape: InputShape = None,
    overwrite: Replace = False,
    json_: Json = False,
) -> None:
    """Write a network, its design and its certificate for MATLAB and GNU Octave.

    check_certificate.m in matlab_compat/ proves the file's claims again.

    Example: [bold]tf-lyapunov export-mat runs/digits digits.mat[/bold]
    """
    refuse_existing([out], overwrite)
    with work(json_):
        from .. import matlab
        from ..experiments import files

        if target.is_dir():
            beside = {"design": files.DESIGN, "certificate": files.CERTIFICATE}
            found = {k: target / name for k, name in beside.items() if (target / name).exists()}
            design, certificate = (
                design or found.get("design"),
                certificate or found.get("certificate"),
            )
        parts = {
            "design": design and _read_design(design),
            "certificate": certificate and _read_certificate(certificate),
        }
        model = load_model(model_file(target))
        matlab.export_mat(out, model=model, input_shapes=_shapes(input_shape), **parts)
        holds = ["network", *(name for name, part in parts.items() if part is not None)]
        if json_:
            emit({"written": str(out), "holds": holds})
        else:
            typer.echo(f"Written to {out}: {', '.join(holds)}.")


def import_mat(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.mat", help="As export-mat writes it, or with --weights.")
    ],
    model: Annotated[
        Path | None, typer.Option(metavar="M.keras", help="Model to give the file's weights to.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="NEW.keras", help="Where the model is written.")
    ] = None,
    design_out: Annotated[Path | None, typer.Option(help="Write the design (JSON) here.")] = None,
    certificate_out: Annotated[
        Path | None, typer.Option(help="Write the certificate (JSON) here, unless it is void.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of another tool's file: the matrices of dense layers, a cell array, a struct or "
            "a field (net.W), or several with commas between.",
            rich_help_panel=_FOREIGN,
        ),
    ] = None,
    biases: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Their biases, likewise.", rich_help_panel=_FOREIGN),
    ] = None,
    activation: Annotated[
        str,
        typer.Option(
            help="Of the hidden layers, or one each, with commas between.", rich_help_panel=_FOREIGN
        ),
    ] = "relu",
    output_activation: Annotated[
        str, typer.Option(help="Of the last layer.", rich_help_panel=_FOREIGN)
    ] = "linear",
    orientation: Annotated[
        str | None,
        typer.Option(
            help="out-in (y = Wx + b) or in-out (y = xW + b). Default: what the shapes say.",
            rich_help_panel=_FOREIGN,
        ),
    ] = None,
    overwrite: Replace = False,
    json_: Json = False,
) -> None:
    """Read weights, a design and a certificate back from MATLAB or GNU Octave.

    A design is proved again from its numbers. A certificate holds for the weights that were
    certified and no others: with `--model` it is compared with them, and if it is void it is not
    written (exit code 1).

    Example: [bold]tf-lyapunov import-mat edited.mat --model runs/digits/model.keras --out
    edited.keras[/bold]

    A network of another tool: [bold]tf-lyapunov import-mat net.mat --weights weights --biases
    biases --activation relu --out net.keras[/bold]
    """
    if weights is not None:
        if out is None or model or design_out or certificate_out:
            raise ValueError(
                "`--weights` goes with `--out` and without `--model`, `--design-out` and "
                f"`--certificate-out`. Received: --weights {weights}, --out {out}."
            )
        refuse_existing([out], overwrite)
        with work(json_):
            settings = {"activation": activation, "output_activation": output_activation}
            _import_network(file, out, weights, biases, orientation, settings, json_)
        return
    if biases is not None or orientation is not None:
        raise ValueError("`--biases` and `--orientation` go with `--weights`. Received: none.")
    if (model is None) != (out is None):
        raise ValueError(
            "`--model` and `--out` go together: the weights of the file, in the architecture of "
            f"the one, become the other. Received: --model {model}, --out {out}."
        )
    refuse_existing([p for p in (out, design_out, certificate_out) if p], overwrite)
    with work(json_):
        from .. import matlab

        found = matlab.import_mat(file)
        for option, path, part in (
            ("--design-out", design_out, found.design),
            ("--certificate-out", certificate_out, found.certificate),
        ):
            if path is not None and part is None:
                raise ValueError(f"`{option}` needs what the file does not hold. Received: {file}.")
        digest = None if model is None else _give_weights(found, model, out)
        void = None
        if found.certificate is not None and digest is not None:
            void = digest != found.certificate.model_digest
        written = [out] if out is not None else []
        if design_out is not None:
            _write(design_out, found.design.to_json())
            written.append(design_out)
        if certificate_out is not None and not void:
            found.certificate.save(certificate_out)
            written.append(certificate_out)
        if json_:
            emit(_record(found, digest, void, written))
        else:
            typer.echo("\n".join(_description(found, digest, written)))
    if void:
        say(
            f"The certificate is void: it concerns model {found.certificate.model_digest[:23]}…, "
            f"and {out} is model {digest[:23]}…. Certify again: tf-lyapunov certify {out}"
        )
        if certificate_out is not None:
            raise typer.Exit(NOT_PROVED)


def _import_network(file, out, weights, biases, orientation, settings, json_):
    from .. import matlab, modelfile

    found = matlab.import_network(
        file, weights=weights, biases=biases, orientation=orientation, **settings
    )
    modelfile.save_model(found.model, out)
    if json_:
        emit(
            {
                "layers": list(found.names),
                "orientation": found.orientation,
                "rounding": found.rounding,
                "written": [str(out)],
            }
        )
    else:
        typer.echo(f"{found.explain()}\nWritten to {out}.")


def export_onnx(
    target: Target,
    out: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="File to write.")],
    dtype: Annotated[
        str, typer.Option(help="float32 or float64, of weights and arithmetic.")
    ] = "float32",
    opset: Annotated[int, typer.Option(help="Version of the standard operators.")] = 17,
    input_shape: InputShape = None,
    overwrite: Replace = False,
    json_: Json = False,
) -> None:
    """Write a network as an ONNX file of standard operators, for verifiers and runtimes.

    The file is run on random probes first and compared with the network, layer by layer.

    Example: [bold]tf-lyapunov export-onnx runs/digits digits.onnx[/bold]
    """
    refuse_existing([out], overwrite)
    with work(json_):
        from ..onnx.export import export_onnx as export

        model = load_model(model_file(target))
        found = export(
            model, out, dtype=dtype, opset=opset, input_shapes=_shapes(input_shape)
        )  # fmt: skip
        if json_:
            emit(found.record())
        else:
            typer.echo(found.explain())


def _shapes(texts: list[str] | None):
    shapes = [(None, *map(int, numbers("--input-shape", text))) for text in texts or []]
    return shapes or None


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Refuses outputs that are there already, or that are one file twice."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"Every output needs its own file. Received: {', '.join(map(str, paths))}")
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise ValueError(
            f"Files are not replaced without `--overwrite`. Received: {', '.join(there)}, which "
            "exists."
        )


def _read_design(path: Path):
    from ..design import Design

    try:
        return Design.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            "`--design` must be a design as `tf-lyapunov design --json` prints it "
            f"({type(error).__name__}: {error}). Received: {path}."
        ) from error


def _read_certificate(path: Path):
    from ..certification.certificate import Certificate

    return Certificate.load(path)


def _give_weights(found, model: Path, out: Path) -> str:
    """Writes `model` with the file's weights to `out`; returns the digest of what was written."""
    from .. import modelfile
    from ..program.network import read_network

    edited = found.assign_to(modelfile.load_model(model_file(model)))
    modelfile.save_model(edited, out)
    return read_network(modelfile.load_model(out)).digest()


def _write(path: Path, text: str) -> None:
    from ..writing import write_text

    write_text(path, text)


def _record(found, digest, void, written) -> dict[str, Any]:
    certificate = found.certificate
    return {
        "weights": None if found.weights is None else len(found.weights),
        "exported_model_digest": found.model_digest,
        "model_digest": digest,
        "design": None if found.design is None else json.loads(found.design.to_json()),
        "certificate": None
        if certificate is None
        else {
            "verdict": certificate.verdict,
            "method": certificate.method,
            "gain_upper_bound": certificate.gain_upper_bound,
            "examples": len(certificate),
            "model_digest": certificate.model_digest,
            "void": void,
        },
        "written": [str(path) for path in written],
    }


def _description(found, digest, written) -> list[str]:
    lines = []
    if found.weights is not None:
        size = sum(value.size for value in found.weights.values())
        lines.append(f"Weights: {len(found.weights)} variables, {size} numbers.")
        if digest is not None:
            same = "the exported ones" if digest == found.model_digest else "changed since export"
            lines[-1] = f"{lines[-1][:-1]}, {same}."
    if found.design is not None:
        lines.append(found.design.explain())
    if found.certificate is not None:
        certificate = found.certificate
        lines.append(
            f"Certificate: {certificate.verdict} (method: {certificate.method}), "
            f"{len(certificate)} inputs, gain at most "
            f"{at_most(certificate.gain_upper_bound, 6)}, "
            f"of model {certificate.model_digest[:23]}…."
        )
        if digest is None:
            lines.append("  As written: whether it is of these weights is told with --model.")
        elif digest == certificate.model_digest:
            lines.append("  It is of these weights.")
    lines += [f"Written to {path}." for path in written]
    return lines or ["The file is empty."]
