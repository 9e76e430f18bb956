import itertools
import logging
import math
import re
from dataclasses import replace

import pytest

from grpo_trl.data.prompt_set import EpochOrder
from grpo_trl.data.schedule import Schedule


def schedules() -> list[Schedule]:
    """All valid geometries of a small grid, with datasets that fill five generation batches and a bit."""
    found = []
    grid = itertools.product([1, 2, 4, 6], [1, 2, 3], [1, 2, 4, 6], [2, 3, 4], [1, 2], [1, 2, 4])
    for batch, accumulation, steps, group, iterations, world in grid:
        whole_steps = steps % accumulation == 0 or (iterations == 1 and accumulation % steps == 0)
        if whole_steps and batch * steps * world % group == 0:
            generation_batch = batch * steps * world // group
            found.append(
                Schedule(
                    num_prompts=5 * generation_batch + generation_batch // 2,
                    num_generations=group,
                    batch_size=batch,
                    accumulation=accumulation,
                    steps_per_generation=steps,
                    num_iterations=iterations,
                    world_size=world,
                )
            )
    return found


SCHEDULES = schedules()


def rank_rows(s: Schedule, generation_batch: int, rank: int, seed: int = 3, shuffle: bool = True) -> list[int]:
    """The rows of the dataset that a rank samples."""
    prompts = SetOfRows(s.num_prompts)
    order = EpochOrder(prompts, s.prompts_per_generation_batch, seed, shuffle)
    return order.prompts(generation_batch, s.groups(rank))


class SetOfRows:
    """A set of prompts that are their indices."""

    digest = ""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def prompts(self, indices: list[int]) -> list[int]:
        return indices


def generation_batch_rows(s: Schedule, generation_batch: int, **order) -> list[int]:
    return [row for rank in range(s.world_size) for row in rank_rows(s, generation_batch, rank, **order)]


def step_rows(s: Schedule, generation_batch: int) -> list[set[int]]:
    """The prompts that each optimizer step of a generation batch trains on, over all ranks."""
    steps: list[set[int]] = [set() for _ in range(s.mini_batches_per_generation_batch)]
    for rank in range(s.world_size):
        for group, row in zip(s.groups(rank), rank_rows(s, generation_batch, rank), strict=True):
            for completion in range(s.num_generations):
                steps[s.mini_batch_of(group, completion)].add(row)
    return steps


def test_the_grid_has_every_kind_of_geometry():
    assert len(SCHEDULES) > 200
    assert {s.on_policy for s in SCHEDULES} == {True, False}
    assert any(s.batch_size % s.num_generations for s in SCHEDULES)
    assert any(s.steps_per_generation < s.accumulation for s in SCHEDULES)
    assert any(s.items_per_epoch % s.accumulation for s in SCHEDULES)


def test_groups_are_split_evenly_among_ranks():
    for s in SCHEDULES:
        owned = [s.groups(rank) for rank in range(s.world_size)]
        assert sorted(group for groups in owned for group in groups) == list(range(s.prompts_per_generation_batch))
        assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_ranks_sample_each_completion_once_and_equally_many():
    for s in SCHEDULES:
        parts = [s.parts(rank, splits=True) for rank in range(s.world_size)]
        rows = [(part.group, place) for of_rank in parts for part in of_rank for place in part.places]
        groups = range(s.prompts_per_generation_batch)
        assert sorted(rows) == [(group, place) for group in groups for place in range(s.num_generations)]
        assert {sum(len(part.places) for part in of_rank) for of_rank in parts} == {
            s.batch_size * s.steps_per_generation
        }


def test_groups_are_sampled_whole_where_that_leaves_ranks_equal_or_the_engine_cannot_split_them():
    divided = 0
    for s in SCHEDULES:
        for splits in (False, True):
            divides = s.divides_groups(splits)
            divided += divides
            assert divides == (splits and s.prompts_per_generation_batch % s.world_size > 0)
            for rank in range(s.world_size if not divides else 0):
                whole = [(group, range(s.num_generations)) for group in s.groups(rank)]
                assert s.parts(rank, splits) == whole
    assert divided > 20


def test_mini_batches_are_equally_large():
    for s in SCHEDULES:
        members = [
            s.mini_batch_of(group, g)
            for group in range(s.prompts_per_generation_batch)
            for g in range(s.num_generations)
        ]
        size = s.batch_size * s.micro_steps_per_mini_batch * s.world_size
        assert [members.count(m) for m in range(s.mini_batches_per_generation_batch)] == [
            size
        ] * s.mini_batches_per_generation_batch


def test_an_epoch_uses_each_prompt_at_most_once_and_drops_less_than_a_generation_batch():
    for s in SCHEDULES:
        for epoch in (0, 1):
            generation_batches = range(
                epoch * s.generation_batches_per_epoch, (epoch + 1) * s.generation_batches_per_epoch
            )
            rows = [
                row for generation_batch in generation_batches for row in generation_batch_rows(s, generation_batch)
            ]
            assert len(rows) == len(set(rows))
            assert set(rows) <= set(range(s.num_prompts))
            assert s.num_prompts - len(rows) == s.unseen_prompts < s.prompts_per_generation_batch


def test_without_shuffling_generation_batches_take_the_prompts_in_order_in_every_epoch():
    for s in SCHEDULES:
        for generation_batch in range(2 * s.generation_batches_per_epoch):
            first = generation_batch % s.generation_batches_per_epoch * s.prompts_per_generation_batch
            assert sorted(generation_batch_rows(s, generation_batch, shuffle=False)) == list(
                range(first, first + s.prompts_per_generation_batch)
            )


def test_a_single_rank_takes_the_prompts_in_order():
    for s in SCHEDULES:
        alone = replace(s, world_size=1, batch_size=s.batch_size * s.world_size)
        assert rank_rows(alone, 0, rank=0, shuffle=False) == list(range(s.prompts_per_generation_batch))


@pytest.mark.parametrize("world_size", [2, 4])
def test_generation_batches_and_steps_have_the_same_prompts_for_any_number_of_ranks(world_size):
    compared = 0
    for s in SCHEDULES:
        if s.world_size == 1 and s.batch_size % world_size == 0:
            split = replace(s, batch_size=s.batch_size // world_size, world_size=world_size)
            for generation_batch in range(3):
                assert sorted(generation_batch_rows(split, generation_batch)) == sorted(
                    generation_batch_rows(s, generation_batch)
                )
                assert step_rows(split, generation_batch) == step_rows(s, generation_batch)
                compared += len(step_rows(s, generation_batch)) > 1
    assert compared > 10


def test_epochs_and_seeds_have_orders_of_their_own():
    s = Schedule(
        num_prompts=64,
        num_generations=2,
        batch_size=128,
        accumulation=1,
        steps_per_generation=1,
        num_iterations=1,
        world_size=1,
    )
    orders = [rank_rows(s, 0, 0), rank_rows(s, 1, 0), rank_rows(s, 0, 0, seed=1), list(range(64))]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert rank_rows(s, 1, 0) == orders[1]


def test_places_agree_with_a_simulation_of_the_loop_of_transformers():
    """An epoch is cut into accumulations, the last of which may be short; items count from 0 in each epoch."""
    for s in SCHEDULES:
        optimizer_step = 0
        for epoch in range(3):
            uses = [
                (epoch * s.generation_batches_per_epoch + generation_batch, micro_step)
                for generation_batch in range(s.generation_batches_per_epoch)
                for _ in range(s.num_iterations)
                for micro_step in range(s.steps_per_generation)
            ]
            assert len(uses) == s.items_per_epoch
            for start in range(0, len(uses), s.accumulation):
                expected = uses[start : start + s.accumulation]
                size = s.micro_steps_per_mini_batch
                taken = [
                    (ref.generation, ref.mini_batch * size + micro_step)
                    for ref in s.mini_batches(optimizer_step, len(expected))
                    for micro_step in range(size)
                ]
                assert taken == expected, (s, optimizer_step)
                optimizer_step += 1


def test_a_schedule_is_on_policy_exactly_where_no_generation_batch_outlives_an_optimizer_step():
    for s in SCHEDULES:
        steps_of_generation_batch: dict[int, set[int]] = {}
        for step in range(s.items_per_epoch // s.accumulation):
            for ref in s.mini_batches(step, s.accumulation):
                steps_of_generation_batch.setdefault(ref.generation, set()).add(step)
        assert s.on_policy == all(len(steps) == 1 for steps in steps_of_generation_batch.values())


def test_the_steps_of_an_epoch_train_on_each_of_its_completions_num_iterations_times():
    for s in SCHEDULES:
        seen = s.generation_batches_per_epoch * s.completions_per_generation_batch
        trained = s.optimizer_steps_per_epoch * s.batch_size * s.accumulation * s.world_size
        left_over = (-s.items_per_epoch % s.accumulation) * s.batch_size * s.world_size
        assert trained - left_over == seen * s.num_iterations
        steps = s.generation_batches_per_epoch * s.optimizer_steps_per_generation_batch
        assert math.ceil(steps) == s.optimizer_steps_per_epoch


SMALL = Schedule(
    num_prompts=7,
    num_generations=4,
    batch_size=8,
    accumulation=2,
    steps_per_generation=2,
    num_iterations=1,
    world_size=2,
)


def test_a_dataset_smaller_than_a_generation_batch_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match="train_dataset has 7 prompts and a generation batch needs 8") as raised:
        SMALL.check()
    message = str(raised.value)
    assert "generation_batch_size=32 completions / num_generations=4" in message
    prompts = int(re.search(r"at least (\d+) prompts", message)[1])
    replace(SMALL, num_prompts=prompts).check()
    with pytest.raises(ValueError, match="a generation batch needs"):
        replace(SMALL, num_prompts=prompts - 1).check()
    assert f"lower per_device_train_batch_size={SMALL.batch_size}" in message


def test_what_an_epoch_leaves_out_is_logged(caplog):
    caplog.set_level(logging.INFO, logger="grpo_trl")
    replace(SMALL, num_prompts=19).check()
    assert "3 of 19 prompts do not fill a generation batch of 8" in caplog.text
    caplog.clear()
    replace(SMALL, num_prompts=16).check()
    assert caplog.text == ""
