import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from grpo_trl.objective import gdpo_advantages, group_advantages, normalized_sums
from tests.helpers import oracle


REWARD = st.one_of(st.none(), st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1.0, 0.7]))
GROUPS = st.integers(1, 6).flatmap(
    lambda size: st.lists(st.lists(REWARD, min_size=size, max_size=size), min_size=1, max_size=5)
)


def tensor(groups):
    return torch.tensor([[math.nan if r is None else r for r in group] for group in groups], dtype=torch.float64)


def batch_deviation(groups):
    known = [r for group in groups for r in group if r is not None]
    mean = math.fsum(known) / len(known)
    return math.sqrt(math.fsum((r - mean) ** 2 for r in known) / (len(known) - 1))


@given(GROUPS)
def test_group_scale_agrees_with_the_paper(groups):
    expected = torch.tensor([oracle.advantages(g) for g in groups], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(tensor(groups)), expected, rtol=1e-9, atol=1e-9)


@given(GROUPS)
def test_no_scale_leaves_the_distance_from_the_mean(groups):
    expected = torch.tensor([oracle.advantages(g, divisor=0) for g in groups], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(tensor(groups), "none"), expected, rtol=1e-9, atol=1e-9)


@given(GROUPS.filter(lambda groups: sum(r is not None for g in groups for r in g) > 1))
def test_batch_scale_divides_by_the_deviation_of_the_batch_and_not_of_these_groups(groups):
    batch = [*groups, [5.0, -40.0, None]]
    expected = torch.tensor([oracle.advantages(g, divisor=batch_deviation(batch)) for g in groups])
    batch_rewards = torch.cat([tensor(groups).flatten(), tensor([[5.0, -40.0, None]]).flatten()])
    actual = group_advantages(tensor(groups), "batch", batch_rewards)
    torch.testing.assert_close(actual, expected.double(), rtol=1e-6, atol=1e-6)


@given(GROUPS, st.integers(500, 1013), st.sampled_from(["group", "batch"]))
def test_advantages_of_huge_rewards_are_those_of_the_rewards_in_another_unit(groups, power, scale):
    rewards = tensor(groups)
    huge = rewards * 2.0**power
    more = torch.tensor([5.0, -40.0], dtype=torch.float64)
    batch = [torch.cat([huge.flatten(), more * 2.0**power]), torch.cat([rewards.flatten(), more])]
    centered = [oracle.advantages(g, divisor=0) for g in groups]
    deviations = [batch[1][~batch[1].isnan()].std().item()] * len(groups)
    if scale == "group":
        counts = [len(g) - g.count(None) for g in groups]
        deviations = [
            math.sqrt(math.fsum(c**2 for c in g) / max(1, n - 1)) for g, n in zip(centered, counts, strict=True)
        ]
    expected = [[c / d if c else 0.0 for c in g] for g, d in zip(centered, deviations, strict=True)]
    actual = group_advantages(huge, scale, batch[0])
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_a_small_group_keeps_its_signal_beside_a_huge_one():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 1.7e308], [-1.7e308, 1.7e308]], dtype=torch.float64)
    expected = torch.tensor([[-1.0, 1.0]] * 3, dtype=torch.float64) * 0.5**0.5
    torch.testing.assert_close(group_advantages(rewards), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_of_any_size_give_exactly_zero(scale):
    for value, size in itertools.product([0.7, 1e-300, 1e300, -0.1, 0.0], [2, 3, 8, 7]):
        rewards = torch.full((3, size), value, dtype=torch.float64)
        other = torch.cat([rewards.flatten(), torch.tensor([1.0, 2.0], dtype=torch.float64)])
        assert (group_advantages(rewards, scale, other) == 0).all(), (value, size)


def test_equal_float32_rewards_give_exactly_zero():
    assert (group_advantages(torch.full((2, 8), 0.7)) == 0).all()


def test_a_group_with_fewer_than_two_rewards_gives_zero():
    rewards = tensor([[None, 3.0, None], [None, None, None], [1.0, None, 2.0]])
    result = group_advantages(rewards)
    assert (result[:2] == 0).all()
    assert result[2, 1] == 0
    assert result[2, 0] < 0 < result[2, 2]


def test_result_is_float64_and_never_nan():
    result = group_advantages(tensor([[None, 1.0, 2.0]]).float())
    assert result.dtype == torch.float64
    assert result.isfinite().all()


def test_order_within_the_group_does_not_matter():
    rewards = torch.rand(4, 8, dtype=torch.float64)
    order = torch.randperm(8)
    torch.testing.assert_close(group_advantages(rewards)[:, order], group_advantages(rewards[:, order]))


def gdpo(groups, weights):
    """GDPO as its paper writes it: groups of completions, each a list of one reward per function or None."""
    sums = []
    for group in groups:
        compared = [oracle.advantages([rewards[f] for rewards in group]) for f in range(len(weights))]
        for i, rewards in enumerate(group):
            known = any(r is not None for r in rewards)
            sums.append(math.fsum(w * a[i] for w, a in zip(weights, compared, strict=True)) if known else None)
    known = [s for s in sums if s is not None]
    mean = math.fsum(known) / len(known)
    deviation = math.sqrt(math.fsum((s - mean) ** 2 for s in known) / (len(known) - 1))
    return [0.0 if s is None else (s - mean) / (deviation + 1e-4) for s in sums]


@given(st.lists(st.lists(st.tuples(REWARD, REWARD), min_size=4, max_size=4), min_size=2, max_size=4))
def test_gdpo_compares_each_reward_within_its_group_and_scales_over_the_batch(groups):
    assume(sum(any(r is not None for r in rewards) for group in groups for rewards in group) > 1)
    rewards = torch.stack([tensor(group) for group in groups])
    sums = normalized_sums(rewards, torch.tensor([0.5, 2.0]))
    first = gdpo_advantages(sums[:1], sums)  # what a rank that holds the first group gets
    expected = torch.tensor(gdpo(groups, [0.5, 2.0]), dtype=torch.float64).view(len(groups), 4)
    torch.testing.assert_close(gdpo_advantages(sums, sums), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(first, expected[:1], rtol=1e-7, atol=1e-7)


def test_gdpo_tells_completions_apart_whose_rewards_have_the_same_sum():
    rewards = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    assert (group_advantages(rewards.sum(-1)) == 0).all()
    sums = normalized_sums(rewards, torch.tensor([1.0, 2.0]))
    assert gdpo_advantages(sums, sums)[0, 1] > 0 > gdpo_advantages(sums, sums)[0, 0]


def test_gdpo_of_equal_rewards_is_exactly_zero():
    sums = normalized_sums(torch.full((2, 4, 2), 0.7), torch.tensor([1.0, 1.0]))
    assert (gdpo_advantages(sums, torch.cat([sums.flatten(), torch.tensor([1.0, -1.0])])) == 0).all()


def test_errors_name_the_option():
    with pytest.raises(ValueError, match="batch_rewards"):
        group_advantages(torch.zeros(1, 2), "batch")
