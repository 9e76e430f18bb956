"""Advantages of a generation batch: by group, by GDPO, and by a function of the user's."""

import math
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch

from grpo_trl.rewards import RewardLogs, RewardTable
from grpo_trl.trainer.advantages import FunctionRule, GdpoRule, GroupRule, check_advantages
from grpo_trl.trainer.runner import RewardedRollout
from grpo_trl.types import Completion, Ranks
from tests.helpers import oracle
from tests.helpers.models import make_model
from tests.helpers.training import relative_error, train, weights


NAN = math.nan
DOCS = Path(__file__).parents[2] / "docs" / "objective.md"
IDS = [[7], [7, 8], [], [9, 9, 9], [3], [4, 5]]


def make_rollout(values, total=None, num_generations=3):
    """Two groups of three completions with the rewards of each function."""
    values_BF = torch.tensor(values, dtype=torch.float64)
    total_B = values_BF.nansum(1) if total is None else torch.tensor(total, dtype=torch.float64)
    return RewardedRollout(
        num_generations=num_generations,
        prompts=["p"] * 3 + ["q"] * 3,
        completions=[Completion([5], ids, [True] * len(ids)) for ids in IDS],
        texts=list("abcdef"),
        rewards=RewardTable(["f", "g"], values_BF, total_B, RewardLogs(), torch.zeros(6, 2, dtype=torch.bool)),
    )


VALUES = [[1.0, 0.0], [2.0, 5.0], [4.0, NAN], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]


def test_the_group_rule_is_that_of_the_paper():
    sampled = make_rollout(VALUES)
    totals = sampled.rewards.total_B.tolist()
    expected = [*oracle.advantages(totals[:3]), *oracle.advantages(totals[3:])]
    assert GroupRule("group")(sampled, sampled.rewards.total_B) == pytest.approx(expected)


def test_gdpo_scales_over_all_ranks_and_leaves_out_what_has_no_total():
    totals = [1.0, 7.0, NAN, 1.0, 1.0, 1.0]
    elsewhere = [3.0, -3.0]  # what another rank's completions add up to
    rule = GdpoRule(torch.tensor([1.0, 2.0]), Ranks(0, 2, lambda sums: [*sums, *elsewhere]))
    advantages = rule(make_rollout(VALUES, totals), torch.tensor(totals))
    first, second = oracle.advantages([1.0, 2.0]), oracle.advantages([0.0, 5.0])
    sums = [first[0] + 2 * second[0], first[1] + 2 * second[1], 0.0, 0.0, 0.0]
    known = torch.tensor([*sums, *elsewhere], dtype=torch.float64)
    scale = known.std().item() + 1e-4
    assert advantages == pytest.approx([sums[0] / scale, sums[1] / scale, 0.0, 0.0, 0.0, 0.0])


def test_an_advantage_func_sees_one_group_at_a_time_without_what_has_no_reward():
    seen = []

    def func(rewards_per_func, group):
        seen.append((rewards_per_func.tolist(), group.prompt, group.completions, group.completion_ids))
        assert group.batch_rewards.tolist() == [1.0, 7.0, 4.0, 1.0]
        assert rewards_per_func.nansum(1).tolist() == group.rewards.tolist()
        return group.rewards * 10

    totals = [1.0, 7.0, 4.0, NAN, NAN, 1.0]
    advantages = FunctionRule(func, Ranks())(make_rollout(VALUES, totals), torch.tensor(totals))
    assert advantages == [10.0, 70.0, 40.0, 0.0, 0.0, 0.0]  # the second group has but one reward
    assert len(seen) == 1
    assert seen[0][1:] == ("p", ["a", "b", "c"], IDS[:3])


def test_tokens_may_have_advantages_of_their_own():
    assert check_advantages([[1.0, 2.0], 3], [[7, 8], [9]]) == [[1.0, 2.0], 3]
    assert check_advantages([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [[7, 8], [9]]) == [[1.0, 2.0], 3.0]


@pytest.mark.parametrize(
    "result, message",
    [
        ([1.0], "returned 1 advantages for a group of 2 completions"),
        ([[1.0], 2.0], "returned 1 advantages for the 2 tokens of a completion"),
        ([1.0, NAN], "finite numbers"),
        ([1.0, math.inf], "finite numbers"),
        (None, "returned None; it must return a list with one number"),
        (["a", "b"], r"returned \['a', 'b'\]; it must return a list"),
        (1.0, "returned 1.0; it must return a list"),
    ],
)
def test_advantages_that_cannot_be_used_are_refused(result, message):
    with pytest.raises(ValueError, match=message):
        check_advantages(result, [[7, 8], [9]])


# ---- The examples of the page ----
def examples():
    """The functions that docs/objective.md shows."""
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        if "def " in code:
            exec(code, names)
    return names


class Group:
    rewards = torch.tensor([3.0, 1.0, 2.0, 5.0, 1.0], dtype=torch.float64)
    batch_rewards = torch.tensor([3.0, 1.0, 2.0, 5.0, 1.0, 0.0, 7.0], dtype=torch.float64)


def test_the_rloo_example_takes_the_others_mean_as_baseline():
    rewards = Group.rewards.tolist()
    expected = [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    assert examples()["rloo"](Group.rewards[:, None], Group).tolist() == pytest.approx(expected)


def test_the_reinforce_plus_plus_example_scales_over_the_batch():
    rewards = Group.batch_rewards.tolist()
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    expected = [(r - mean) / (std + 1e-4) for r in Group.rewards.tolist()]
    assert examples()["reinforce_plus_plus"](Group.rewards[:, None], Group).tolist() == pytest.approx(expected)


def test_the_max_at_k_example_is_what_a_completion_adds_to_the_best_of_k():
    def best(rewards, k):
        subsets = list(combinations(rewards, k))
        return sum(map(max, subsets)) / len(subsets)

    rewards = Group.rewards.tolist()
    expected = [best(rewards, 2) - best(rewards[:i] + rewards[i + 1 :], 2) for i in range(len(rewards))]
    assert list(examples()["max_at_k"](Group.rewards[:, None], Group)) == pytest.approx(expected)


# ---- In training ----
PROMPTS = ["ab=", "f", "a", "cde12="]


def moved(advantage_func=None, **options):
    model = make_model()
    options = {"per_device_train_batch_size": 16, "max_tokens_per_micro_batch": 20} | options
    return weights(train(model, PROMPTS, advantage_func=advantage_func, **options).model)


def test_an_advantage_func_that_computes_what_the_trainer_does_trains_alike():
    def same(rewards_per_func, group):
        return oracle.advantages(group.rewards.tolist())

    def same_per_token(rewards_per_func, group):
        advantages = oracle.advantages(group.rewards.tolist())
        return [[a] * len(ids) for a, ids in zip(advantages, group.completion_ids, strict=True)]

    before, expected = weights(make_model()), moved()
    assert relative_error(before, moved(same), expected) < 1e-6
    assert relative_error(before, moved(same_per_token), expected) < 1e-6


def test_tokens_without_an_advantage_are_not_trained_on():
    def first_token(rewards_per_func, group):
        return [[a if t == 0 else 0.0 for t in range(len(ids))] for a, ids in zip(
            oracle.advantages(group.rewards.tolist()), group.completion_ids, strict=True)]  # fmt: skip

    def nothing(rewards_per_func, group):
        return [0.0] * len(group.rewards)

    before = weights(make_model())
    assert relative_error(before, moved(first_token), moved()) > 0.1
    assert all(torch.equal(before[name], after) for name, after in moved(nothing).items())


def test_an_advantage_func_that_fails_stops_the_run():
    with pytest.raises(ValueError, match="returned 1 advantages for a group of 4"):
        moved(lambda rewards_per_func, group: [1.0])
