"""Every old fault, put back, is found by the fuzzer."""

import functools

import pytest
from soundness import claims, generator, mutations

from tf_lyapunov.errors import UnfaithfulReading

# Training takes seconds a model.
SEEDS = {"radius": range(6), "metric": range(6), "training": range(2)}


def violations(kinds):
    """What is found in plain chains of dense layers: the mutation brought it."""
    found = []
    for seed in SEEDS[kinds[0]]:
        for layers in (1, 2):
            found += claims.check(generator.plain(seed, layers), kinds)[2]
    return found


@functools.cache
def described():
    return [generator.build(seed).described for seed in range(400)]


@pytest.mark.parametrize(
    "kinds",
    [["radius"], ["metric"], pytest.param(["training"], marks=pytest.mark.slow)],
    ids="/".join,
)
def test_nothing_is_found_without_a_fault(kinds):
    assert violations(kinds) == []


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "training" in kinds else ())
        for name, (_, kinds) in mutations.STABLE.items()
    ],
)
def test_an_old_fault_put_back_is_found(name, monkeypatch):
    """By the fuzzer, or before it by the comparison of the model with its reading."""
    mutation, kinds = mutations.STABLE[name]
    refused, first = [], UnfaithfulReading.__init__

    def noted(self, *args, **kwargs):
        refused.append(args)
        first(self, *args, **kwargs)

    monkeypatch.setattr(UnfaithfulReading, "__init__", noted)
    with mutation():
        found = violations(kinds)
    assert found or refused
    assert all(v.kind != "crash" for v in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(mutations.READER_FAULTS))
def test_the_generator_makes_models_in_which_a_fault_of_reading_shows(name):
    assert any(mutations.READER_FAULTS[name] in text for text in described())
