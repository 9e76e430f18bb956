"""Completions move between ranks; here each rank is a thread."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from grpo_trl.distributed.load_balance import Balancer
from grpo_trl.logprobs.packing import Packer
from grpo_trl.types import Completion, Ranks


class Threads:
    """Collectives for as many threads."""

    def __init__(self, count):
        self.values = [None] * count
        self.barrier = threading.Barrier(count, timeout=10)
        self.exchanges = 0

    def collect(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def balancer(self, rank):
        def exchange(outgoing):
            self.exchanges += 1
            return [sent[rank] for sent in self.collect(rank, outgoing)]

        def gather(values):
            return [value for values in self.collect(rank, values) for value in values]

        return Balancer(Ranks(rank, len(self.values), gather), exchange)

    def balance(self, shares, trains=lambda completion: bool(completion.advantage), **packer):
        packer = Packer(**{"batch_size": 4, "max_tokens": None, "pad_token_id": 0} | packer)

        def work(rank):
            return self.balancer(rank).balance(shares[rank], trains, packer.group_size)

        with ThreadPoolExecutor(len(shares)) as pool:
            return list(pool.map(work, range(len(shares))))


def group(prompt, lengths, advantage=1.0):
    """Completions that differ from all others."""
    return [
        Completion([prompt] * 5, [prompt, place, *[7] * length], [True] * (length + 2), advantage=advantage)
        for place, length in enumerate(lengths)
    ]


def ids(completions):
    return sorted(tuple(c.ids) for c in completions)


def test_work_moves_within_its_part_to_a_rank_that_has_none():
    flat = group(1, [3, 3], advantage=0.0)
    busy = [group(2, [30, 30]) + group(3, [30, 30]), group(4, [5, 5]) + group(5, [5, 5])]
    ranks = Threads(2)
    first, second = ranks.balance([busy, [flat, flat]])
    assert [len(part) for part in first] == [2, 2]
    assert [len(part) for part in second] == [4, 4]
    for place in range(2):
        assert ids(first[place] + second[place]) == ids(busy[place] + flat)
        assert second[place][:2] == flat  # what does not train stays
        assert len({c.ids[0] for c in first[place]}) == 1  # a group is whole
    assert ranks.exchanges == 2  # one on each rank


def test_nothing_is_sent_where_nothing_moves():
    ranks = Threads(3)
    shares = [[group(rank, [8, 4])] for rank in range(3)]
    assert ranks.balance(shares) == shares
    assert ranks.exchanges == 0


def test_a_single_rank_keeps_all():
    share = [group(1, [3, 90]), []]
    assert Threads(1).balance([share]) == [share]


@pytest.mark.parametrize("shared_prefix, moved", [(True, 0), (False, 1)])
def test_a_prompt_that_is_padded_to_each_completion_costs_as_often(shared_prefix, moved):
    alone = [Completion([9] * 500, [place, 7], [True] * 2, advantage=1.0) for place in range(2)]
    shares = Threads(2).balance([[alone], [[]]], shared_prefix=shared_prefix)
    assert len(shares[1][0]) == moved


def test_everything_known_of_a_completion_moves_with_it():
    known = Completion([1, 2], [3, 4], [True, False], ended=False, sampler_logps=[-1.0, -2.0], advantage=2.0)
    (first,), (second,) = Threads(2).balance([[[known, *group(5, [1])]], [[]]])
    assert sorted(map(repr, first + second)) == sorted(map(repr, [known, *group(5, [1])]))
    assert second
    assert torch.tensor(second[0].advantage) > 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_completions_of_a_group_meet_on_the_rank_that_rewards_it(ranks):
    """However they were sampled; a rank may have no group."""
    groups = 4
    rows = [(g, place) for g in range(groups) for place in range(ranks * 3)]
    completions = {(g, place): Completion([g], [g, place], [True, True]) for g, place in rows}
    owners = {g: g % ranks for g in range(groups)}
    threads, size = Threads(ranks), len(rows) // ranks

    def work(rank):
        own = rows[rank * size : (rank + 1) * size]
        return threads.balancer(rank).meet([completions[row] for row in own], own, owners)

    with ThreadPoolExecutor(ranks) as pool:
        for rank, met in enumerate(pool.map(work, range(ranks))):
            assert met == [completions[row] for row in rows if owners[row[0]] == rank]
