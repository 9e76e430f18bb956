"""Prompts are what the user thinks: BOS, EOS, parts, images."""

import pytest
from tokenizers.processors import TemplateProcessing

from grpo_trl.data.rendering import tokenize_prompts
from tests.helpers.models import make_tokenizer


def tokenizer_that_adds(single):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<user>"
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<user>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("single", ["$A", "<user> $A", "$A <eos>", "<user> $A <eos>"])
@pytest.mark.parametrize("start", ["", "<user>"])
@pytest.mark.parametrize("end", ["", "<eos>"])
def test_a_string_has_at_most_one_bos_and_no_eos_of_the_tokenizers(single, start, end):
    tokenizer = tokenizer_that_adds(single)
    (ids,) = tokenize_prompts([f"{start}1=a{end}"], tokenizer, {}, "data")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens.count("<user>") == (1 if start or "<user>" in single else 0)
    assert (tokens[-1] == "<eos>") == bool(end)
    assert [token for token in tokens if len(token) == 1] == ["1", "=", "a"]


def test_parts_of_text_are_one_string_and_keys_without_a_value_are_left_out():
    tokenizer = make_tokenizer()
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "="}]
    messages = [{"role": "user", "content": parts, "name": None}]
    plain = [{"role": "user", "content": "1="}]
    assert tokenize_prompts([messages], tokenizer, {}, "data") == tokenize_prompts([plain], tokenizer, {}, "data")
    tokenizer.chat_template = "{% for m in messages %}{% if 'name' in m %}x{% endif %}{{ m['content'] }}{% endfor %}"
    assert tokenizer.decode(tokenize_prompts([messages], tokenizer, {}, "data")[0]) == "1="


@pytest.mark.parametrize(
    "message, text",
    [
        ({"role": "user", "content": [{"type": "image", "text": None}]}, "part of type 'image'"),
        ({"from": "human", "value": "1="}, "without a 'role'"),
        ({"role": None, "content": "1="}, "without a 'role'"),
        ({"role": "user", "content": [{"type": "text"}]}, "part of type 'text'"),
        ({"role": "user", "content": ["1="]}, "part of type '1='"),
        ({"role": "user", "content": None}, "without a 'content'"),
        ({"role": "system"}, "without a 'content'"),
        ("1=", r"message '1=' \(str\); a message is \{'role'"),
        (7, r"message 7 \(int\); a message is"),
        ([{"role": "user", "content": "1="}], r"\(list\); a message is"),
    ],
)
def test_messages_that_a_text_model_cannot_read_are_refused(message, text):
    with pytest.raises(ValueError, match=f"train_dataset.*{text}"):
        tokenize_prompts([[message]], make_tokenizer(), {}, "train_dataset")


def test_messages_need_a_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"data has lists of messages as prompts, .* no chat template; pass"):
        tokenize_prompts([[{"role": "user", "content": "1="}]], tokenizer, {}, "data")
    assert tokenize_prompts(["1="], tokenizer, {}, "data")


def test_a_message_that_calls_a_tool_needs_no_content():
    messages = [
        {"role": "user", "content": "1="},
        {"role": "assistant", "tool_calls": []},
        {"role": "tool", "content": "1"},
    ]
    assert tokenize_prompts([messages], make_tokenizer(), {}, "data")


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ raise_exception('roles must alternate') }}", "does not render .*roles must alternate"),
        ("{% for m in messages %}", "does not render"),
        ("{{ messages[3]['content'] }}", "does not render"),
    ],
)
def test_a_conversation_that_the_template_does_not_render_is_shown_with_the_reason(template, text):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"train_dataset has the conversation .*'1='.*{text}"):
        tokenize_prompts([[{"role": "user", "content": "1="}]], tokenizer, {}, "train_dataset")
