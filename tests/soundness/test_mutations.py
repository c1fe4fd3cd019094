"""Every old fault, put back, is found: by the fuzzer's oracles, or by validation, as listed."""

import pytest
from soundness import claims, mutations


@pytest.mark.parametrize("name", list(mutations.FAULTS))
def test_an_old_fault_put_back_is_found(name):
    found, crashes = mutations.finders(name)
    assert mutations.FAULTS[name].found_by <= found
    assert crashes == []


@pytest.mark.parametrize("name", list(mutations.FAULTS))
def test_nothing_is_found_without_a_fault(name):
    """In the same models, by the same claims."""
    fault = mutations.FAULTS[name]
    with mutations.contradictions() as refused:
        assert claims.check(fault.specimen(), fault.kinds).violations == []
    assert refused == []


def test_at_least_fifteen_faults_of_reading_and_arithmetic_are_tried():
    assert len(mutations.FAULTS) >= 25
    by_validation = [n for n, f in mutations.FAULTS.items() if mutations.VALIDATION in f.found_by]
    by_oracles = [n for n, f in mutations.FAULTS.items() if mutations.FUZZER in f.found_by]
    assert len(by_validation) >= 12
    assert len(by_oracles) >= 20
