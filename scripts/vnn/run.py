#!/usr/bin/env python
"""Decides the instances of ACAS Xu and mnist_fc, one process each, and checks every proof file.

    python scripts/vnn/run.py --data DIR                       # all; up to a day on two cores
    python scripts/vnn/run.py --data DIR --only acasxu --limit 6

DIR holds `acasxu/` and `mnistfc/` with `<name>_instances.csv` of lines
`NET.onnx,PROP.vnnlib,SECONDS` and the files that these name. Finished instances are kept, a JSON
line each, in `OUT/instances.jsonl`: the same command continues after an interruption. Tables go to
OUT, which is `scripts/results/vnn`: RESULTS.md and instances.csv.

Every instance is the command of a user in a process of its own, `tf-lyapunov verify-property`. Its
seconds are those from the process's start to its answer, imports and reading included. Of `sat` the
counterexample in the result file is run once more through onnxruntime here, and compared with the
property's file in rational arithmetic. Of `unsat` proof files are written after the answer, and
`tf-lyapunov verify --property` checks them in another process: both have seconds of their own. Exit
code 1 if a proof file is refused, a counterexample is none, or an instance ends in an error.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ("acasxu", "mnistfc")
ANSWERS = ("unsat", "sat", "unknown", "timeout", "error")
# Seconds that a proof file may take to be written, and to be checked.
_PROOF = 900.0
_COLUMNS = ("benchmark", "network", "property", "timeout", "answer", "seconds", "branches",
            "replayed", "proof", "proof_files", "proof_seconds", "proof_bytes", "parts",
            "check_seconds", "load", "note")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instance:
    """A network, a property, and the seconds that it may take."""

    benchmark: str
    network: str
    property: str
    timeout: float

    @property
    def key(self):
        return f"{self.benchmark}/{self.network}/{self.property}"

    def files(self, data):
        """Paths of the network and the property."""
        return data / self.benchmark / self.network, data / self.benchmark / self.property


def instances(data, only=None, listed=None, timeout=None, limit=None):
    """The instances to run, in the order of their files.

    Args:
        data: folder of the benchmarks.
        only: name of one of them, or None.
        listed: file of lines `BENCHMARK,NET.onnx,PROP.vnnlib[,SECONDS]`, instead of all.
        timeout: seconds, instead of the files'.
        limit: how many of each benchmark, or None.
    """
    names = BENCHMARKS if only is None else (only,)
    rows = []
    if listed is not None:
        rows = [row for row in csv.reader(io.StringIO(listed.read_text())) if row]
        rows = [row for row in rows if row[0] in names]
    else:
        for name in names:
            text = (data / name / f"{name}_instances.csv").read_text()
            rows += [[name, *row] for row in csv.reader(io.StringIO(text)) if row]
    found, counts = [], dict.fromkeys(names, 0)
    for row in rows:
        name, network, prop, *seconds = (field.strip() for field in row)
        if limit is not None and counts[name] >= limit:
            continue
        counts[name] += 1
        allowed = timeout if timeout is not None else float(seconds[0]) if seconds else 116.0
        found.append(Instance(name, network, prop, allowed))
    return found


def finished(path):
    """Records of finished instances by key; a line that a kill cut short is left out."""
    found = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[record["key"]] = record
    return found


def keep(path, record):
    """Adds a record, behind what a kill may have cut short."""
    cut = path.is_file() and not path.read_text().endswith("\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(record) + "\n")


def run(instance, data, proofs):
    """The record of one instance."""
    network, prop = instance.files(data)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.txt")
        command = ["verify-property", network, prop, "--timeout", instance.timeout, "--json",
                   "--out", result, "--overwrite"]  # fmt: skip
        if proofs is not None:
            proofs.mkdir(parents=True, exist_ok=True)
            name = f"{instance.network}-{instance.property}.npz".replace(os.sep, "_")
            command += ["--proof", proofs / name, "--proof-timeout", _PROOF]
        begin = time.time()
        code, output, seconds = _called(command, instance.timeout + 60 + _PROOF)
        text = "error"
        if result.is_file():
            # The answer is there before a proof file is written.
            text, seconds = result.read_text(), result.stat().st_mtime - begin
    answer = text.split()[0]
    record = {"key": instance.key, **dataclasses.asdict(instance), "answer": answer}
    record |= {"seconds": seconds, "branches": 0, "replayed": None, "proof": None,
               "proof_files": 0, "proof_seconds": None, "proof_bytes": 0, "parts": 0,
               "check_seconds": None, "load": os.getloadavg()[0], "note": ""}  # fmt: skip
    try:
        found = json.loads(output)
    except json.JSONDecodeError:
        return record | {"note": "ended before it said more" if code is None else "no record"}
    if "error" in found:
        return record | {"note": " ".join(found["error"]["message"].split())}
    record["note"] = found["reason"]
    record["branches"] = sum(box["branches"] for box in found["boxes"])
    if answer == "sat":
        record["replayed"] = replayed(network, prop, text)
    if answer == "unsat" and proofs is not None:
        record["proof_seconds"] = found.get("proof_seconds")
        record |= _checked(found, network, prop)
    return record


def replayed(network, prop, text):
    """Whether onnxruntime gives a result file's outputs for its inputs, and both satisfy the
    property's file as the exact decimals that they are written as; None for no ONNX file."""
    if network.suffix != ".onnx":
        return None
    import numpy as np
    import onnxruntime

    from tf_lyapunov.vnnlib.files import read_vnnlib

    pairs = re.findall(r"\(([XY])_(\d+) ([^\s()]+)\)", text)
    x, y = ([Fraction(v) for kind, _, v in pairs if kind == own] for own in "XY")
    session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    shape = [n if isinstance(n, int) else 1 for n in given.shape]
    single = np.array([float(v) for v in x], np.float32)
    [found] = session.run(None, {given.name: single.reshape(shape)})
    same = [Fraction(float(v)) for v in single] == x
    same = same and [Fraction(float(v)) for v in np.ravel(found)] == y
    return bool(same and read_vnnlib(prop).holds(x, y))


def _checked(found, network, prop):
    """What `tf-lyapunov verify` says of the proof files, and of the property that they are of."""
    if not found["proof"]:
        return {"proof": "none", "note": found["proof_missing"] or ""}
    first, *others = found["proof"]
    also = [word for path in others for word in ("--also", path)]
    command = ["verify", first, network, "--property", prop, *also, "--json"]
    code, output, seconds = _called(command, 2 * _PROOF)
    outcome = {0: "verified", 1: "refused"}.get(code, "not checked")
    told = {"note": " ".join(output.split())[:500]}
    if code == 0:
        record = json.loads(output)
        checked = [record, *record.get("also", [])]
        told = {"parts": sum(part.get("leaves", 0) for part in checked)}
    sizes = sum(Path(path).stat().st_size for path in found["proof"] if Path(path).is_file())
    return {"proof": outcome, "proof_files": len(found["proof"]), "proof_bytes": sizes,
            "check_seconds": seconds, **told}  # fmt: skip


def _called(arguments, limit):
    """`(exit code, stdout, seconds)` of the command line in a new process; None for a kill."""
    command = [sys.executable, "-m", "tf_lyapunov.cli", *map(str, arguments)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return None, "", time.monotonic() - begin
    return done.returncode, done.stdout, time.monotonic() - begin


def table(records):
    """RESULTS.md of finished instances."""
    lines = [
        "# Instances of the VNN-COMP",
        "",
        "Written by `scripts/vnn/run.py`. `unsat`: proved for all real inputs of the property's "
        "set; proof files are checked by `tf-lyapunov verify` in a process of its own. `sat`: the "
        "counterexample satisfies the property's file exactly, with outputs of onnxruntime, which "
        "are replayed. Seconds are those of the command in a new process until its answer, "
        "imports and reading included; proof files are written after it.",
        "",
        f"Machine: {os.cpu_count()} CPUs, {platform.machine()}; Python "
        f"{platform.python_version()}.",
        "",
        "| benchmark | network | limit s | instances | unsat | sat | unknown | timeout | error | "
        "decided | sat replayed | proofs verified | refused | median s | largest s | "
        "writing a proof: median s | largest | checking it: median s | largest | largest kB |",
        "|" + "---|" * 20,
    ]
    for name, network, held in _groups(records):
        counts = [sum(r["answer"] == a for r in held) for a in ANSWERS]
        decided = [r["seconds"] for r in held if r["answer"] in ("sat", "unsat")]
        verified = sum(r["proof"] == "verified" for r in held)
        refused = sum(r["proof"] == "refused" for r in held)
        replays = sum(r["replayed"] is True for r in held)
        times = []
        for which in (decided, *([r[k] for r in held if r[k] is not None]
                                 for k in ("proof_seconds", "check_seconds"))):  # fmt: skip
            times += [f"{of(which):.1f}" if which else "" for of in (statistics.median, max)]
        limits = ", ".join(f"{t:g}" for t in sorted({r["timeout"] for r in held}))
        row = [name, network, limits, len(held), *counts, f"{len(decided)} of {len(held)}",
               f"{replays} of {counts[1]}", f"{verified} of {counts[0]}", refused, *times,
               max(r["proof_bytes"] for r in held) // 1000]  # fmt: skip
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += ["", *_each(records)]
    left = [r for r in records if r["answer"] not in ("sat", "unsat")]
    lines += ["", "## Not decided", ""]
    lines += [f"- {r['key']}: {r['answer']}. {r['note']}" for r in left] or ["None."]
    without = [r for r in records if r["answer"] == "unsat" and r["proof"] != "verified"]
    lines += ["", "## Without a verified proof file", ""]
    lines += [f"- {r['key']}: {r['proof'] or 'not asked for'}. {r['note']}" for r in without] or [
        "None."
    ]
    return "\n".join(lines) + "\n"


def _each(records):
    """A table of all instances."""
    lines = [
        "| instance | limit s | answer | s | branches | proof | parts | writing s | checking s | "
        "kB | load |",
        "|" + "---|" * 11,
    ]
    for r in records:
        proof = r["proof"] or {True: "replayed", False: "not replayed"}.get(r["replayed"], "")
        seconds = [
            "" if r[k] is None else f"{r[k]:.1f}" for k in ("proof_seconds", "check_seconds")
        ]
        row = [r["key"], f"{r['timeout']:g}", r["answer"], f"{r['seconds']:.1f}", r["branches"],
               proof, r["parts"] or "", *seconds, f"{r['proof_bytes'] / 1000:.1f}",
               f"{r['load']:.1f}"]  # fmt: skip
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return lines


def _groups(records):
    """`(benchmark, network, records)`; ACAS Xu's networks are one group."""
    groups = {}
    for record in records:
        name = record["benchmark"]
        network = "45 networks" if name == "acasxu" else record["network"]
        groups.setdefault((name, network), []).append(record)
    return [(*key, held) for key, held in groups.items()]


def as_csv(records):
    """instances.csv of finished instances."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        shown = {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in record.items()}
        writer.writerow(shown)
    return text.getvalue()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", choices=BENCHMARKS)
    parser.add_argument("--instances", type=Path, metavar="FILE")
    parser.add_argument("--timeout", type=float, metavar="SECONDS")
    parser.add_argument("--limit", type=int, metavar="COUNT")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "results" / "vnn")
    parser.add_argument("--proofs", type=Path, default=ROOT / "runs" / "vnn" / "proofs")
    parser.add_argument("--no-proofs", action="store_true", help="Write no proof files.")
    settings = parser.parse_args(argv)
    asked = instances(
        settings.data, settings.only, settings.instances, settings.timeout, settings.limit
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    lines = settings.out / "instances.jsonl"
    done = finished(lines)
    for k, instance in enumerate(asked, 1):
        if instance.key in done:
            continue
        record = run(instance, settings.data, None if settings.no_proofs else settings.proofs)
        done[instance.key] = record
        keep(lines, record)
        print(
            f"{k}/{len(asked)} {instance.key}: {record['answer']}, {record['seconds']:.1f} s, "
            f"proof {record['proof']}",
            file=sys.stderr,
            flush=True,
        )
        write(settings.out, done)
    write(settings.out, done)
    print(f"Written to {settings.out}.", file=sys.stderr)
    chosen = [done[instance.key] for instance in asked]
    wrong = [r["answer"] == "error" or r["proof"] == "refused" or r["replayed"] is False
             for r in chosen]  # fmt: skip
    return int(any(wrong))


def write(out, done):
    """Tables of all finished instances."""
    records = sorted(done.values(), key=lambda r: r["key"])
    (out / "RESULTS.md").write_text(table(records))
    (out / "instances.csv").write_text(as_csv(records))


if __name__ == "__main__":
    sys.exit(main())
