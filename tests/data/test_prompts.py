import itertools
import logging
import re
from dataclasses import replace

import pytest
from datasets import Dataset, IterableDataset

from grpo_trl.data.prompts import PromptLimit, PromptSet
from grpo_trl.data.schedule import Schedule
from tests.helpers.models import make_tokenizer


UNLIMITED = PromptLimit(None, 8, "error")


def make_set(prompts: list, limit: PromptLimit = UNLIMITED, tokenizer=None, **options) -> PromptSet:
    return PromptSet(Dataset.from_dict({"prompt": prompts}), tokenizer or make_tokenizer(), limit, **options)


def read(prompts: PromptSet) -> list[str]:
    return [prompts.tokenizer.decode(prompt.ids) for prompt in prompts.prompts(range(len(prompts)))]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# ---- Prompts ----
def test_a_string_is_tokenized_as_it_stands():
    prompts = make_set(["ab=", "1", "<user>a"])
    assert [prompt.ids for prompt in prompts.prompts([0, 1, 2])] == [[15, 16, 42], [6], [3, 15]]


def test_prompts_come_with_their_row_in_the_order_asked_for(tokenizer):
    dataset = Dataset.from_dict({"prompt": ["a", "b", "c"], "answer": [1, 2, 3]})
    picked = PromptSet(dataset, tokenizer, UNLIMITED).prompts([2, 0, 2])
    assert [prompt.example for prompt in picked] == [
        {"prompt": p, "answer": a} for p, a in [("c", 3), ("a", 1), ("c", 3)]
    ]
    assert [prompt.ids for prompt in picked] == [[17], [15], [17]]
    assert PromptSet(dataset, tokenizer, UNLIMITED).prompts([]) == []


def test_prompt_only_drops_the_other_columns(tokenizer):
    dataset = Dataset.from_dict({"prompt": ["a"], "answer": [1]})
    assert PromptSet(dataset, tokenizer, UNLIMITED, prompt_only=True).prompts([0])[0].example == {"prompt": "a"}


def test_a_conversation_is_rendered_with_a_generation_prompt():
    assert read(make_set([[user("ab")], [user("a"), assistant("1"), user("b")]])) == [
        "<user>ab<assistant>",
        "<user>a<assistant>1<user>b<assistant>",
    ]


def test_a_last_message_of_the_assistant_is_continued():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}={% endfor %}"
    assert read(make_set([[user("ab"), assistant("12")]], tokenizer=tokenizer)) == ["<user>ab=<assistant>12"]


def test_chat_template_kwargs_reach_the_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template + "{{ mark }}"
    prompts = make_set([[user("a")]], tokenizer=tokenizer, chat_template_kwargs={"mark": "zz"})
    assert read(prompts) == ["<user>a<assistant>zz"]


@pytest.mark.parametrize("prompts", [["a", "", "b"], [[user("a")], [], [user("b")]]])
def test_an_empty_prompt_is_refused_with_its_row(prompts):
    with pytest.raises(ValueError, match=r"my_set\[1\]\['prompt'\] has no tokens"):
        make_set(prompts, name="my_set")


def test_the_row_of_an_empty_prompt_is_right_beyond_the_first_batch(monkeypatch):
    monkeypatch.setattr("grpo_trl.data.prompts.TOKENIZE_BATCH", 2)
    with pytest.raises(ValueError, match=r"train_dataset\[4\]"):
        make_set(["a", "b", "c", "d", "", "e"])


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="my_set is empty"):
        make_set([], name="my_set")


def test_a_dataset_without_prompts_is_refused_with_its_columns(tokenizer):
    with pytest.raises(ValueError, match=r"\['question', 'answer'\].*'prompt'.*rename_column"):
        PromptSet(Dataset.from_dict({"question": ["a"], "answer": ["b"]}), tokenizer, UNLIMITED)


@pytest.mark.parametrize(
    "wrong", [["a"], {"prompt": ["a"]}, IterableDataset.from_generator(lambda: iter([{"prompt": "a"}])), None]
)
def test_what_is_no_dataset_is_refused_by_its_type(tokenizer, wrong):
    with pytest.raises(TypeError, match=f"eval_dataset is a {type(wrong).__name__}; it must be a datasets.Dataset"):
        PromptSet(wrong, tokenizer, UNLIMITED, name="eval_dataset")


# ---- Prompts that do not fit ----
RAGGED = ["abc", "a", "abcdef", "ab", "abcd"]  # of a context of 10, with 7 for the completion, 3 remain


def limit(policy: str, context: int = 10, completion: int = 7) -> PromptLimit:
    return PromptLimit(context - completion, completion, policy)


def test_prompts_that_just_fit_pass_in_silence(caplog):
    prompts = make_set(["abc", "a"], limit("error"))
    assert (len(prompts), caplog.records) == (2, [])


def test_an_overflow_is_an_error_that_names_row_lengths_and_a_remedy_that_works():
    with pytest.raises(ValueError, match="2 of 5 prompts of my_set") as raised:
        make_set(RAGGED, limit("error"), name="my_set")
    message = str(raised.value)
    assert "max_completion_length=7" in message
    assert "row 2, has 6 tokens, and 3 fit" in message
    assert "prompt_overflow='drop' or 'truncate_left'" in message
    remedy = int(re.search(r"set max_completion_length=(\d+) or less", message)[1])
    assert read(make_set(RAGGED, limit("error", completion=remedy))) == RAGGED
    with pytest.raises(ValueError, match="leave no room"):
        make_set(RAGGED, limit("error", completion=remedy + 1))


@pytest.mark.parametrize("length", [10, 11])
def test_no_max_completion_length_is_suggested_where_none_works(length):
    with pytest.raises(ValueError, match="the model's context is 10: set prompt_overflow='drop'") as raised:
        make_set(["a" * length], limit("error"))
    assert "set max_completion_length" not in str(raised.value)


def test_drop_leaves_out_what_does_not_fit_and_logs_the_count(caplog):
    prompts = make_set(RAGGED, limit("drop"), name="my_set")
    assert len(prompts) == 3
    assert read(prompts) == ["abc", "a", "ab"]
    assert [prompt.example["prompt"] for prompt in prompts.prompts([2, 0])] == ["ab", "abc"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "2 of 5 prompts of my_set" in record.getMessage()
    assert "prompt_overflow='drop'" in record.getMessage()


def test_drop_refuses_to_leave_nothing():
    with pytest.raises(ValueError, match="prompt_overflow='drop' leaves none"):
        make_set(["abcd", "abcde"], limit("drop"))


def test_truncate_left_keeps_the_end_of_what_does_not_fit(caplog):
    prompts = make_set(RAGGED, limit("truncate_left"))
    assert read(prompts) == ["abc", "a", "def", "ab", "bcd"]
    assert [prompt.example["prompt"] for prompt in prompts.prompts(range(5))] == RAGGED
    assert "2 of 5 prompts" in caplog.text


def test_truncate_left_keeps_the_generation_prompt():
    assert read(make_set([[user("abcdef")]], limit("truncate_left"))) == ["ef<assistant>"]


@pytest.mark.parametrize("policy", ["error", "drop", "truncate_left"])
def test_without_a_context_every_prompt_fits(policy):
    assert read(make_set(RAGGED, PromptLimit(None, 7, policy))) == RAGGED


# ---- The schedule ----
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
                    seed=3,
                    shuffle=True,
                )
            )
    return found


SCHEDULES = schedules()


def generation_batch_rows(s: Schedule, generation_batch: int) -> list[int]:
    return [row for rank in range(s.world_size) for row in s.rows(generation_batch, rank)]


def step_rows(s: Schedule, generation_batch: int) -> list[set[int]]:
    """The prompts that each optimizer step of a generation batch trains on, over all ranks."""
    steps: list[set[int]] = [set() for _ in range(s.mini_batches_per_generation_batch)]
    for rank in range(s.world_size):
        for group, row in zip(s.groups(rank), s.rows(generation_batch, rank), strict=True):
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
            assert 0 <= s.num_prompts - len(rows) < s.prompts_per_generation_batch


def test_without_shuffling_generation_batches_take_the_prompts_in_order_in_every_epoch():
    for s in SCHEDULES:
        plain = replace(s, shuffle=False)
        for generation_batch in range(2 * s.generation_batches_per_epoch):
            first = generation_batch % s.generation_batches_per_epoch * s.prompts_per_generation_batch
            assert sorted(generation_batch_rows(plain, generation_batch)) == list(
                range(first, first + s.prompts_per_generation_batch)
            )


def test_a_single_rank_takes_the_prompts_in_order():
    for s in SCHEDULES:
        plain = replace(s, shuffle=False, world_size=1, batch_size=s.batch_size * s.world_size)
        assert plain.rows(0, rank=0) == list(range(plain.prompts_per_generation_batch))


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
        seed=0,
        shuffle=True,
    )
    orders = [s.rows(0, 0), s.rows(1, 0), replace(s, seed=1).rows(0, 0), list(range(64))]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert replace(s).rows(1, 0) == orders[1]


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


SMALL = Schedule(
    num_prompts=7,
    num_generations=4,
    batch_size=8,
    accumulation=2,
    steps_per_generation=2,
    num_iterations=1,
    world_size=2,
    seed=0,
    shuffle=True,
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
