import json
import pickle
import random

import pytest
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from grpo_trl.rewards.library.format import (
    format_tags,
    json_schema,
    last_block,
    length_penalty,
    repetition_penalty,
    text_of,
)


SIZE = 200_000
"""Characters; more than linear time in them would be minutes."""


def messages(content, **more) -> list[dict]:
    return [{"role": "assistant", "content": content, **more}]


@pytest.mark.parametrize(
    "completion, text",
    [
        ("as it stands\n", "as it stands\n"),
        ("", ""),
        (None, ""),
        ([], ""),
        (messages("said"), "said"),
        (messages(None, tool_calls=[{}]), ""),
        ([{"content": "no role"}], "no role"),
        (messages([{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]), "ab"),
        ([*messages("first"), {"role": "tool", "content": "not said"}, *messages("last")], "first\nlast"),
    ],
)
def test_text_of_a_completion(completion, text):
    assert text_of(completion) == text


@pytest.mark.parametrize(
    "text, block",
    [
        ("no fence", None),
        ("```json\n1\n```", "1"),
        ("a\n```json\n1\n2\n```\nb", "1\n2"),
        ("```json\n1\n```\n```json\n2\n```", "2"),
        ("```json\n1\n```\n```text\n2\n```", "1"),
        ("```text\n```\njson\n```json", ""),
        ("```text\n1\n```json\n2", None),  # a fence inside a block closes it
        ("  ```JSON \r\n1", "1"),
        ("````json\n1\n````", "1"),
        ("``json\n1\n``", None),
    ],
)
def test_the_last_block_of_a_language(text, block):
    assert last_block(text, ["json"]) == block


def test_blocks_without_a_language_count_where_that_is_asked_for():
    text = "```json\n1\n```\n```\n2\n```"
    assert last_block(text, ["json"]) == "1"
    assert last_block(text, ["json", ""]) == "2"


# ---- format_tags ----
@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>3 * 6</think><answer>18</answer>", 1.0),
        ("<think>\n3 < 6 > 2\n</think>\n \t<answer>\n</answer>", 1.0),
        ("\n<think></think><answer></answer>\n", 1.0),
        ("", 0.0),
        ("<answer>18</answer>", 0.0),
        ("<think>3</think>", 0.0),
        ("<think>3</think><answer>18", 0.0),
        ("3</think><answer>18</answer>", 0.0),
        ("So <think>3</think><answer>18</answer>", 0.0),
        ("<think>3</think> so <answer>18</answer>", 0.0),
        ("<think>3</think><answer>18</answer>.", 0.0),
        ("<answer>18</answer><think>3</think>", 0.0),
        ("<think>3</think><answer>18</answer><answer>19</answer>", 0.0),
        ("<think>3<think></think><answer>18</answer>", 0.0),
        ("<think>3</think></think><answer>18</answer>", 0.0),
        ("<think><answer>3</think>18</answer>", 0.0),
        ("<think><answer>18</answer></think>", 0.0),
        ("<think></answer></think><answer>", 0.0),
        ("<think>3</think><answer>18<answer>", 0.0),
        ("<Think>3</Think><answer>18</answer>", 0.0),
        ("<think >3</think><answer>18</answer>", 0.0),
    ],
)
def test_format_tags_want_each_tag_once_in_order_and_nothing_else(text, expected):
    assert format_tags()(completions=[text, messages(text)], completion_ids=[[], []]) == [expected] * 2


def test_format_tags_of_other_names():
    reward = format_tags(["plan", "code", "test"])
    texts = ["<plan>a</plan>\n<code>b</code>\n<test>c</test>", "<plan>a</plan><code>b</code>"]
    assert reward(completions=texts) == [1.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * (SIZE // 7),
        "<" * SIZE,
        "<think>" + " " * SIZE,
        "<think></think>" + "\n" * SIZE,
        "</think>" * (SIZE // 8),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_long_hostile_text_is_not_formatted(text):
    assert format_tags()(completions=[text]) == [0.0]


@pytest.mark.parametrize("tags", [(), "think", ("think", "think"), ("",), ("a b",), ("<think>",), (1,)])
def test_format_tags_are_checked(tags):
    with pytest.raises(ValueError, match=r"tags=.* must be distinct names .* e\.g\. \('think', 'answer'\)"):
        format_tags(tags)


# ---- json_schema ----
ANSWER = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"answer": 18}', 1.0),
        (' {"answer": -18}\n', 1.0),
        ('Here:\n```json\n{"answer": 18}\n```\nDone.', 1.0),
        ('```json\n{"answer": "no"}\n```\n```json\n{"answer": 18}\n```', 1.0),
        ('```json\n{"answer": 18}\n```\n```json\n{"answer": "no"}\n```', 0.0),
        ('```\n{"answer": 18}\n```', 1.0),
        ('{"answer": "18"}', 0.0),
        ('{"answer": 18, "more": 1}', 0.0),
        ("{}", 0.0),
        ("18", 0.0),
        ('Here: {"answer": 18}', 0.0),
        ('{"answer": 18} {"answer": 18}', 0.0),
        ('{"answer": 18', 0.0),
        ("{'answer': 18}", 0.0),
        ('{"answer": 18,}', 0.0),
        ("", 0.0),
    ],
)
def test_json_is_checked_against_the_schema(text, expected):
    assert json_schema(ANSWER)(completions=[text, messages(text)]) == [expected] * 2


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity]",
        "[-Infinity]",
        "1e999",
        "[-1e999]",
        '{"a": 1, "a": 2}',
        '[{"a": {"b": 1, "b": 1}}]',
        "9" * SIZE,
        "[" * SIZE,
        "[" * (SIZE // 2) + "]" * (SIZE // 2),
        '{"a":' * (SIZE // 5),
        '"\x00"',
        "\ud800",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_python_reads_and_json_is_not_is_refused(text):
    assert json_schema(True)(completions=[text]) == [0.0]


def test_hostile_values_of_a_schema_that_recurs_are_refused():
    tree = {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}
    shallow, deep = "[" * 10 + "]" * 10, "[" * 900 + "]" * 900
    assert json_schema(tree)(completions=[shallow, deep]) == [1.0, 0.0]
    assert json_schema({"multipleOf": 0.001})(completions=["1" * 400, "2", "0.0005"]) == [0.0, 1.0, 0.0]


def test_a_schema_may_name_its_draft():
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 3, "exclusiveMaximum": True}
    assert json_schema(old)(completions=["3", "2"]) == [0.0, 1.0]


def test_nothing_is_fetched_for_a_schema(monkeypatch):
    fetched = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: fetched.append(args))
    monkeypatch.setattr("socket.create_connection", lambda *args, **kwargs: fetched.append(args))
    reward = json_schema({"$ref": "http://example.com/schema.json"})
    with pytest.raises(ValueError, match=r"refers to 'http://example.com/schema.json', .* put it under '\$defs'"):
        reward(completions=["1"])
    assert fetched == []


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "text"}, r"not a valid JSON Schema: 'text' is not valid .* at \$\.type"),
        ({"type": "object", "properties": {"a": 3}}, r"not a valid JSON Schema: 3 is not of type .*properties\.a"),
        ('{"type": "object"}', r"must be a JSON Schema as a dict, e\.g\. \{'type': 'object'\}"),
        (None, "schema=None must be a JSON Schema as a dict"),
    ],
)
def test_schemas_are_checked(schema, message):
    with pytest.raises(ValueError, match=message):
        json_schema(schema)


# ---- length_penalty ----
def test_the_length_penalty_is_trls_soft_overlong_punishment():
    for longest, buffer in ((100, 20), (64, 64), (5, 1), (1000, 333)):
        ids = [[1] * length for length in range(longest + 20)]
        theirs = get_soft_overlong_punishment(longest, buffer)(completion_ids=ids)
        assert length_penalty(longest, buffer)(completion_ids=ids, completions=[""] * len(ids)) == pytest.approx(theirs)


def test_the_length_penalty_falls_from_where_the_buffer_begins():
    reward = length_penalty(max_completion_length=10, buffer=4)
    values = reward(completion_ids=[[7] * length for length in (0, 6, 7, 8, 9, 10, 11)])
    assert values == [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0]


def test_a_length_penalty_without_a_buffer_is_a_step():
    assert length_penalty(10, 0)(completion_ids=[[7] * 10, [7] * 11]) == [0.0, -1.0]


@pytest.mark.parametrize(
    "longest, buffer, message",
    [
        (0, 0, "max_completion_length=0 must be 1 or more"),
        (10, -1, "buffer=-1 must lie between 0 and max_completion_length=10"),
        (10, 11, "buffer=11 must lie between 0 and max_completion_length=10"),
    ],
)
def test_length_penalties_are_checked(longest, buffer, message):
    with pytest.raises(ValueError, match=message):
        length_penalty(longest, buffer)


# ---- repetition_penalty ----
def test_the_repetition_penalty_is_trls():
    noise = random.Random(0)
    ids = [[noise.randrange(4) for _ in range(length)] for length in range(40)]
    for size, most in ((1, -1.0), (2, -0.5), (3, -2.0)):
        theirs = get_repetition_penalty_reward(size, most)(completion_ids=ids)
        assert repetition_penalty(size, most)(completion_ids=ids, completions=[""] * 40) == pytest.approx(theirs)


def test_the_repetition_penalty_is_the_share_of_repeated_ngrams():
    reward = repetition_penalty(ngram_size=2, max_penalty=-3.0)
    # 12 23 31 12 23: two of five were there before
    assert reward(completion_ids=[[1, 2, 3, 1, 2, 3], [1, 2, 3], [1], []]) == pytest.approx([-3 * 2 / 5, 0, 0, 0])


def test_no_penalty_is_no_negative_zero():
    values = repetition_penalty()(completion_ids=[[1, 2, 3, 4], []]) + length_penalty(9, 3)(completion_ids=[[1]])
    assert [str(value) for value in values] == ["0.0"] * 3


@pytest.mark.parametrize(
    "size, most, message",
    [
        (0, -1.0, "ngram_size=0 must be 1 or more"),
        (3, 0.5, "max_penalty=0.5 must be a finite number"),
        (3, float("nan"), "max_penalty=nan must be a finite number"),
        (3, float("-inf"), "max_penalty=-inf must be a finite number"),
    ],
)
def test_repetition_penalties_are_checked(size, most, message):
    with pytest.raises(ValueError, match=message):
        repetition_penalty(size, most)


# ---- All ----
@pytest.mark.parametrize(
    "reward, name",
    [
        (format_tags(), "format_tags"),
        (json_schema(ANSWER), "json_schema"),
        (length_penalty(10, 2), "length_penalty"),
        (repetition_penalty(2), "repetition_penalty"),
    ],
)
def test_rewards_have_names_and_can_be_sent_to_another_process(reward, name):
    columns = {
        "completions": ['{"answer": 1}', "<think></think><answer></answer>", "[]"],
        "completion_ids": [[1] * 10, [1, 2], []],
        "prompts": ["", "", ""],
    }
    sent = pickle.loads(pickle.dumps(reward))
    assert sent.__name__ == reward.__name__ == name
    assert sent(**columns) == reward(**columns)
    assert len(set(reward(**columns))) > 1
    json.dumps(reward(**columns))
