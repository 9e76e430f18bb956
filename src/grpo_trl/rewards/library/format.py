"""Ready reward functions for the format of a completion: tags, JSON, length, repetition."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def text_of(completion: Any) -> str:
    """Return the text of a completion: itself, or the content of the assistant's messages, one per line.

    >>> text_of([{"role": "assistant", "content": "Let me look."}, {"role": "tool", "content": "7"},
    ...          {"role": "assistant", "content": "It is 7."}])
    'Let me look.\\nIt is 7.'
    """
    if completion is None or isinstance(completion, str):
        return completion or ""
    said = [message.get("content") for message in completion if message.get("role", "assistant") == "assistant"]
    return "\n".join(_content(content) for content in said)


def _content(content: Any) -> str:
    """Return the text of a message's content: a string, None if it only calls tools, or a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content)


def last_block(text: str, languages: Sequence[str]) -> str | None:
    """Return the last block between ``` fences that is marked with one of the languages; None if there is none.

    A block that is not closed extends to the end of the text.

    >>> last_block("So:\\n```json\\n[1]\\n```\\nor\\n```json\\n[2]\\n```", ["json"])
    '[2]'
    """
    found: list[str] | None = None
    block: list[str] | None = None
    for line in text.split("\n"):
        if not line.lstrip().startswith("```"):
            if block is not None:
                block.append(line)
        elif block is None:
            block = []
            if line.strip(" \t\r`").lower() in languages:
                found = block
        else:
            block = None
    return None if found is None else "\n".join(found)


@dataclass(frozen=True)
class _FormatTags:
    tags: tuple[str, ...]
    __name__ = "format_tags"

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(self._is_formatted(text_of(completion))) for completion in completions]

    def _is_formatted(self, text: str) -> bool:
        if any(text.count(mark) != 1 for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")):
            return False
        for tag in self.tags:
            block, closing, text = text.partition(f"</{tag}>")
            if not closing or not block.lstrip().startswith(f"<{tag}>"):
                return False
        return not text.strip()


def format_tags(tags: Sequence[str] = ("think", "answer")) -> Any:
    """Make a reward function: 1 if a completion is `<think>...</think> <answer>...</answer>` and nothing else, else 0.

    Each tag occurs once, in this order, with nothing but white space before, between and after, and not nested. Takes
    time in proportion to the text's length.
    Source: DeepSeek-R1, arXiv 2501.12948, section 2.2.2 (format reward).

    Args:
        tags: Names of the tags.

    Raises:
        ValueError: No tags, one twice, or a name that is empty or has white space, `<`, `>` or `/` in it.

    >>> format_tags()(completions=["<think>3 * 6</think>\\n<answer>18</answer>", "<answer>18</answer>"])
    [1.0, 0.0]
    """
    names = tuple(tags)
    if isinstance(tags, str) or not names or len(set(names)) < len(names) or not all(map(_is_name, names)):
        raise ValueError(
            f"tags={tags!r} must be distinct names without <, > and white space, e.g. ('think', 'answer')."
        )
    return _FormatTags(names)


def _is_name(tag: Any) -> bool:
    return isinstance(tag, str) and tag != "" and not any(c.isspace() or c in "<>/" for c in tag)


@dataclass(frozen=True, eq=False)
class _JsonSchema:
    schema: dict[str, Any] | bool
    __name__ = "json_schema"

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        from jsonschema.validators import validator_for
        from referencing.exceptions import Unresolvable
        from referencing.jsonschema import SchemaRegistry

        # An empty registry: the default one would fetch a remote $ref from the network.
        validator = validator_for(self.schema)(self.schema, registry=SchemaRegistry())
        try:
            return [float(self._is_valid(text_of(completion), validator)) for completion in completions]
        except Unresolvable as error:
            raise ValueError(
                f"schema refers to {error.ref!r}, which it does not hold; put it under '$defs'."
            ) from error

    def _is_valid(self, text: str, validator: Any) -> bool:
        block = last_block(text, ["json", ""])
        try:
            value = json.loads(
                text if block is None else block,
                parse_constant=_refuse,
                parse_float=_finite,
                object_pairs_hook=_distinct_keys,
            )
            return bool(validator.is_valid(value))
        except (ValueError, ArithmeticError, RecursionError, MemoryError):
            return False


def json_schema(schema: dict[str, Any] | bool) -> Any:
    """Make a reward function: 1 if a completion, or its last ```json block, is JSON that the schema allows, else 0.

    Stricter than Python's parser: NaN and Infinity, numbers that overflow a float, and keys that an object has twice are
    refused. The JSON of a completion without a fence is the whole completion.

    Args:
        schema: A JSON Schema, of the draft that its `$schema` names (2020-12 where it names none). What it refers to, it
            must hold: nothing is fetched. A `pattern` that takes exponential time does so here too.

    Raises:
        ValueError: What is given is not a valid schema. At a call: it refers to what it does not hold.
        ImportError: jsonschema is not installed.

    >>> number = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
    >>> json_schema(number)(completions=['{"answer": 18}', '{"answer": "18"}', "18"])
    [1.0, 0.0, 0.0]
    """
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
    except ImportError as error:
        raise ImportError("json_schema needs jsonschema: pip install 'jsonschema>=4.18'") from error
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"schema={schema!r} must be a JSON Schema as a dict, e.g. {{'type': 'object'}}.")
    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"schema is not a valid JSON Schema: {error.message} at {error.json_path}") from error
    return _JsonSchema(schema)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number} overflows")
    return value


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has a key twice")
    return value


@dataclass(frozen=True)
class _LengthPenalty:
    max_completion_length: int
    buffer: int
    __name__ = "length_penalty"

    def __call__(self, completion_ids: list[Any], **kwargs: Any) -> list[float]:
        return [self._penalty(len(ids)) for ids in completion_ids]

    def _penalty(self, length: int) -> float:
        excess = length - (self.max_completion_length - self.buffer)
        if excess <= 0:
            return 0.0
        return -1.0 if excess >= self.buffer else -excess / self.buffer


def length_penalty(max_completion_length: int, buffer: int) -> Any:
    """Make a reward function: 0 for a completion well below the maximum length, falling to -1 as it reaches it.

        R = 0                                    up to max - buffer tokens
        R = -(length - (max - buffer)) / buffer  up to max tokens
        R = -1                                   above

    Source: DAPO, arXiv 2503.14476, Eq. (13), "soft overlong punishment"; TRL's `get_soft_overlong_punishment` with
    `max_completion_len` and `soft_punish_cache`.

    Args:
        max_completion_length: As in `GRPOConfig`, in tokens.
        buffer: Over how many tokens the penalty grows; 0 for a step.

    Raises:
        ValueError: The maximal length is below 1, or the buffer negative or above it.

    >>> length_penalty(100, buffer=20)(completion_ids=[[7] * 80, [7] * 90, [7] * 100, [7] * 101])
    [0.0, -0.5, -1.0, -1.0]
    """
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length={max_completion_length} must be 1 or more; pass GRPOConfig's.")
    if not 0 <= buffer <= max_completion_length:
        raise ValueError(f"buffer={buffer} must lie between 0 and max_completion_length={max_completion_length}.")
    return _LengthPenalty(max_completion_length, buffer)


@dataclass(frozen=True)
class _RepetitionPenalty:
    ngram_size: int
    max_penalty: float
    __name__ = "repetition_penalty"

    def __call__(self, completion_ids: list[Any], **kwargs: Any) -> list[float]:
        return [self._penalty(list(ids)) for ids in completion_ids]

    def _penalty(self, ids: list[int]) -> float:
        ngrams = list(zip(*(ids[start:] for start in range(self.ngram_size)), strict=False))
        repeated = len(ngrams) - len(set(ngrams))
        return self.max_penalty * repeated / len(ngrams) if repeated else 0.0


def repetition_penalty(ngram_size: int = 3, max_penalty: float = -1.0) -> Any:
    """Make a reward function: `max_penalty * (1 - distinct n-grams / n-grams)` of the completion's tokens.

    0 if nothing is repeated or there are fewer than `ngram_size` tokens. It counts tokens, not words, so it works for any
    language.
    Source: arXiv 2502.03373, appendix C.2; TRL's `get_repetition_penalty_reward`.

    Args:
        ngram_size: Tokens of an n-gram.
        max_penalty: The limit for a completion that only repeats itself.

    Raises:
        ValueError: `ngram_size` is below 1, or `max_penalty` is positive or not finite.

    >>> repetition_penalty(ngram_size=2)(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5], [1]])
    [0.0, -0.75, 0.0]
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size={ngram_size} must be 1 or more, e.g. 3.")
    if not -math.inf < max_penalty <= 0:
        raise ValueError(f"max_penalty={max_penalty} must be a finite number that is not positive, e.g. -1.0.")
    return _RepetitionPenalty(ngram_size, max_penalty)
