"""Trees of boxes as proof files hold them, made of the boxes of a search."""

import numpy as np
import pytest

from tf_lyapunov.local import propertyfiles
from tf_lyapunov.local.propertyfiles import parted
from tf_lyapunov.verification.boxtrees import LEAF, BoxTree
from tf_lyapunov.verification.properties import PropertyClaim


def claim_of(low, high, tree=None):
    tree = BoxTree(np.array([LEAF]), np.zeros(0)) if tree is None else tree
    low, high = np.asarray(low, float), np.asarray(high, float)
    return PropertyClaim(
        low / 2 + high / 2, low, high, np.full(2, np.inf), np.ones((1, 1)), np.zeros(1),
        np.zeros(1, int), np.zeros(1, int), tree.axes, tree.points,
    )  # fmt: skip


def halved(rng, low, high, count, share=0.5):
    """Boxes of a box, parted at random."""
    boxes = [(np.array(low, float), np.array(high, float))]
    while len(boxes) < count:
        a, b = boxes.pop(rng.integers(len(boxes)))
        axis = rng.integers(len(a))
        point = a[axis] / 2 + b[axis] / 2 if share == 0.5 else a[axis] + share * (b[axis] - a[axis])
        if a[axis] == b[axis]:
            boxes.append((a, b))
            continue
        lower, upper = b.copy(), a.copy()
        lower[axis] = upper[axis] = point
        boxes += [(a, lower), (upper, b)]
    rng.shuffle(boxes)
    return tuple(np.stack(ends) for ends in zip(*boxes, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_boxes_of_halvings_are_found_again_without_a_point(seed):
    rng = np.random.default_rng(seed)
    ends = [-1.0, 0.1, 3.0, 0.0], [1.0, 0.3, 3.0, 1e-7]  # one input does not change
    low, high = halved(rng, *ends, 200)
    tree = parted(claim_of(*ends), low, high)
    assert tree.leaves == 200 and not len(tree.points) and len(tree.axes) == 399
    found = claim_of(*ends, tree).leaves()
    assert {(*a, *b) for a, b in zip(*found, strict=True)} == {
        (*a, *b) for a, b in zip(low, high, strict=True)
    }


def test_boxes_that_are_not_cut_in_the_middle_are_refused_or_have_points():
    rng = np.random.default_rng(0)
    low, high = halved(rng, [0.0, 0.0], [1.0, 1.0], 20, share=0.3)
    with pytest.raises(ValueError, match=r"boxes that were halved\. Received: others"):
        parted(claim_of([0.0, 0.0], [1.0, 1.0]), low, high)
    # As of a search within a smaller box.
    low, high = halved(rng, [0.25, 0.0], [0.75, 1.0], 20)
    claim = claim_of([0.0, 0.0], [0.875, 1.0])
    tree = parted(claim, low, high)
    assert tree.leaves == 20 and len(tree.points)
    a, b = claim_of(claim.low, claim.high, tree).leaves()
    assert np.prod(b - a, axis=1).sum() == pytest.approx(0.875)


def test_leaves_are_halved_in_place_and_their_way_is_known():
    tree = BoxTree(np.array([0, 1, LEAF, LEAF, 1, LEAF, LEAF]), np.zeros(0))
    found, wanted = propertyfiles._halved(tree, np.array([3, 6]), np.array([0, 1]))
    assert found.axes.tolist() == [0, 1, LEAF, 0, LEAF, LEAF, 1, LEAF, 1, LEAF, LEAF]
    assert np.flatnonzero(wanted).tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10]
    claim = claim_of([0.0, 0.0], [1.0, 1.0], found)
    batches = list(found.batches(claim.low, claim.high, 4, wanted=wanted))
    assert sorted(np.concatenate([b[0] for b in batches])) == [4, 5, 9, 10]
