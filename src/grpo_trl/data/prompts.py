"""Prompts: how an example of a dataset becomes tokens, and what each must be."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from ..types import Prompt, Ranks
from .rendering import tokenize_prompts


CONTEXT = "the model's context"


@dataclass(frozen=True)
class PromptLimit:
    """How long a prompt may be, and what happens to a longer one.

    `max_length` is the model's context (or what else limits it) less `max_completion_length`; None where nothing does.
    """

    max_length: int | None
    max_completion_length: int
    policy: str
    limited_by: str = CONTEXT

    @property
    def most_tokens(self) -> float:
        return math.inf if self.max_length is None else self.max_length

    def remedy(self, longest: int) -> str:
        """What besides `prompt_overflow` would make room for a prompt of `longest` tokens."""
        assert self.max_length is not None
        length = self.max_completion_length
        if self.limited_by != CONTEXT:
            return f"set {self.limited_by}={longest + length} or more, or "
        context = length + self.max_length
        if longest < context:
            return f"set max_completion_length={context - longest} or less, or "
        return f"{CONTEXT} is {context}: "

    def effect(self, prompt: Any) -> str:
        """Say what `prompt_overflow` does to `prompt` and others that are too long."""
        if self.policy == "drop":
            return "prompt_overflow='drop' leaves them out"
        head = "" if isinstance(prompt, str) else ", with the head of the chat template and the system message"
        return f"prompt_overflow='truncate_left' cuts off their beginning{head}"


@dataclass(frozen=True)
class Share:
    """What one rank takes of the prompts that all ranks take together."""

    indices: range
    """Of its prompts, counted from the first one of the dataset; may be empty."""
    prompts: list[Prompt]
    """Never empty: a rank without any keeps the others company with one of theirs."""


class Prompts(ABC):
    """The prompts of a dataset, of whatever kind.

    Args:
        dataset: Has a column `"prompt"` of strings, or of lists of messages.
        columns: Its columns; none if it has no rows.
        tokenizer: Renders and tokenizes.
        limit: What fits.
        chat_template_kwargs: Passed to `apply_chat_template` for conversational prompts.
        prompt_only: Drop all other columns.
        name: The argument that the dataset came in, for messages.
        num_embeddings: How many tokens the model has an embedding for; None if it does not say.

    Raises:
        ValueError: The dataset is empty or has no column `"prompt"`; a prompt is empty; a prompt is too long and the
            policy is `"error"`; a prompt has a token that the model does not have.
    """

    def __init__(
        self,
        dataset: Any,
        columns: list[str],
        tokenizer: PreTrainedTokenizerBase,
        limit: PromptLimit,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        prompt_only: bool = False,
        name: str = "train_dataset",
        num_embeddings: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.limit = limit
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.name = name
        self.num_embeddings = num_embeddings
        _check_columns(columns, name)
        self.dataset = dataset.select_columns(["prompt"]) if prompt_only else dataset
        self.column_names = ["prompt"] if prompt_only else columns

    @property
    @abstractmethod
    def count(self) -> int | None:
        """How many there are; None of a stream."""

    @abstractmethod
    def first(self, count: int) -> list[Prompt]:
        """Return some of the first prompts, at most `count`."""

    @abstractmethod
    def shares(self, size: int | None, ranks: Ranks) -> Iterator[Share]:
        """Go through all prompts once, `size` at a time over all ranks (None: as many as suit).

        Each rank takes every `world_size`-th of them.
        """

    def _tokenize(self, prompts: list[Any], first_row: int) -> list[list[int]]:
        """Return the tokens of prompts, which stand in the dataset from `first_row` on.

        Raises:
            ValueError: A prompt has no tokens, or one that the model has no embedding for.
        """
        ids = tokenize_prompts(prompts, self.tokenizer, self.chat_template_kwargs, self.name) if prompts else []
        for row, tokens in enumerate(ids, first_row):
            if not tokens:
                raise ValueError(
                    f"{self.name}[{row}]['prompt'] has no tokens; a completion needs at least one to start from."
                )
            if self.num_embeddings is not None and max(tokens) >= self.num_embeddings:
                raise ValueError(
                    f"{self.name}[{row}]['prompt'] has token {max(tokens)}, and the model has embeddings for "
                    f"{self.num_embeddings} tokens; pass the model's own tokenizer, "
                    f"or call model.resize_token_embeddings({len(self.tokenizer)})."
                )
        return ids

    def _prompts(self, examples: Sequence[dict[str, Any]], ids: list[list[int]], rows: Sequence[int]) -> list[Prompt]:
        if self.limit.policy == "truncate_left" and self.limit.max_length is not None:
            ids = [tokens[-self.limit.max_length :] for tokens in ids]
        return [Prompt(*prompt) for prompt in zip(examples, ids, rows, strict=True)]


class PromptOrder(Protocol):
    """Which prompts each generation batch has, the same on every rank."""

    fingerprint: dict[str, Any]
    """What must be unchanged for a run to resume."""

    @property
    def source(self) -> Prompts: ...

    def prompts(self, generation: int, groups: Sequence[int]) -> list[Prompt]:
        """Return the prompts of some groups of generation batch `generation`."""
        ...

    def digest(self, generation: int) -> str:
        """Return what tells the prompts of generation batch `generation` from others, once they are known."""
        ...

    def forget(self, before: int) -> None:
        """Keep nothing of the generation batches before `before`: no step needs them any more."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the first generation batch that is not forgotten."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _check_columns(columns: list[str], name: str) -> None:
    if not columns:
        raise ValueError(f"{name} is empty; it must have at least one row.")
    if "prompt" not in columns:
        raise ValueError(
            f"{name} has the columns {columns}, and none is named 'prompt'; rename one with "
            "dataset.rename_column(OLD, 'prompt')."
        )
