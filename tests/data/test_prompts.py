import logging
import re

import pytest
from datasets import Dataset

from grpo_trl.data.prompt_set import PromptSet
from grpo_trl.data.prompts import PromptLimit
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
    monkeypatch.setattr("grpo_trl.data.prompt_set.TOKENIZE_BATCH", 2)
    with pytest.raises(ValueError, match=r"train_dataset\[4\]"):
        make_set(["a", "b", "c", "d", "", "e"])


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="my_set is empty"):
        make_set([], name="my_set")


def test_a_dataset_without_prompts_is_refused_with_its_columns(tokenizer):
    with pytest.raises(ValueError, match=r"\['question', 'answer'\].*'prompt'.*rename_column"):
        PromptSet(Dataset.from_dict({"question": ["a"], "answer": ["b"]}), tokenizer, UNLIMITED)


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


def test_truncate_left_keeps_the_generation_prompt_and_says_that_the_head_is_gone(caplog):
    assert read(make_set([[user("abcdef")]], limit("truncate_left"))) == ["ef<assistant>"]
    assert "cuts off their beginning, with the head of the chat template and the system message" in caplog.text


@pytest.mark.parametrize("policy", ["error", "drop", "truncate_left"])
def test_without_a_context_every_prompt_fits(policy):
    assert read(make_set(RAGGED, PromptLimit(None, 7, policy))) == RAGGED
