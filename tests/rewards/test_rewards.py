import asyncio
import contextlib
import functools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Qwen2ForSequenceClassification

import grpo_trl.rewards
from grpo_trl.rewards import RewardBatch, RewardError, Rewards
from grpo_trl.rewards.models import ModelReward
from tests.helpers.models import make_model, make_tokenizer
from tests.rewards.test_call import by_hand, make_reward_model


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


# ---- Failures (those of workers: test_pool.py) ----
def fails_on(bad: str, exception: BaseException | None = None):
    def broken(completions):
        if bad in completions:
            raise exception or RuntimeError("the judge is out")
        return [1.0] * len(completions)

    return broken


def fails_on_async(bad: str):
    async def broken(completions):
        return fails_on(bad)(completions)

    return broken


@pytest.mark.parametrize("broken", [fails_on("xx"), fails_on_async("xx")])
def test_a_completion_on_which_a_function_fails_has_no_reward(broken, caplog):
    table = Rewards([lengths, broken])(make_batch())
    assert table.failed_BF.tolist() == [[False, row == 2] for row in range(4)]
    assert table.values_BF[[0, 1, 3]].tolist() == [[0, 1], [1, 1], [3, 1]]
    assert table.values_BF[2, 0] == 2
    assert table.values_BF[2, 1].isnan()
    assert table.total_B[[0, 1, 3]].tolist() == [1, 2, 4]
    assert table.total_B[2].isnan()
    [record] = caplog.records
    assert "'broken' failed on a completion: RuntimeError: the judge is out\nThe completion: xx\n" in record.message
    assert "in broken" in record.message


def test_a_failure_of_a_function_without_weight_leaves_the_reward_defined():
    table = Rewards([lengths, fails_on("xx")], weights=[1.0, 0.0])(make_batch())
    assert table.failed_BF[:, 1].tolist() == [False, False, True, False]
    assert table.total_B.tolist() == [0, 1, 2, 3]


def test_the_failures_that_can_stop_a_run_are_those_of_functions_with_weight():
    table = Rewards([fails_on("x"), fails_on("xx"), lengths], weights=[1.0, 0.0, 2.0])(make_batch())
    assert table.names == ["broken", "broken_2", "lengths"]
    assert table.failures == {"broken": 1, "lengths": 0}


@pytest.mark.parametrize("broken", [fails_on("xx"), fails_on_async("xx")])
def test_a_function_without_weight_does_not_stop_at_its_failures(broken):
    table = Rewards([lengths, broken], weights=[1.0, 0.0], on_error="raise")(make_batch())
    assert table.total_B.tolist() == [0, 1, 2, 3]


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@example([(sys.float_info.max, 1.0)] * 2)
@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=4))
def test_finite_values_and_weights_never_add_up_to_infinity(functions):
    def constant(value):
        return lambda completions: [value] * len(completions)

    table = Rewards([constant(value) for value, _ in functions], [weight for _, weight in functions])(make_batch(1))
    assert not table.total_B.isinf().any()
    small = all(abs(value * weight) < 1e300 for value, weight in functions)
    if small and all(abs(value) < 1e300 for value, _ in functions):
        assert table.total_B.item() == pytest.approx(math.fsum(value * weight for value, weight in functions))


def test_none_that_is_returned_is_no_failure():
    table = Rewards([lengths, never])(make_batch())
    assert not table.failed_BF.any()
    assert table.failed_BF.dtype == torch.bool
    assert table.failed_BF.shape == (4, 2)


def test_an_async_function_is_retried_and_its_parts_are_called_at_the_same_time():
    made, together = [], asyncio.Semaphore(4)

    async def judge(completions):
        made.append(len(completions))
        if len(completions) > 1:
            raise OSError("one at a time")
        await together.acquire()
        while not together.locked():  # until all four are here
            await asyncio.sleep(0.01)
        return [1.0]

    batch = make_batch()
    table = Rewards(judge, retries=1)(RewardBatch(batch.prompts, batch.completions, batch.completion_ids, {}, None, 2))
    assert made == [4, 4, 2, 2, 1, 1, 1, 1]
    assert table.total_B.tolist() == [1.0] * 4


@pytest.mark.parametrize("broken", [fails_on("xx"), fails_on_async("xx")])
def test_raise_stops_with_the_completion_that_is_to_blame(broken):
    with pytest.raises(RewardError, match="the judge is out") as raised:
        Rewards([broken, lengths], on_error="raise")(make_batch())
    assert (raised.value.name, raised.value.completion) == ("broken", "xx")
    assert "RuntimeError: the judge is out" in raised.value.traceback


def test_an_interrupt_ends_the_process():
    with pytest.raises(KeyboardInterrupt):
        Rewards(fails_on("xx", KeyboardInterrupt()))(make_batch())


def test_an_exit_fails_its_completion_which_says_so():
    table = Rewards(fails_on("xx", SystemExit(1)))(make_batch())
    assert table.failures == {"broken": 1}
    assert table.reasons == {"broken": "RuntimeError: SystemExit(1)"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_function_that_takes_what_nobody_has_is_no_failure_but_a_mistake(workers):
    called = []

    def first(completions):
        called.append(1)
        return [1.0] * 4

    def picky(completions, solution):
        return [1.0] * 4

    with pytest.raises(ValueError, match="'picky' takes solution"):
        Rewards([first, picky], workers=workers)(make_batch())
    assert not called


def test_each_function_is_watched_under_its_name():
    names = []

    @contextlib.contextmanager
    def watch(name):
        names.append(name)
        yield

    async def judge(completions):
        return [1.0] * len(completions)

    Rewards([judge, lengths, lengths, even_only])(make_batch(), phase=watch)
    assert names == ["lengths", "lengths_2", "even_only", "judge"]


def test_closing_without_workers_does_nothing():
    rewards = Rewards(lengths)
    rewards.close()
    assert rewards(make_batch()).total_B.tolist() == [0, 1, 2, 3]


def test_notes_of_all_functions_are_gathered_and_new_for_each_call():
    def first(completions, log_extra):
        log_extra("parsed", completions)
        return lengths(completions)

    async def second(completions, log_metric):
        log_metric("calls", 1)
        return lengths(completions)

    rewards = Rewards([first, second])
    for _ in range(2):
        logs = rewards(make_batch()).logs
        assert logs.columns == {"parsed": ["", "x", "xx", "xxx"]}
        assert logs.metrics == {"calls": [1.0]}


def test_names_that_occur_twice_are_made_distinct():
    twice = functools.partial(lengths)
    assert Rewards([lengths, even_only, twice, lengths]).names == ["lengths", "even_only", "lengths_2", "lengths_3"]


def named(name):
    def function(completions):
        return [1.0] * len(completions)

    function.__name__ = name
    return function


@given(st.lists(st.sampled_from(["f", "f_2", "f_3", "g"]), min_size=1, max_size=6))
def test_names_are_distinct_and_the_first_of_each_keeps_its_own(names):
    distinct = Rewards([named(name) for name in names]).names
    assert len(set(distinct)) == len(names)
    for i, name in enumerate(names):
        assert distinct[i] == name or name in names[:i]


@pytest.mark.parametrize("reward_funcs", [None, [], ()])
def test_no_reward_function_is_refused(reward_funcs):
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        Rewards(reward_funcs)


@pytest.mark.parametrize("wrong", [3, {"f": lengths}, None, (lengths, 1.0), math])
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
@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            make_model,
            TypeError,
            "has a Qwen2ForCausalLM, which is a language model: .* AutoModelForSequenceClassification",
        ),
        (lambda: make_model().model, TypeError, "has a Qwen2Model, which does not return one number per sequence"),
        (lambda: get_peft_model(make_model(), LoraConfig()), TypeError, "has a Peft.*, which is a language model"),
        (
            lambda: torch.nn.Linear(2, 1),
            TypeError,
            "has a Linear, which is a torch module but no model of transformers",
        ),
        (lambda: make_reward_model(num_labels=2), ValueError, "with num_labels=2, and a reward is one number"),
        (
            lambda: Qwen2ForSequenceClassification,
            TypeError,
            "the class Qwen2ForSequenceClassification, not an instance",
        ),
    ],
)
def test_a_model_that_gives_no_reward_is_refused_with_one_that_does(tokenizer, make, error, message):
    with pytest.raises(error, match=message):
        Rewards(make(), processing_classes=tokenizer)


def test_a_reward_model_with_an_adapter_is_one(tokenizer):
    model = get_peft_model(make_reward_model(), LoraConfig(task_type="SEQ_CLS"))
    assert not Rewards(model, processing_classes=tokenizer)(make_batch()).failed_BF.any()


def test_a_path_without_a_classification_head_is_refused(tmp_path, tokenizer):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"checkpoint of the reward model .* has no score.weight, which would be random"
    ):
        Rewards(str(tmp_path), processing_classes=tokenizer)


def test_a_path_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no path or hub name of a model .* Pass a function itself, not its name"):
        Rewards(str(tmp_path / "accuracy"))


def test_a_model_without_a_tokenizer_says_what_to_pass(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer to be found, .* pass it in reward_processing_classes"):
        Rewards(make_reward_model())
    make_reward_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has no tokenizer at its path, '{tmp_path}'; pass it in"):
        Rewards(str(tmp_path))
    with pytest.raises(TypeError, match="reward_processing_classes has a str for a reward model; pass its tokenizer"):
        Rewards(make_reward_model(), processing_classes="path")


def test_a_model_that_gives_several_numbers_fails_by_its_shape(tokenizer, caplog):
    model = make_reward_model()
    model.score = torch.nn.Linear(32, 3, bias=False)
    Rewards(model, processing_classes=tokenizer)(make_batch())
    assert "returns logits of shape (1, 3) for 1 completions" in caplog.text


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


def test_a_tokenizer_that_cannot_pad_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has neither a pad_token nor an eos_token"):
        Rewards(make_reward_model(), processing_classes=tokenizer)


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


def test_a_function_named_like_a_column_of_the_table_is_refused():
    def completion(completions):
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match=r"named 'completion'.*rename"):
        Rewards(completion)


# ---- What importing costs ----
def test_all_names_of_the_room_are_there():
    for name in grpo_trl.rewards.__all__:
        assert getattr(grpo_trl.rewards, name).__name__ == name
    assert sorted(name for names in grpo_trl.rewards._MODULES.values() for name in names) == grpo_trl.rewards.__all__
    assert set(grpo_trl.rewards.__all__) <= set(dir(grpo_trl.rewards))
    with pytest.raises(AttributeError, match="no attribute 'Reward'"):
        _ = grpo_trl.rewards.Reward


def test_all_names_of_the_package_are_there():
    for name in grpo_trl.__all__:
        assert getattr(grpo_trl, name).__name__ == name
    assert grpo_trl.__version__[0].isdigit()
    assert {*grpo_trl.__all__, "__version__"} <= set(dir(grpo_trl))
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = grpo_trl.Trainer


@pytest.mark.parametrize("name", ["RewardBatch", "format_tags", "json_schema", "length_penalty", "python_tests"])
def test_a_function_is_imported_without_torch(name):
    code = f"import sys; from grpo_trl.rewards import {name}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


def test_a_function_of_weight_0_only_watches():
    rewards = Rewards([lambda completions: [None, 1.0], lambda completions: [5.0, 7.0]], [1.0, 0.0])
    table = rewards(RewardBatch(["p"] * 2, ["a", "b"], [[1], [2]], {}))
    assert table.total_B[0].isnan()
    assert table.total_B[1] == 1.0


def test_an_async_function_that_is_cancelled_by_others_fails_its_completion():
    async def cancelled(completions):
        raise asyncio.CancelledError

    table = Rewards(cancelled)(RewardBatch(["p"] * 2, ["a", "b"], [[1], [2]], {}))
    assert table.failed_BF.all()
