import asyncio
import functools

import pytest
import torch
from transformers import Qwen2ForSequenceClassification

from grpo_trl.rewards import RewardBatch, Rewards
from grpo_trl.rewards.call import ModelReward

from ..conftest import make_tokenizer
from .test_call import by_hand, make_reward_model


def make_batch(count: int = 4) -> RewardBatch:
    return RewardBatch(
        prompts=["a="] * count,
        completions=["x" * i for i in range(count)],
        completion_ids=[[5] * i for i in range(count)],
        columns={},
    )


def lengths(completions):
    return [len(text) for text in completions]


def even_only(completions):
    return [10.0 if len(text) % 2 == 0 else None for text in completions]


def never(completions):
    return [None] * len(completions)


def test_one_function_needs_no_list():
    table = Rewards(lengths)(make_batch())
    assert table.names == ["lengths"]
    assert table.values_BF.tolist() == [[0.0], [1.0], [2.0], [3.0]]
    assert table.values_BF.dtype == table.total_B.dtype == torch.float64


def test_the_total_is_the_weighted_sum_of_the_functions_that_apply():
    table = Rewards([lengths, even_only, never], weights=[2.0, -0.5, 7.0])(make_batch())
    assert table.total_B.tolist() == [2 * 0 - 0.5 * 10, 2 * 1, 2 * 2 - 0.5 * 10, 2 * 3]
    assert table.values_BF.isnan().tolist() == [[False, i % 2 == 1, True] for i in range(4)]


def test_the_total_is_undefined_only_where_no_function_applies():
    table = Rewards([even_only, never])(make_batch())
    assert table.total_B.isnan().tolist() == [False, True, False, True]
    assert table.total_B[[0, 2]].tolist() == [10.0, 10.0]


def test_a_weight_of_zero_leaves_the_reward_defined():
    table = Rewards([lengths], weights=[0.0])(make_batch())
    assert table.total_B.tolist() == [0.0] * 4


def test_sync_and_async_values_stand_in_the_order_of_the_functions():
    async def one(completions):
        return [1] * len(completions)

    async def three(completions):
        return [3] * len(completions)

    def two(completions):
        return [2] * len(completions)

    table = Rewards([three, two, one, lengths])(make_batch(2))
    assert table.names == ["three", "two", "one", "lengths"]
    assert table.values_BF.tolist() == [[3, 2, 1, 0], [3, 2, 1, 1]]


def test_async_functions_that_wait_for_each_other_both_finish():
    here, there = asyncio.Event(), asyncio.Event()

    async def first(completions):
        here.set()
        await asyncio.wait_for(there.wait(), 10)
        return lengths(completions)

    async def second(completions):
        there.set()
        await asyncio.wait_for(here.wait(), 10)
        return lengths(completions)

    assert Rewards([first, second])(make_batch()).total_B.tolist() == [0, 2, 4, 6]


def test_an_exception_of_a_function_reaches_the_caller():
    async def broken(completions):
        raise RuntimeError("the judge is out")

    with pytest.raises(RuntimeError, match="the judge is out"):
        Rewards([lengths, broken])(make_batch())


def test_notes_of_all_functions_are_gathered_and_new_for_each_call():
    def first(completions, log_extra):
        log_extra("parsed", completions)
        return lengths(completions)

    async def second(completions, log_metric):
        log_metric("calls", 1)
        return lengths(completions)

    rewards = Rewards([first, second])
    for _ in range(2):
        notes = rewards(make_batch()).notes
        assert notes.columns == {"parsed": ["", "x", "xx", "xxx"]}
        assert notes.metrics == {"calls": [1.0]}


def test_names_that_occur_twice_are_made_distinct():
    twice = functools.partial(lengths)
    assert Rewards([lengths, even_only, twice, lengths]).names == ["lengths", "even_only", "lengths_2", "lengths_3"]


@pytest.mark.parametrize("reward_funcs", [None, [], ()])
def test_no_reward_function_is_refused(reward_funcs):
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        Rewards(reward_funcs)


@pytest.mark.parametrize("wrong", [3, {"f": lengths}])
def test_what_is_no_reward_function_is_refused(wrong):
    with pytest.raises(TypeError, match=f"{type(wrong).__name__}.*it must be a callable"):
        Rewards([lengths, wrong])


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 2.0, 3.0]])
def test_another_number_of_weights_than_functions_is_refused(weights):
    with pytest.raises(ValueError, match=f"reward_weights has {len(weights)} entries for 2 reward_funcs"):
        Rewards([lengths, even_only], weights=weights)


def test_another_number_of_tokenizers_than_functions_is_refused(tokenizer):
    with pytest.raises(ValueError, match="reward_processing_classes has 1 entries for 2 reward_funcs"):
        Rewards([lengths, make_reward_model()], processing_classes=tokenizer)


# ---- Reward models ----
def expected_rewards(tokenizer) -> list[float]:
    return [by_hand(make_reward_model(), tokenizer, "a=" + "x" * i) for i in range(4)]


def test_a_model_and_a_function_stand_side_by_side(tokenizer):
    rewards = Rewards([lengths, make_reward_model()], processing_classes=[None, tokenizer], batch_size=3)
    table = rewards(make_batch())
    assert table.names == ["lengths", "Qwen2ForSequenceClassification"]
    assert table.values_BF[:, 0].tolist() == [0, 1, 2, 3]
    assert table.values_BF[:, 1].tolist() == pytest.approx(expected_rewards(tokenizer), abs=1e-5)


def test_a_model_given_as_a_path_is_loaded_with_its_tokenizer(tmp_path, tokenizer):
    folder = tmp_path / "judge"
    make_reward_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    table = Rewards(f"{folder}/", model_init_kwargs={"dtype": "float32"}, batch_size=3)(make_batch())
    assert table.names == ["judge"]
    assert table.total_B.tolist() == pytest.approx(expected_rewards(tokenizer), abs=1e-5)


def test_model_init_kwargs_reach_the_model_given_as_a_path(tmp_path, tokenizer):
    make_reward_model().save_pretrained(tmp_path)
    rewards = Rewards(str(tmp_path), processing_classes=tokenizer, model_init_kwargs={"dtype": "bfloat16"})
    assert rewards.functions[0].model.dtype == torch.bfloat16


def test_a_tokenizer_without_padding_gets_its_end_token_and_the_model_knows():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    model = make_reward_model(pad_token_id=None)
    table = Rewards(model, processing_classes=tokenizer, batch_size=3)(make_batch())
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    assert table.total_B.tolist() == pytest.approx(expected_rewards(make_tokenizer()), abs=1e-5)


def test_prepare_models_replaces_models_and_nothing_else(tokenizer):
    rewards = Rewards([lengths, make_reward_model()], processing_classes=[None, tokenizer])
    seen = []

    def prepare(model):
        seen.append(type(model))
        with torch.no_grad():
            model.score.weight.zero_()
        return model

    rewards.prepare_models(prepare)
    assert seen == [Qwen2ForSequenceClassification]
    assert isinstance(rewards.functions[1], ModelReward)
    assert rewards(make_batch()).values_BF.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(weight):
    with pytest.raises(ValueError, match=r"reward_weights=.* must be finite"):
        Rewards([lengths, even_only], weights=[1.0, weight])


def test_a_function_named_like_a_column_of_the_table_is_refused():
    def completion(completions):
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match=r"named 'completion'.*rename"):
        Rewards(completion)
