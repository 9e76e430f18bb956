import asyncio
import functools
import math
import pickle
import threading
from collections import deque
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from grpo_trl.rewards import RewardBatch, RewardLogs
from grpo_trl.rewards.call import FunctionReward
from grpo_trl.rewards.event_loop import EventLoop
from grpo_trl.rewards.models import ModelReward
from tests.helpers.models import SIZES, make_tokenizer


STATE = SimpleNamespace(global_step=3, log_history=[{"loss": 0.5}])


def make_batch(**columns: list) -> RewardBatch:
    return RewardBatch(
        prompts=["a=", "a=", "b=", "b="],
        completions=["1", "22", "333", "4444"],
        completion_ids=[[6], [7, 7], [8] * 3, [9] * 4],
        columns=columns or {"answer": ["x", "x", "y", "y"]},
        trainer_state=STATE,
    )


def call(function, batch: RewardBatch | None = None) -> list[float]:
    result = FunctionReward(function)(batch or make_batch())
    assert (result.wrong, result.mistake) == ({}, "")
    return result.values


def mistake(function) -> str:
    result = FunctionReward(function)(make_batch())
    assert result.values == []
    return result.mistake


def lengths(completions):
    return [len(text) for text in completions]


class Lengths:
    def __call__(self, completions):
        return lengths(completions)


class AsyncLengths:
    async def __call__(self, completions):
        return lengths(completions)


async def async_lengths(completions):
    return lengths(completions)


def scaled(completions, scale):
    return [scale * len(text) for text in completions]


@pytest.mark.parametrize(
    "function, name",
    [
        (lengths, "lengths"),
        (Lengths(), "Lengths"),
        (lambda completions: [len(text) for text in completions], "<lambda>"),
        (functools.partial(scaled, scale=1), "scaled"),
        (Lengths().__call__, "__call__"),
    ],
)
def test_every_kind_of_callable_is_called_and_named(function, name):
    reward = FunctionReward(function)
    assert reward(make_batch()).values == [1.0, 2.0, 3.0, 4.0]
    assert reward.name == name
    assert not reward.is_async


@pytest.mark.parametrize("function", [async_lengths, AsyncLengths(), functools.partial(async_lengths)])
def test_every_kind_of_coroutine_function_is_recognised(function):
    reward = FunctionReward(function)
    assert reward.is_async
    [answer] = EventLoop().run([reward.call_async(make_batch())])
    assert answer.values == [1.0, 2.0, 3.0, 4.0]


def test_a_function_gets_only_what_it_names():
    seen = {}

    def reward(answer, prompts, completion_ids, trainer_state, depth=3):
        seen.update(locals())
        return [0.0] * 4

    batch = make_batch(answer=["x", "x", "y", "y"], other=[1, 2, 3, 4])
    call(reward, batch)
    del seen["seen"]
    assert seen == {
        "answer": ["x", "x", "y", "y"],
        "prompts": batch.prompts,
        "completion_ids": batch.completion_ids,
        "trainer_state": STATE,
        "depth": 3,
    }


def test_further_positional_arguments_get_nothing():
    def reward(completions, *others):
        return [float(len(others))] * len(completions)

    assert call(reward) == [0.0] * 4


def test_a_column_takes_the_place_of_a_default():
    def reward(completions, answer=None):
        return [float(a == "y") for a in answer]

    assert call(reward) == [0.0, 0.0, 1.0, 1.0]


def test_a_function_with_kwargs_gets_everything():
    seen = {}

    def reward(completions, **kwargs):
        seen.update(kwargs)
        return lengths(completions)

    call(reward)
    assert set(seen) == {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric", "answer"}


def test_a_callable_without_a_signature_gets_everything():
    class NoSignature:
        __signature__ = "none"  # inspect.signature raises

        def __call__(self, **kwargs):
            return lengths(kwargs["completions"])

    class Builtin(NoSignature):
        @property
        def __signature__(self):
            raise ValueError("no signature")

    assert call(Builtin()) == [1.0, 2.0, 3.0, 4.0]


def test_a_column_never_hides_an_argument_of_the_trainer():
    batch = make_batch(trainer_state=[1, 2, 3, 4], prompts=list("wxyz"), log_metric=[0] * 4)
    seen = {}

    def reward(prompts, trainer_state, log_metric):
        seen.update(prompts=prompts, state=trainer_state)
        log_metric("called", 1)
        return [0.0] * 4

    logs = FunctionReward(reward)(batch).logs
    assert seen == {"prompts": ["a=", "a=", "b=", "b="], "state": STATE}
    assert logs.metrics == {"called": [1.0]}


def test_an_argument_that_nobody_has_is_named_with_its_function_and_the_dataset():
    def picky(completions, solution, difficulty):
        return lengths(completions)

    def picky_of_more(completions, solution, **kwargs):
        return lengths(completions)

    with pytest.raises(ValueError, match=r"'picky_of_more' takes solution, which neither the dataset"):
        FunctionReward(picky_of_more).check_columns(["answer"])
    with pytest.raises(
        ValueError,
        match=r"'picky' takes solution, difficulty, which neither eval_dataset nor .*may take answer, completion_ids, comp",
    ):
        FunctionReward(picky).check_columns(["answer"], "eval_dataset")


@pytest.mark.parametrize(
    "function", [lengths, lambda **kwargs: [], lambda answer, *rest, depth=1: [], lambda depth=1: []]
)
def test_a_function_that_can_be_called_passes_the_check(function):
    FunctionReward(function).check_columns(["answer", "depth"])


def test_a_function_whose_defaults_name_no_column_is_refused():
    def shallow(depth=1):
        return []

    with pytest.raises(ValueError, match="'shallow' takes nothing that the dataset or the trainer has"):
        FunctionReward(shallow).check_columns(["answer"])


def nothing():
    return [1.0]


def positional(*args):
    return [1.0]


def position_only(completions, /, **kwargs):
    return [1.0]


def generator(completions):
    yield 1.0


async def async_generator(completions):
    yield 1.0


class Generator:
    def __call__(self, completions):
        yield 1.0


@functools.wraps(lengths)
def undecorated(*args):
    return lengths(*args)


@pytest.mark.parametrize(
    "function, error, message",
    [
        (nothing, ValueError, "'nothing' takes no argument by keyword"),
        (positional, ValueError, "'positional' takes no argument by keyword"),
        (undecorated, ValueError, "'lengths' takes no argument by keyword"),
        (position_only, ValueError, "'position_only' takes completions by position only"),
        (len, ValueError, "'len' takes obj by position only"),
        (generator, TypeError, "'generator' is a generator"),
        (async_generator, TypeError, "'async_generator' is a generator"),
        (Generator(), TypeError, "'Generator' is a generator"),
        (Lengths, TypeError, r"the class Lengths, not an instance of it; pass Lengths\(...\)"),
        (functools.partial(Lengths), TypeError, "the class Lengths"),
    ],
)
def test_what_could_never_be_called_is_refused_at_construction(function, error, message):
    with pytest.raises(error, match=message):
        FunctionReward(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda completions: async_lengths(completions),
        functools.partial(AsyncLengths()),
        functools.wraps(lengths)(lambda **kwargs: async_lengths(**kwargs)),
    ],
)
def test_a_coroutine_that_a_sync_function_returns_is_awaited(function):
    assert call(function) == [1.0, 2.0, 3.0, 4.0]

    async def notebook():
        return call(function)

    assert asyncio.run(notebook()) == [1.0, 2.0, 3.0, 4.0]


def test_notes_collect_columns_and_metrics():
    def reward(completions, log_extra, log_metric):
        log_extra("parsed", [text.upper() for text in completions])
        log_metric("accuracy", 0.25)
        log_metric("accuracy", torch.tensor(0.75))
        return lengths(completions)

    logs = FunctionReward(reward)(make_batch()).logs
    assert logs.columns == {"parsed": ["1", "22", "333", "4444"]}
    assert logs.metrics == {"accuracy": [0.25, 0.75]}
    assert all(type(value) is float for value in logs.metrics["accuracy"])


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5, True, -4],
        (1.0, 2.5, 1.0, -4.0),
        torch.tensor([1, 2.5, 1, -4]),
        torch.tensor([1, 2.5, 1, -4], dtype=torch.bfloat16, requires_grad=True),
        np.array([1, 2.5, 1, -4], dtype=np.float32),
        [torch.tensor(1.0), np.float64(2.5), np.int64(1), torch.tensor([-4.0])],
        [Decimal("1"), Fraction(5, 2), np.True_, -4],
        np.array([Decimal("1"), Fraction(5, 2), True, -4.0], dtype=object),
        np.array([[1], [2.5], [1], [-4]]),
        torch.tensor([[1], [2.5], [1], [-4]]),
        deque([1, 2.5, True, -4]),
        [[1], [2.5], [True], (-4,)],
        torch.tensor([1, 2.5, 1, -4]).to_sparse(),
        pd.Series([1, 2.5, 1, -4], index=[3, 2, 1, 0]),
        pd.DataFrame({"reward": [1, 2.5, 1, -4]}),
        memoryview(np.array([1, 2.5, 1, -4])),
    ],
)
def test_numbers_of_every_kind_are_accepted(returned):
    values = call(lambda completions: returned)
    assert values == [1.0, 2.5, 1.0, -4.0]
    assert all(type(value) is float for value in values)


def test_none_becomes_nan():
    values = call(lambda completions: [1, None, 3, None])
    assert [value for value in values if not math.isnan(value)] == [1.0, 3.0]
    assert [math.isnan(value) for value in values] == [False, True, False, True]


@pytest.mark.parametrize(
    "returned, message",
    [
        ([1.0, 2.0], "returned 2 values for 4 completions"),
        ([1.0] * 5, "returned 5 values for 4 completions"),
        (np.ones(3), "returned 3 values for 4 completions"),
        (1.0, "returned float; it must return a list"),
        (None, "returned NoneType; it must return a list"),
        ("1234", "returned str; it must return a list"),
        ({0: 1.0}, "returned dict; it must return a list"),
        ((x for x in range(4)), "returned generator; it must return a list"),
        (torch.tensor(1.0), "returned Tensor; it must return a list"),
        (torch.ones(4, 2), "returned an array of shape (4, 2) for 4 completions; its shape must be (4,)"),
        (np.ones((1, 4)), "returned an array of shape (1, 4) for 4 completions"),
        (np.ones((2, 2)), "returned an array of shape (2, 2) for 4 completions"),
        (pd.DataFrame({"a": [1.0] * 4, "b": [2.0] * 4}), "returned an array of shape (4, 2) for 4 completions"),
        (torch.ones(4, device="meta"), "returned a Tensor that cannot be read (NotImplementedError: "),
        (bytearray(b"1234"), "returned bytearray; it must return a list"),
        ({"rewards": [1.0] * 4}, "returned dict; it must return a list"),
        (map(float, range(4)), "returned map; it must return a list"),
    ],
)
def test_a_result_that_is_wrong_as_a_whole_is_a_mistake(returned, message):
    def wrong(completions):
        return returned

    assert mistake(wrong).startswith(f"The reward function 'wrong' {message}")


@pytest.mark.parametrize(
    "log, message",
    [
        (lambda extra, metric: extra("seen", "abc"), "calls log_extra('seen', ...) with 3 values for 4 completions"),
        (lambda extra, metric: extra("seen", "abcde"), "calls log_extra('seen', ...) with 5 values for 4 completions"),
        (lambda extra, metric: extra(3, "abcd"), "calls log_extra(3, ...); the name must be a string"),
        (lambda extra, metric: metric(None, 1.0), "calls log_metric(None, ...); the name must be a string"),
        (lambda extra, metric: extra("seen", None), "calls log_extra('seen', None); give a list with one value each"),
        (lambda extra, metric: extra("seen", 1.0), "calls log_extra('seen', 1.0); give a list with one value each"),
        (lambda extra, metric: metric("share", "a"), "calls log_metric('share', 'a'); give a number"),
        (lambda extra, metric: metric("share", [1.0]), "calls log_metric('share', [1.0]); give a number"),
        (lambda extra, metric: metric("share", None), "calls log_metric('share', None); give a number"),
        (lambda extra, metric: metric("share", 10**400), "calls log_metric('share', 1000"),
    ],
)
def test_logs_that_cannot_be_shown_are_a_mistake(log, message):
    def wrong(completions, log_extra, log_metric):
        log(log_extra, log_metric)
        return lengths(completions)

    assert mistake(wrong).startswith(f"The reward function 'wrong' {message}")


@pytest.mark.parametrize(
    "returned, place, message",
    [
        ([1.0, "2", 3.0, 4.0], 1, "returned '2' (str);"),
        ([1.0, 2.0, math.nan, 4.0], 2, "returned nan (float);"),
        ([1.0, 2.0, 3.0, math.inf], 3, "returned inf (float);"),
        ([-math.inf, 2.0, 3.0, 4.0], 0, "returned -inf (float);"),
        (torch.tensor([1.0, torch.nan, 3.0, 4.0]), 1, "returned nan (float);"),
        ([1.0, torch.tensor(torch.nan), 3.0, 4.0], 1, "returned tensor(nan) (Tensor);"),
        ([1.0, 2.0, [3.0], 4.0], 2, "returned [3.0] (list);"),
        ([1.0, 2.0, 3.0, 4j], 3, "returned 4j (complex);"),
        ([1.0, 2.0, 3.0, torch.ones(2)], 3, "returned tensor([1., 1.]) (Tensor);"),
        ([1.0, 10**400, 3.0, 4.0], 1, f"returned 1{'0' * 199} (int);"),
        ([1.0, Decimal("1e400"), 3.0, 4.0], 1, "returned Decimal('1E+400') (Decimal);"),
        ([1.0, Decimal("sNaN"), 3.0, 4.0], 1, "returned Decimal('sNaN') (Decimal);"),
    ],
)
def test_a_value_that_is_no_reward_fails_its_own_completion(returned, place, message):
    answer = FunctionReward(lambda completions: returned)(make_batch())
    assert list(answer.wrong) == [place]
    assert answer.wrong[place].startswith(message)
    assert "must return a finite number, or None" in answer.wrong[place]
    expected = [1.0, 2.0, 3.0, 4.0]
    assert math.isnan(answer.values[place])
    assert [v for i, v in enumerate(answer.values) if i != place] == [v for v in expected if v != place + 1]


def test_an_exit_is_an_error_of_the_function():
    """As where a completion is a program that the function runs."""

    def runs(completions):
        exec("raise SystemExit(3)")

    with pytest.raises(RuntimeError, match=r"SystemExit\(3\)"):
        FunctionReward(runs)(make_batch())


def test_coroutines_are_checked_like_functions():
    async def wrong(completions):
        return [1.0]

    [result] = EventLoop().run([FunctionReward(wrong).call_async(make_batch())])
    assert result.mistake.startswith("The reward function 'wrong' returned 1 values for 4")


def test_coroutines_run_at_the_same_time_and_keep_their_order():
    here, there = asyncio.Event(), asyncio.Event()

    async def first():
        here.set()
        await asyncio.wait_for(there.wait(), 10)
        return [1.0]

    async def second():
        await asyncio.wait_for(here.wait(), 10)
        there.set()
        return [2.0]

    assert EventLoop().run([first(), second()]) == [[1.0], [2.0]]


def test_the_event_loop_outlives_a_call():
    async def which():
        return [id(asyncio.get_running_loop())]

    loop = EventLoop()
    assert loop.run([which()]) == loop.run([which()])


def test_coroutines_can_be_awaited_from_inside_another_event_loop():
    async def notebook():
        return EventLoop().run([FunctionReward(async_lengths).call_async(make_batch())])

    [answer] = asyncio.run(notebook())
    assert answer.values == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
def test_a_coroutine_that_exits_does_not_end_the_event_loop(error):
    async def leaving(completions):
        raise error

    loop = EventLoop()
    with pytest.raises(RuntimeError, match=type(error).__name__):
        loop.run([FunctionReward(leaving).call_async(make_batch())])
    [answer] = loop.run([FunctionReward(async_lengths).call_async(make_batch())])
    assert answer.values == [1.0, 2.0, 3.0, 4.0]


def test_when_a_coroutine_raises_the_others_are_cancelled():
    cancelled = threading.Event()

    async def waiting():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def broken():
        await asyncio.sleep(0.05)
        raise OSError("no judge")

    with pytest.raises(OSError, match="no judge"):
        EventLoop().run([waiting(), broken()])
    assert cancelled.wait(10)


# ---- Parts of a batch, and what workers get of it ----
def test_a_part_of_a_batch_holds_some_rows_of_everything():
    part = make_batch(answer=list("wxyz"), other=[1, 2, 3, 4]).part(range(1, 3))
    assert part == RewardBatch(
        ["a=", "b="], ["22", "333"], [[7, 7], [8] * 3], {"answer": ["x", "y"], "other": [2, 3]}, STATE, 1
    )


def sent(function, batch):
    return FunctionReward(function).for_worker(batch)


def test_a_worker_gets_what_the_function_names():
    state = SimpleNamespace(global_step=3, log_history=[{}])
    batch = RewardBatch(["p"], ["c"], [[1]], {"answer": ["a"], "image": ["large"]}, state, 1)
    assert sent(lengths, batch) == RewardBatch([], ["c"], [], {})
    assert sent(lambda prompts, answer: 0, batch) == RewardBatch(["p"], ["c"], [], {"answer": ["a"]})
    assert sent(lambda completion_ids, trainer_state: 0, batch) == RewardBatch([], ["c"], [[1]], {}, state)


def test_a_worker_gets_everything_for_kwargs_and_the_plain_values_of_the_state():
    state = SimpleNamespace(global_step=3, epoch=0.5, best_model_checkpoint=None, log_history=[{}])
    batch = RewardBatch(["p"], ["c"], [[1]], {"answer": ["a"]}, state, 1)
    plain = SimpleNamespace(global_step=3, epoch=0.5, best_model_checkpoint=None)
    assert sent(lambda **kwargs: 0, batch) == RewardBatch(["p"], ["c"], [[1]], {"answer": ["a"]}, plain)
    assert sent(lambda **kwargs: 0, RewardBatch([], [], [], {})).trainer_state is None


def test_an_answer_survives_the_way_back_from_a_worker():
    def reward(completions, log_extra, log_metric):
        log_extra("parsed", completions)
        log_metric("accuracy", 0.25)
        return [1.0, "2", 3.0, 4.0]

    answer = FunctionReward(reward)(make_batch())
    back = pickle.loads(pickle.dumps(answer))
    assert back.wrong == answer.wrong
    assert back.logs == answer.logs


def test_notes_of_two_functions_are_appended():
    logs, other = RewardLogs(), RewardLogs()
    logs.log_metric("m", 1)
    other.log_metric("m", 2)
    other.log_extra("c", "ab")
    logs.add(other)
    assert (logs.metrics, logs.columns) == ({"m": [1.0, 2.0]}, {"c": ["a", "b"]})


# ---- Reward models ----
def make_reward_model(**changes) -> Qwen2ForSequenceClassification:
    torch.manual_seed(0)
    return Qwen2ForSequenceClassification(Qwen2Config(**(SIZES | {"num_labels": 1} | changes)))


def by_hand(model, tokenizer, text: str) -> float:
    """The logit at the last token of `text`, computed alone and without padding."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return float(model.score(model.model(input_ids=ids).last_hidden_state)[0, -1, 0])


PROMPTS = ["ab=", "c=", "abcabc=", "d=", ""]
COMPLETIONS = ["1", "22222222", "", "4 5", "6"]


def model_batch(prompts, completions) -> RewardBatch:
    return RewardBatch(prompts, completions, [[] for _ in prompts], {})


def test_a_model_rewards_each_text_as_if_it_were_alone(tokenizer):
    model = make_reward_model()
    rows = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    reward = ModelReward(model, tokenizer, {}, batch_size=2)
    values = reward(model_batch(PROMPTS, COMPLETIONS)).values
    assert rows == [2, 2, 1]
    expected = [by_hand(model, tokenizer, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert values == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in values}) == 5  # so that an order or a padding mistake shows


def test_a_model_sees_texts_as_they_stand_padded_on_the_right():
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="z $A", special_tokens=[("z", 40)])
    seen = []
    model = make_reward_model()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    ModelReward(model, tokenizer, {}, batch_size=2)(model_batch(["ab=", "c="], ["1", ""]))
    assert seen == [[[15, 16, 42, 6], [17, 42, 0, 0]]]


def test_a_model_rewards_conversations_through_the_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ mark }}" + tokenizer.chat_template
    model = make_reward_model()
    prompts = [[{"role": "user", "content": p}] for p in ("ab", "c")]
    completions = [[{"role": "assistant", "content": c}] for c in ("1", "23")]
    reward = ModelReward(model, tokenizer, {"mark": "z"}, batch_size=8)
    values = reward(model_batch(prompts, completions)).values
    texts = ["z<user>ab<assistant>1", "z<user>c<assistant>23"]
    assert values == pytest.approx([by_hand(model, tokenizer, text) for text in texts], abs=1e-5)


def test_a_model_rewards_without_dropout_and_without_gradient(tokenizer):
    model = make_reward_model(attention_dropout=0.5).train()
    graphs = []
    model.score.register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    values = ModelReward(model, tokenizer, {}, batch_size=8)(model_batch(PROMPTS, COMPLETIONS)).values
    model.eval()
    expected = [by_hand(model, tokenizer, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert values == pytest.approx(expected, abs=1e-5)
    assert graphs[0] is False


def test_a_logit_that_is_not_finite_is_no_reward(tokenizer):
    model = make_reward_model()
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    answer = ModelReward(model, tokenizer, {}, batch_size=8)(model_batch(["a="], ["1"]))
    assert list(answer.wrong) == [0]
