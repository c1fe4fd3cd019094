"""Hundreds of forged files of every kind of claim about regions: what verifies must be true."""

import numpy as np
import pytest
import test_localgains
import test_partitions
import test_properties
from falsifying import Model, forgery, least_margins
from small_networks import network_of

from tf_lyapunov import gain_on
from tf_lyapunov.verification import verify

COUNT = 300


def property_is_false(model, claim, rng):
    return np.any(least_margins(Model(model), claim, rng, 300, 4) < -1e-9)


def gain_is_false(model, claim, rng):
    exact = Model(model)
    return any(
        test_localgains.largest_slope(exact, center, radius, claim.norm_name, rng)
        > gain * (1 + 1e-6) + 1e-9
        for center, radius, gain in zip(claim.centers, claim.radii, claim.gains, strict=True)
    )


def saved_gains(norm):
    def save(path):
        x = test_localgains.inputs("dense")
        gain_on(network_of("dense"), x, test_localgains.RADIUS[norm], norm=norm, proof=path)

    return save


PARTITIONS = ("box", "ball", "l1", "maxima", "conjunction")
KINDS = {
    "whole ball": (test_properties.network, lambda p: test_properties.proved("whole ball").save(p)),
    "cut ball": (test_properties.network, lambda p: test_properties.proved("cut ball").save(p)),
    "boxes": (test_properties.network, lambda p: test_properties.proved("parts").save(p)),
    "gain l2": (lambda: network_of("dense"), saved_gains("l2")),
    "gain linf": (lambda: network_of("dense"), saved_gains("linf")),
}


def partition(kind):
    if kind == "maxima":
        return test_partitions.proved("maxima", "box")
    if kind == "conjunction":
        return test_partitions.proved("dense", "box", "conjunction")
    return test_partitions.proved("dense", kind)


for name in PARTITIONS:
    KINDS[f"parts {name}"] = (
        lambda name=name: test_partitions.network("maxima" if name == "maxima" else "dense"),
        lambda path, name=name: partition(name).save(path),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_forged_files_are_caught_or_true(kind, tmp_path):
    path, (model, save) = tmp_path / "p.npz", KINDS[kind]
    save(path)
    model, rng = model(), np.random.default_rng(len(kind))
    assert verify(path, model).holds
    is_false = gain_is_false if kind.startswith("gain") else property_is_false
    verified = 0
    for _ in range(COUNT):
        found = forgery(path, model, rng, edits=int(rng.integers(1, 4)))
        if found is None or not found.holds:
            continue
        verified += 1
        assert not is_false(model, found.claim, rng)
    # Not all of them are caught by their form: what is arbitrary may be changed.
    assert verified > 0
