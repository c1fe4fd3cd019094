"""A single mistake in a reading that rounding does not hide is found by validation."""

from unittest import mock

import pytest
from soundness import power

from tf_lyapunov.program import validation


@pytest.mark.parametrize("seed", range(0, 100, 20))
def test_a_random_mistake_in_a_reading_is_found(seed):
    found = power.measure(20, seed)
    assert found.count == 20
    assert found.missed == []


def test_a_validation_that_compares_nothing_is_noticed():
    with mock.patch.object(validation, "_hidden", lambda *a: 0.0):
        found = power.measure(10)
    assert len(found.missed) == 10


@pytest.mark.slow
def test_of_a_thousand_random_mistakes_at_most_one_is_missed():
    found = power.measure(1000, 1000)
    assert found.caught >= 999
    assert len(found.tried) >= 18  # kinds of mistakes


def test_a_network_of_fifty_layers_is_read_rightly_and_mistakes_in_its_last_layers_are_found():
    observed = power.Observed(5)
    program = observed.network.program
    assert len(program.steps) > 50
    validation.validate(observed.network, [observed.x])
    for index in range(len(program.steps) - 4, len(program.steps)):
        step = program.steps[index]
        place = len(step.operations or ()) - 1
        if place < 1:
            continue
        wrong = power.dataclasses.replace(step, operations=step.operations[:place])
        steps = (*program.steps[:index], wrong, *program.steps[index + 1 :])
        changed = power.dataclasses.replace(program, steps=steps)
        if observed.moves(index, wrong) > power.ALLOWANCES:
            with pytest.raises(power.UnfaithfulReading):
                validation.validate(observed.with_program(changed), [observed.x])
