"""Hints come once, in one line, and only where a mistake is likely."""

import functools

import pytest
from trl.rewards import think_format_reward

from grpo_trl.reliability.hints import Hints
from grpo_trl.rewards import format_tags
from grpo_trl.types import Completion
from tests.helpers.models import make_tokenizer
from tests.trainer.test_interface import make_trainer


END = "<|im_end|>"


def thinks(completions, flags=0, **kwargs):
    return [float(text.startswith("<think>")) for text in completions]


def correct(completions, **kwargs):
    return [0.0 for _ in completions]


@pytest.fixture
def tokenizer():
    made = make_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", END, "<think>", "<extra>"]})
    return made


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def completions(tokenizer, texts, prompt="1+1=", ended=False):
    prompt_ids = ids_of(tokenizer, prompt)
    return [
        Completion(prompt_ids, ids, [True] * len(ids), ended) for ids in (ids_of(tokenizer, text) for text in texts)
    ]


def hints_of(tokenizer, functions):
    return Hints(tokenizer, [tokenizer.eos_token_id], functions)


# ---- An end token that nobody declares ----
def test_a_likely_end_token_of_completions_that_are_cut_off_is_named_once(tokenizer, caplog):
    hints = hints_of(tokenizer, {})
    rows = completions(tokenizer, [f"ab{END}<user>cd<extra>", f"e{END}<extra>", "fg", f"h{END}<extra>"])
    for _ in range(2):
        hints.look(rows, {"completion": ["", "", "", ""]})
    found = tokenizer.convert_tokens_to_ids(END)
    assert [record.getMessage() for record in caplog.records] == [
        f"4 of 4 completions were cut off, and 3 contain {END!r}, which ends none. If it ends an answer, set "
        f"model.generation_config.eos_token_id=[1, {found}] before the trainer is made."
    ]


@pytest.mark.parametrize(
    "texts, ended",
    [
        ([f"a{END}", f"b{END}"], True),  # they end
        ([f"a{END}", "b", "c"], False),  # by chance
        (["a<eos>b", "c<pad>d"], False),  # what ends or fills is no news
        (["ab", "cd"], False),
    ],
)
def test_otherwise_there_is_no_hint_of_an_end(tokenizer, caplog, texts, ended):
    hints_of(tokenizer, {}).look(completions(tokenizer, texts, ended=ended), {"completion": texts})
    assert not caplog.records


def test_the_hint_comes_when_it_first_matters(tokenizer, caplog):
    hints = hints_of(tokenizer, {})
    hints.look(completions(tokenizer, ["ab"], ended=True), {"completion": ["ab"]})
    hints.look(completions(tokenizer, [f"ab{END}"]), {"completion": [f"ab{END}"]})
    assert "which ends none" in caplog.text


# ---- A template that opens a tag ----
@pytest.mark.parametrize(
    "function", [thinks, think_format_reward, format_tags(("think", "answer")), functools.partial(thinks, flags=1)]
)
def test_a_format_reward_that_looks_for_the_tag_of_the_prompt_is_named(tokenizer, caplog, function):
    hints = hints_of(tokenizer, {"format": function, "correct": correct})
    table = {"completion": ["so", "thus"], "format": [0.0, 0.0], "correct": [0.0, 0.0]}
    for _ in range(2):
        hints.look(completions(tokenizer, table["completion"], "1+1=<assistant><think>", ended=True), table)
    (record,) = caplog.records
    assert record.getMessage().startswith("Prompts end with <think>, so completions begin after it, and format, which")


@pytest.mark.parametrize(
    "prompt, texts, rewards, function",
    [
        ("1+1=", ["a", "b"], [0.0, 0.0], thinks),
        ("1+1=<think>", ["<think>a", "b"], [0.0, 0.0], thinks),
        ("1+1=<think>", ["a", "b"], [0.0, 1.0], thinks),
        ("1+1=<think>", ["a", "b"], [0.0, 0.0], correct),
    ],
)
def test_otherwise_there_is_no_hint_of_a_tag(tokenizer, caplog, prompt, texts, rewards, function):
    table = {"completion": texts, "format": rewards}
    hints_of(tokenizer, {"format": function}).look(completions(tokenizer, texts, prompt, ended=True), table)
    assert not caplog.records


def test_a_run_gives_hints(tmp_path, caplog):
    def opens(completions):
        return [float("<assistant>" in completion[0]["content"]) for completion in completions]

    chats = [{"prompt": [{"role": "user", "content": str(digit)}]} for digit in range(4)]
    make_trainer(tmp_path, data=chats, reward_funcs=opens).train()
    assert "Prompts end with <assistant>, so completions begin after it, and opens, which" in caplog.text
