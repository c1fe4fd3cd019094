"""What a proof file says: its claims and its evidence, checked for form before they are used.

Every field is known, of the right type, finite and of the right sign, or the file is refused. Its
words are the file's own: they are kept on one line and quoted, never printed as the verifier's.
"""

import dataclasses
import itertools
import math

import numpy as np

from tf_lyapunov.verification.around import evidence as around
from tf_lyapunov.verification.around.region import NORMS
from tf_lyapunov.verification.inequalities import Multipliers

LARGEST_TEXT, LARGEST_PARTS = 300, 256
_HEADER = {"format", "version", "layers", "chain", "certificate", "notes"}
_CERTIFICATE = {
    "format", "gain_upper_bound", "contributions", "assumptions", "method", "verdict",
    "float_allowance", "model_digest",
}  # fmt: skip
_ROW = {
    "name", "kind", "gain_upper_bound", "lipschitz_upper_bound", "method", "assumption", "inputs",
}  # fmt: skip
_PARTS = ("squared", "values", "sizes", "sectors")
# Integers of 64 bits fit as long as float64 holds them; long doubles are of no fixed format.
_INPUTS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Multipliers of a part of a network in which branches meet; see `graphs`.

    Attributes:
        start, end: names of the steps that it reads and that hold its result.
        whole: `Multipliers` of the gain between them.
        pairs: dict (i, j) -> `Multipliers` of differences of its results, if these are the logits.
    """

    start: str
    end: str
    whole: Multipliers
    pairs: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What a proof file brings beyond the weights; each item is checked, none is believed.

    Attributes:
        start: name of the step that the dense chain reads, or None without a chain.
        methods: which of `"product"`, `"liplt"` to derive for the chain besides.
        whole: `Multipliers` of all logits, or None.
        indices: `(delta, nu, Multipliers)`, or None.
        pairs: dict (i, j) -> `Multipliers` of f_i - f_j.
        parts: tuple of `Part`.
        around: dict from numbers of inputs to lists of `around.evidence.Piece`.
    """

    start: str | None = None
    methods: tuple = ()
    whole: Multipliers | None = None
    indices: tuple | None = None
    pairs: dict = dataclasses.field(default_factory=dict)
    parts: tuple = ()
    around: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Claim:
    """What a proof file says. Arrays have one entry per input.

    Attributes:
        radius, labels, predictions, margins, inputs: of the inputs.
        float_allowance: distance of `margins` from those of exact arithmetic, up to √2.
        gain_upper_bound: of the logits.
        table: rows `(name, gain, gain from the input)`.
        verdict: `"PROVED"` or `"NOT_PROVED"`.
        norm: of the radii.
        bounds: `(low, high)` that changes stay within, float64 arrays, or None.
    """

    radius: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    margins: np.ndarray
    inputs: np.ndarray
    float_allowance: float
    gain_upper_bound: float
    table: tuple
    verdict: str
    norm: str = "l2"
    bounds: tuple | None = None


def pack(network, evidence, claim, certificate, notes=()):
    """`(header, arrays)` for `archive.write`.

    Args:
        certificate: JSON-safe dict of a certificate's other fields, kept for its reader.

    Radii in another norm than l2, within bounds, or by bounds around inputs make version 2.
    """
    header = {
        "layers": [[r.name, r.settings, r.weights] for r in network.layers],
        "chain": {"start": evidence.start, "methods": list(evidence.methods)},
        "certificate": certificate,
        "notes": list(notes),
    }
    arrays = {name: getattr(claim, name) for name in _PER_INPUT}
    if claim.norm != "l2" or claim.bounds is not None or evidence.around:
        header |= {"version": 2, "norm": claim.norm}
        arrays |= {f"around_{name}": array for name, array in around.pack(evidence.around).items()}
        if claim.bounds is not None:
            arrays |= dict(zip(BOUNDS, claim.bounds, strict=True))
    if evidence.whole is not None:
        arrays |= _packed("whole", [evidence.whole])
    if evidence.indices is not None:
        delta, nu, multipliers = evidence.indices
        arrays |= _packed("indices", [multipliers])
        arrays["indices_cone"] = np.array([delta, nu])
    arrays |= _packed_pairs("pairs", evidence.pairs)
    if evidence.parts:
        header["parts"] = [[part.start, part.end] for part in evidence.parts]
    for number, part in enumerate(evidence.parts):
        arrays |= _packed(f"part{number}", [part.whole])
        arrays |= _packed_pairs(f"part{number}_pairs", part.pairs)
    return header, arrays


BOUNDS = ("bounds_low", "bounds_high")
_PER_INPUT = ("radius", "labels", "predictions", "margins", "inputs")


def _packed(name, items):
    return {
        f"{name}_squared": np.array([m.squared for m in items], dtype=np.float64),
        f"{name}_values": np.stack([np.concatenate([np.zeros(0), *m.values]) for m in items]),
        f"{name}_sizes": np.array([len(v) for v in items[0].values], dtype=np.int64),
        f"{name}_sectors": np.array([m.sectors for m in items], dtype=np.float64).reshape(
            len(items), len(items[0].values), 2
        ),
    }


def _packed_pairs(name, pairs):
    if not pairs:
        return {}
    index = np.array(list(pairs), dtype=np.int64)
    return _packed(name, list(pairs.values())) | {f"{name}_index": index}


def quoted(text):
    """Text of a file on one printable line, in quotation marks, shortened.

    Line breaks, escape sequences and marks of writing direction become visible escapes.
    """
    text = str(text)
    short = text if len(text) <= LARGEST_TEXT else text[:LARGEST_TEXT] + "…"
    return repr(short)


def described(bounds):
    """Bounds of inputs in words, or None.

    >>> described((np.zeros(1), np.ones(1)))
    '0.0 to 1.0'
    """
    if bounds is None:
        return None
    ends = [sorted({float(np.min(b)), float(np.max(b))}) for b in bounds]
    return " to ".join(str(e[0] if len(e) == 1 else e) for e in ends)


def unpack(header, arrays):
    """`(layers, evidence, claim, notes, method)` of a file's contents.

    Args:
        header: dict of a file's header.
        arrays: dict of its arrays.

    Returns:
        `layers` is a list of three texts each, `notes` a tuple of quoted texts, `method` a word.

    Raises:
        KeyError, TypeError, ValueError: if something is missing, unknown or of the wrong form.
    """
    is_second = header["version"] == 2
    optional = {"norm"} if is_second else set()
    if "parts" in header:
        optional |= {"parts"}
    exactly(header, _HEADER | optional, "header")
    numbers = exactly(header["certificate"], _CERTIFICATE, "certificate")
    exactly(header["chain"], {"start", "methods"}, "chain")
    table = tuple(
        (
            _text(exactly(row, _ROW, "table")["name"], "name"),
            _number(row["gain_upper_bound"], "gain_upper_bound"),
            _number(row["lipschitz_upper_bound"], "lipschitz_upper_bound"),
        )
        for row in _list(numbers["contributions"], "contributions")
    )
    if numbers["verdict"] not in ("PROVED", "NOT_PROVED"):
        raise ValueError(f"the verdict is {quoted(numbers['verdict'])}")
    for text in _list(numbers["assumptions"], "assumptions"):
        _text(text, "assumption")
    method = _text(numbers["method"], "method")
    if not (method.replace("_", "").replace("-", "").isalnum() and method.isascii()) or (
        len(method) > 40
    ):
        raise ValueError(f"the method is {quoted(method)}, which is no word")
    claim = Claim(
        *_per_input(arrays),
        float_allowance=_number(numbers["float_allowance"], "float_allowance"),
        gain_upper_bound=_number(numbers["gain_upper_bound"], "gain_upper_bound"),
        table=table,
        verdict=numbers["verdict"],
        **(_region(header, arrays) if is_second else {}),
    )
    layers = layers_of(header)
    names = {n for n in arrays if is_second and (n in BOUNDS or n.startswith("around_"))}
    held = {n: a for n, a in arrays.items() if n not in names}
    evidence = _evidence(header["chain"], header.get("parts", []), held)
    if is_second:
        held = {name: arrays[f"around_{name}"] for name in around.ARRAYS}
        unknown = sorted(names - set(BOUNDS) - {f"around_{name}" for name in held})
        if unknown:
            raise ValueError(f"it holds an array {quoted(unknown[0])} that no proof has")
        evidence = dataclasses.replace(evidence, around=around.unpack(held, len(claim.radius)))
    return layers, evidence, claim, notes_of(header), method


def layers_of(header):
    """The layers that a file's header names: a list of three texts each."""
    found = []
    for row in _list(header["layers"], "layers"):
        name, settings, weights = (_text(t, "layer") for t in _list(row, "layer"))
        found.append((name, settings, weights))
    return found


def notes_of(header):
    """The notes of a file's header, quoted."""
    return tuple(quoted(_text(n, "note")) for n in _list(header["notes"], "notes"))


def differences(claimed, present):
    """Sentences on how a model's layers differ from those that were certified."""
    if len(claimed) != len(present):
        yield f"Another model: it has {len(present)} layers, the certified one {len(claimed)}."
    for (name, settings, weights), layer in zip(claimed, present, strict=False):
        if settings != layer.settings:
            yield (
                f"Layer {layer.name!r} is not the certified layer {quoted(name)}: its kind, "
                "settings, activation or place differ."
            )
        elif weights != layer.weights:
            yield f"Layer {layer.name!r} does not have the certified weights."


def _region(header, arrays):
    """Norm and bounds of the radii."""
    if header["norm"] not in NORMS:
        raise ValueError(f"the norm is {quoted(header['norm'])}")
    if not any(name in arrays for name in BOUNDS):
        return {"norm": header["norm"], "bounds": None}
    bounds = tuple(np.array(arrays[name]) for name in BOUNDS)
    shape = arrays["inputs"].shape[1:]
    for bound in bounds:
        if bound.dtype.str[1:] != "f8" or np.broadcast_shapes(bound.shape, shape) != shape:
            raise ValueError("the bounds have another shape or type than the inputs")
    if not np.all(bounds[0] <= bounds[1]):  # NaN either
        raise ValueError("a lower bound of the inputs is not below the upper one")
    return {"norm": header["norm"], "bounds": bounds}


def _per_input(arrays):
    found = [np.array(arrays[name]) for name in _PER_INPUT]
    shape = found[0].shape
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError("there is no radius for at least one input")
    for name, kind, array in zip(_PER_INPUT, "fiif", found[:4], strict=False):
        if array.dtype.str[1:] != f"{kind}8" or array.shape != shape:
            raise ValueError(f"{name} has another shape or type")
    radius, margins, inputs = found[0], found[3], found[4]
    if not np.all(radius >= 0) or not np.all(np.isfinite(margins)):
        raise ValueError("a radius is negative or NaN, or a margin is not finite")
    if inputs.dtype.str[1:] not in _INPUTS:
        raise ValueError(f"the inputs are of type {inputs.dtype.name}")
    if inputs.shape[:1] != shape:
        raise ValueError("there is not one input per radius")
    if inputs.dtype.kind in "iu" and inputs.dtype.itemsize == 8:
        limit = 2**53
        if np.any(inputs > limit) or (inputs.dtype.kind == "i" and np.any(inputs < -limit)):
            raise ValueError("an integer input is beyond 2**53, where float64 would round it")
    return found


def _evidence(chain, parts, arrays):
    start, methods = chain["start"], _list(chain["methods"], "methods")
    if start is not None:
        _text(start, "start")
    if len(set(methods)) != len(methods) or not set(methods) <= {"product", "liplt"}:
        raise ValueError("the chain's methods are unknown, or twice the same")
    expected, indices, whole = set(_PER_INPUT), None, None
    pairs, used = _pairs("pairs", arrays)
    expected |= used
    if "indices_cone" in arrays:
        cone = arrays["indices_cone"]
        if cone.dtype.str[1:] != "f8" or cone.shape != (2,) or not np.all(np.isfinite(cone)):
            raise ValueError("the indices are not two finite numbers")
        (found,) = _unpacked("indices", arrays)
        indices = (float(cone[0]), float(cone[1]), found)
        expected |= {"indices_cone", *(f"indices_{part}" for part in _PARTS)}
    if "whole_squared" in arrays:
        (whole,) = _unpacked("whole", arrays)
        expected |= {f"whole_{part}" for part in _PARTS}
    found = []
    if len(_list(parts, "parts")) > LARGEST_PARTS:
        raise ValueError(f"it holds {len(parts)} parts, more than {LARGEST_PARTS}")
    for number, ends in enumerate(parts):
        first, last = (_text(name, "part") for name in _list(ends, "part"))
        (own,) = _unpacked(f"part{number}", arrays)
        expected |= {f"part{number}_{part}" for part in _PARTS}
        between, used = _pairs(f"part{number}_pairs", arrays)
        expected |= used
        found.append(Part(first, last, own, between))
    unknown = sorted(set(arrays) - expected)
    if unknown:
        raise ValueError(f"it holds an array {quoted(unknown[0])} that no proof has")
    return Evidence(start, tuple(methods), whole, indices, pairs, tuple(found))


def _pairs(name, arrays):
    """`(dict from pairs to Multipliers, names of the arrays)`; empty where there are none."""
    if f"{name}_index" not in arrays:
        return {}, set()
    index = arrays[f"{name}_index"]
    if index.dtype.str[1:] != "i8" or index.ndim != 2 or index.shape[1] != 2:
        raise ValueError("the pairs have another shape or type")
    keys = [(int(i), int(j)) for i, j in index]
    if len(set(keys)) != len(keys):
        raise ValueError("a pair is there twice")
    found = dict(zip(keys, _unpacked(name, arrays), strict=True))
    return found, {f"{name}_{part}" for part in ("index", *_PARTS)}


def _unpacked(name, arrays):
    squared, values, sizes, sectors = (arrays[f"{name}_{part}"] for part in _PARTS)
    for array, kind in ((squared, "f8"), (values, "f8"), (sizes, "i8"), (sectors, "f8")):
        if array.dtype.str[1:] != kind:
            raise ValueError(f"the multipliers {name!r} are of another type")
    # Python's integers: a sum of NumPy's could wrap around to the expected one.
    widths = [int(n) for n in sizes.reshape(-1)]
    if squared.ndim != 1 or sizes.ndim != 1 or any(n < 0 for n in widths):
        raise ValueError(f"the multipliers {name!r} have another shape")
    if values.shape != (len(squared), sum(widths)):
        raise ValueError(f"the multipliers {name!r} have another shape")
    if sectors.shape != (len(squared), len(widths), 2):
        raise ValueError(f"the sectors of {name!r} have another shape")
    ends = np.cumsum([0, *widths])
    return [
        Multipliers(
            float(rho),
            tuple(row[a:b] for a, b in itertools.pairwise(ends)),
            tuple((float(a), float(b)) for a, b in slopes),
        )
        for rho, row, slopes in zip(squared, values, sectors, strict=True)
    ]


def exactly(found, keys, name):
    """The table, if it has these fields and no others."""
    if not isinstance(found, dict):
        raise TypeError(f"the {name} is no table of fields")
    missing, unknown = sorted(keys - set(found)), sorted(set(found) - keys)
    if missing:
        raise KeyError(missing[0])
    if unknown:
        raise ValueError(f"the {name} has a field {quoted(unknown[0])} that no proof has")
    return found


def _list(found, name):
    if not isinstance(found, list):
        raise TypeError(f"{name} is no list")
    return found


def _text(found, name):
    if not isinstance(found, str):
        raise TypeError(f"a {name} is no text")
    return found


def _number(found, name):
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"{name} is {quoted(found)}, no finite number")
    found = float(found)
    if not (math.isfinite(found) and found >= 0):
        raise ValueError(f"{name} is {found!r}, not finite and ≥ 0")
    return found
