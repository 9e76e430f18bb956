import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_trl.objective import EntropyCoefficient, ObjectiveOptions, entropy_threshold


@given(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=50), st.sampled_from([0.0, 0.1, 0.2, 0.35, 0.8, 1.0]))
def test_the_threshold_is_the_quantile_of_the_whole_mini_batch(values, share):
    actual = entropy_threshold(torch.tensor(values, dtype=torch.float64), share)
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), 1 - share).item()
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_share_of_tokens_at_or_above_the_threshold_is_what_was_asked_for():
    values = torch.arange(11.0)
    kept = {share: int((values >= entropy_threshold(values, share)).sum()) for share in (0.0, 0.1, 0.5, 0.9, 1.0)}
    assert kept == {0.0: 1, 0.1: 2, 0.5: 6, 0.9: 10, 1.0: 11}


def test_no_token_is_above_the_threshold_of_no_tokens():
    assert entropy_threshold(torch.zeros(0), 0.2) == math.inf


def adaptive(**options):
    numbers = {"entropy_coef_delta": 0.25, "entropy_coef_max": 0.5, "entropy_target": 1.0}
    return EntropyCoefficient(ObjectiveOptions(**(numbers | {"use_adaptive_entropy": True} | options)))


def test_the_adaptive_coefficient_rises_below_the_target_and_falls_above_it():
    coefficient, seen = adaptive(), []
    for entropy in (0.9, 1.0, 0.5, 2.0, 2.0, 2.0, 0.9):
        before = coefficient.applied
        coefficient.update(entropy)
        seen.append((before, coefficient.coef))
    # applied only where the step before was at or below the target
    assert seen == [(0.0, 0.25), (0.25, 0.5), (0.5, 0.5), (0.5, 0.25), (0.0, 0.0), (0.0, 0.0), (0.0, 0.25)]


def test_a_resumed_coefficient_continues_where_it_was():
    first, second = adaptive(entropy_coef=0.1), adaptive()
    first.update(0.5)
    second.load_state_dict(first.state_dict())
    assert (second.coef, second.applied) == (0.35, 0.35)
    assert second.state_dict() == first.state_dict()


def test_a_constant_coefficient_stays():
    coefficient = EntropyCoefficient(ObjectiveOptions(entropy_coef=0.01))
    coefficient.update(5.0)
    assert (coefficient.applied, coefficient.coef) == (0.01, 0.01)
