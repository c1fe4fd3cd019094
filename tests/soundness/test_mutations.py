"""Every old fault, put back, is found by the fuzzer."""

import pytest
from soundness import claims, generator, mutations

# Plain models of one dense chain: whatever is found there, the mutation brought.
SEEDS = range(60)


def violations(kinds, seeds=SEEDS):
    """Violations of ordinary float32 models, the first few."""
    found = []
    for seed in seeds:
        case = generator.build(seed)
        if case.policy == "float32" and not any(w in case.described for w in WEIRD):
            found += [v for v in claims.check(case, kinds)[2] if v.kind != "crash"]
        if found:
            break
    return found


# What is read wrongly today is left out, so that nothing but the mutation is measured.
WEIRD = ("nested", "wrapped", "replaced", "mask", "changed", "cast", "cloned")


@pytest.mark.parametrize("name", list(mutations.STABLE))
def test_an_old_fault_put_back_is_found(name):
    mutation, kinds = mutations.STABLE[name]
    with mutation():
        assert violations(kinds)


@pytest.mark.parametrize("name", list(mutations.READER_FAULTS))
def test_the_generator_makes_models_in_which_a_fault_of_reading_shows(name):
    word = mutations.READER_FAULTS[name]
    assert any(word in generator.build(seed).described for seed in range(400))
