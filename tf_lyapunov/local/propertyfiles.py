"""Proof files of properties that hold on a region, or on every part of it."""

import dataclasses

import numpy as np

from tf_lyapunov.local.partfiles import save_partition
from tf_lyapunov.local.ranges import check_unchanged, overflow_named, pieces_for, region_arrays
from tf_lyapunov.verification import archive, properties
from tf_lyapunov.verification.ranges import Passes, contradictions
from tf_lyapunov.verification.reading import read_with_calls

# Halvings of a part that the verifier does not prove as it is.
_FURTHER = 12


def save_property(found, path):
    """Writes the proof file of a `verifying.Verification`; see its `save`."""
    source = found.source
    if not found.is_proved or source is None:
        raise ValueError(
            "A proof file needs a property that `verify_property` proved. Received: status "
            f"{found.status}" + ("." if source is not None else ", without what it was found by.")
        )
    by_units = found.tree is not None and found.tree.partition.leaves is not None
    if found.leaves is None and not by_units:
        raise ValueError(
            "A proof file holds a region as a whole, parts of a box split along the inputs, or "
            f"parts split at hidden units. Received: a proof by {found.branches} branches, too "
            "many or of inputs on a ball. Verify the property with branching='units', or with "
            "more `effort`."
        )
    check_unchanged(source)
    if found.leaves is None:
        save_partition(found, path)
        return
    network, region, unsafe = source.network, source.region, found.unsafe
    model, read, calls = read_with_calls(network.model, region.center.shape)
    passes = Passes(read)
    pieces = pieces_for(source, read) if not found.leaves else []
    claim = properties.PropertyClaim(
        *region_arrays(region),
        unsafe.rows,
        unsafe.bounds,
        unsafe.strict.astype(np.int64),
        np.asarray(unsafe.starts, np.int64),
        np.array([properties.LEAF]),
        np.zeros(1),
    )
    with overflow_named():
        nodes = [(properties.LEAF, 0.0)]
        if found.leaves:
            nodes = _tree(
                claim, passes, *(np.stack(ends) for ends in zip(*found.leaves, strict=True))
            )
        axes, points = zip(*nodes, strict=True)
        claim = dataclasses.replace(
            claim, axes=np.array(axes, np.int64), points=np.array(points, np.float64)
        )
        failed = next(properties.failures(read, claim, pieces, passes), None)
        wrong = contradictions(model, read, calls, claim) if failed is None else [
            "It does not prove all parts of the region by its own bounds."
        ]  # fmt: skip
    if wrong:
        raise ValueError(
            "The verifier could not confirm this property, so no proof file was written. "
            f"Received: model {network.model.name!r}. {' '.join(wrong)} Verify it with "
            "branching='inputs' where few inputs change, or on smaller regions."
        )
    archive.write(path, *properties.pack(read, claim, pieces))


def _tree(claim, passes, low, high):
    """Nodes `(axis, point)` in preorder that part the region as these boxes do, or further.

    Args:
        low, high: float64 (leaves, inputs), flat, of the search's own proved boxes.
    """
    found = []
    waiting = [(claim.low.reshape(-1), claim.high.reshape(-1), np.arange(len(low)), 0)]
    while waiting:
        left, right, own, depth = waiting.pop()
        if len(own) > 1:
            axis, point, below = _cut(low[own], high[own])
        else:
            shape = claim.center.shape
            region = properties.box_region(left.reshape(shape), right.reshape(shape))
            if depth >= _FURTHER or claim.holds(passes.lower(region, claim.rows)[0]):
                found.append((properties.LEAF, 0.0))
                continue
            depth += 1
            axis = int(np.argmax(right - left))
            point, below = left[axis] / 2 + right[axis] / 2, None
        found.append((axis, point))
        lower, upper = right.copy(), left.copy()
        lower[axis] = upper[axis] = point
        parts = (own, own) if below is None else (own[below], own[~below])
        waiting += [(upper, right, parts[1], depth), (left, lower, parts[0], depth)]
    return found


def _cut(low, high):
    """An input and a point at which boxes lie on one side each, and which lie below."""
    first, last = low.min(axis=0), high.max(axis=0)
    middle = first / 2 + last / 2
    below, above = high <= middle, low >= middle
    clean = np.all(below | above, axis=0) & np.any(below, axis=0) & np.any(above, axis=0)
    axis = int(np.argmax(clean))
    if not clean[axis]:
        raise ValueError("A proof file needs boxes that were halved. Received: others.")
    # A box without width along the input counts as below.
    return axis, float(middle[axis]), below[:, axis]
