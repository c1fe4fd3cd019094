"""Proof files of ranges of outputs: what the verifier proves with the multipliers found."""

import contextlib
import dataclasses

import numpy as np

from tf_lyapunov.local import recording
from tf_lyapunov.local.places import pieces_of, places_of
from tf_lyapunov.local.radii import Answer
from tf_lyapunov.verification import archive, ranges
from tf_lyapunov.verification.around.pairs import expanded
from tf_lyapunov.verification.reading import read_with_calls

# What another machine's order of sums may change of a range, relatively, and more than that.
_ROOM = 1e-9
# Losses below this share of a range's width go without saying.
_SMALL = 2e-3
# Width, relative to its ends, from which a range is more than rounding.
_NOTHING = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """How bounds over a region were found.

    Attributes:
        network, flow, traced: `Network`, its `Flow`, and the `Trace` at the region's centre.
        region: `regions.Region`.
        rows: float64 (m, outputs), the functionals.
        memory: `boxes.Memory` of the search.
        multipliers: by position, of the rows and their negatives, or of a property's rows.
        outputs: `"logits"` or `"model"`.
        digest: of the weights and settings at the time.
    """

    network: object
    flow: object
    traced: object
    region: object
    rows: np.ndarray
    memory: object
    multipliers: dict
    outputs: str
    digest: str


def save_ranges(found, path):
    """Writes the proof file of an `OutputBounds`; see its `save`."""
    source = found.source
    if source is None:
        raise ValueError(
            "A proof file needs the ranges that `output_bounds` returned. Received: edited ones, "
            "without what they were found by. Bound the outputs again."
        )
    network = source.network
    check_unchanged(source)
    model, read, calls = read_with_calls(network.model, source.region.center.shape)
    pieces = pieces_for(source, read)
    claim = ranges.RangeClaim(*region_arrays(source.region), source.rows, found.lower, found.upper)
    with overflow_named():
        lower, upper = ranges.derived(read, claim, pieces)
    room = _ROOM * np.maximum(np.maximum(np.abs(lower), np.abs(upper)), upper - lower)
    claim = dataclasses.replace(
        claim,
        lower=np.minimum(found.lower, lower - room),
        upper=np.maximum(found.upper, upper + room),
    )
    wrong = [*ranges.objections(claim, lower, upper)]
    with overflow_named():
        wrong = wrong or ranges.contradictions(model, read, calls, claim)
    if wrong:
        raise ValueError(
            "The verifier could not confirm these ranges, so no proof file was written. Received: "
            f"model {network.model.name!r}. {' '.join(wrong)}"
        )
    archive.write(path, *ranges.pack(read, claim, pieces, _notes(found, claim)))


def region_arrays(region):
    """The fields of a `ClaimedRegion`."""
    low, high = np.array(region.low), np.array(region.high)
    return region.center, low, high, np.array([region.radius, region.radius_l1])


@contextlib.contextmanager
def overflow_named():
    """Within it what overflows is an error that names the region."""
    try:
        yield
    except OverflowError as error:
        raise ValueError(
            f"A proof file needs a region on which no value overflows. Received: {error}. Use "
            "a smaller one."
        ) from error


def check_unchanged(source):
    """Refuses what is no longer about the model, or about what is behind its logits."""
    check_readable(source)
    if source.network.digest() != source.digest:
        raise ValueError(
            "The model's weights have changed since its outputs were bounded. Received: model "
            f"{source.network.model.name!r}. Bound them again."
        )


def check_readable(source):
    """Refuses what is about what is behind the model's logits."""
    network = source.network
    if source.outputs == "model" and network.decision is not None:
        raise ValueError(
            "A proof file is about logits. Received: outputs='model' for model "
            f"{network.model.name!r}, which ends in {network.decision}. Use outputs='logits'."
        )


def places_for(source, read):
    """`places_of` the verifier's own reading, or None."""
    wide, _ = expanded(read, read.gains()[1])
    return places_of(wide, source.flow)


def pieces_for(source, read, **options):
    """Multipliers in the verifier's terms; none where its steps cannot be matched.

    Args:
        options: of `recording.record`.
    """
    places = places_for(source, read)
    if places is None:
        return []
    answer = Answer(0.0, source.multipliers, source.memory)
    return pieces_of(places, recording.record(source.flow, source.traced, answer, **options))


def _notes(found, claim):
    with np.errstate(over="ignore", invalid="ignore"):
        least, width = found.upper - found.lower, claim.upper - claim.lower
        # Of ranges of next to nothing, sizes are what rounding is a share of.
        size = _NOTHING * np.maximum(np.abs(claim.lower), np.abs(claim.upper)) + 1e-100
        many = int(np.sum(width - least > _SMALL * np.maximum(least, size)))
        factors = width / np.maximum(least, 1e-300)
    factors = factors[~np.isnan(factors)]  # without an end before and after
    if many:
        yield (
            f"{many} ranges are wider than those found, {float(np.median(factors)):.5g} times as "
            f"wide in the median and {float(factors.max()):.5g} times at most: as far as the "
            "verifier's own balls and boxes reach with the multipliers of this file."
        )
