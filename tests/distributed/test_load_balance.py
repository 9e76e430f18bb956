"""Which rank trains on which completions."""

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_trl.distributed.load_balance import MIN_GAIN, assign
from grpo_trl.logprobs.packing import GroupSize


def sizes(largest_prompt=300, largest=100):
    completions = st.lists(st.integers(0, largest), min_size=1, max_size=6).map(tuple)
    group = st.builds(GroupSize, st.integers(0, largest_prompt), completions)
    return st.lists(st.lists(group, max_size=4), min_size=1, max_size=6)


def loads(shares, held):
    return [
        sum(
            shares[rank][group].prompt + sum(shares[rank][group].completions[i] for i in members)
            for (rank, group), members in holding.items()
        )
        for holding in held
    ]


def at_home(shares):
    return [
        {(rank, i): list(range(len(group.completions))) for i, group in enumerate(share)}
        for rank, share in enumerate(shares)
    ]


@settings(deadline=None)
@given(sizes())
def test_each_completion_is_trained_on_once(shares):
    everything = [
        (rank, i, member)
        for rank, share in enumerate(shares)
        for i, group in enumerate(share)
        for member in range(len(group.completions))
    ]
    held = [(*key, member) for holding in assign(shares) for key, members in holding.items() for member in members]
    assert sorted(held) == everything


@settings(deadline=None)
@given(sizes())
def test_no_rank_gets_more_than_the_busiest_had(shares):
    assert max(loads(shares, assign(shares))) <= max(loads(shares, at_home(shares)))


@settings(deadline=None)
@given(sizes(largest_prompt=0))
def test_ranks_differ_by_one_completion_at_most_where_prompts_cost_nothing(shares):
    after = loads(shares, assign(shares))
    largest = max((size for share in shares for group in share for size in group.completions), default=0)
    worth = max(1.0, MIN_GAIN * sum(after) / len(after))
    assert max(after) - min(after) <= largest + worth


@settings(deadline=None)
@given(sizes(), st.integers(1, 5))
def test_what_is_balanced_stays(shares, ranks):
    assert assign([shares[0]] * ranks) == at_home([shares[0]] * ranks)


def test_whole_groups_move_where_that_is_as_good():
    groups = [GroupSize(50, (10, 20, 30))] * 4
    held = assign([groups, []])
    assert [sorted(holding.values()) for holding in held] == [[[0, 1, 2]] * 2] * 2


def test_a_prompt_is_computed_twice_where_its_completions_are_worth_it():
    assert loads_of(prompt=10, completions=(100,) * 4) == [210, 210]
    assert loads_of(prompt=1000, completions=(1,) * 4) == [1004, 0]


def loads_of(prompt, completions):
    shares = [[GroupSize(prompt, completions)], []]
    return loads(shares, assign(shares))


# ---- The figures of docs/distributed.md ----
def ranks_of_a_generation_batch(mean, source):
    """64 ranks with two groups of 8 each, every second of which trains; lengths are log-normal."""
    spread = math.sqrt(math.log(1 + 0.6**2))
    place = math.log(mean) - spread**2 / 2

    def group():
        return GroupSize(100, tuple(max(1, round(source.lognormvariate(place, spread))) for _ in range(8)))

    return [[group() for _ in range(2) if source.random() < 0.5] for _ in range(64)]


def busiest(loads):
    return max(loads) / statistics.mean(loads)


@pytest.mark.parametrize("mean", [50, 500])
def test_ranks_become_as_even_as_the_page_says(mean):
    generation_batches = [ranks_of_a_generation_batch(mean, random.Random(seed)) for seed in range(10)]
    assert 2.45 < statistics.mean(busiest(loads(shares, at_home(shares))) for shares in generation_batches) < 2.75
    assert 1.05 < statistics.mean(busiest(loads(shares, assign(shares))) for shares in generation_batches) < 1.15
