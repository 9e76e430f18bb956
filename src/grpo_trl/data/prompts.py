"""Prompts: how a row becomes tokens, and which rows fit."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..logging import get_logger
from ..types import Prompt
from .rendering import tokenize_prompts


logger = get_logger(__name__)

TOKENIZE_BATCH = 1000
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


class PromptSet:
    """The rows of a dataset that serve as prompts.

    Every row is rendered once at the start, so that a prompt which does not fit is found then and not hours later; its
    tokens are not kept.

    Args:
        dataset: Has a column `"prompt"` of strings, or of lists of messages.
        tokenizer: Renders and tokenizes.
        limit: What fits.
        chat_template_kwargs: Passed to `apply_chat_template` for conversational prompts.
        prompt_only: Drop all other columns.
        name: The argument that the dataset came in, for messages.
        num_embeddings: How many tokens the model has an embedding for; None if it does not say.

    Raises:
        TypeError: `dataset` is not a map-style `datasets.Dataset`.
        ValueError: The dataset is empty or has no column `"prompt"`; a prompt is empty; a prompt is too long and the
            policy is `"error"`; a prompt has a token that the model does not have.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        limit: PromptLimit,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        prompt_only: bool = False,
        name: str = "train_dataset",
        num_embeddings: int | None = None,
    ):
        _check_dataset(dataset, name)
        self.dataset = dataset.select_columns(["prompt"]) if prompt_only else dataset
        self.tokenizer = tokenizer
        self.limit = limit
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.name = name
        self.num_embeddings = num_embeddings
        self.digest = ""
        """Tells other prompts from these, by their tokens."""
        self.rows = self._fitting_rows()

    def __len__(self) -> int:
        return len(self.rows)

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """The prompts at `indices`, each in `range(len(self))`."""
        rows = [self.rows[i] for i in indices]
        examples = [self.dataset[row] for row in rows]
        ids = self._tokenize([example["prompt"] for example in examples]) if examples else []
        if self.limit.policy == "truncate_left" and self.limit.max_length is not None:
            ids = [tokens[-self.limit.max_length :] for tokens in ids]
        return [Prompt(*prompt) for prompt in zip(examples, ids, rows, strict=True)]

    def _tokenize(self, prompts: list[Any]) -> list[list[int]]:
        return tokenize_prompts(prompts, self.tokenizer, self.chat_template_kwargs, self.name)

    def _fitting_rows(self) -> Sequence[int]:
        lengths: list[int] = []
        column, digest = self.dataset["prompt"], hashlib.sha256()
        for start in range(0, len(self.dataset), TOKENIZE_BATCH):
            ids = self._tokenize(list(column[start : start + TOKENIZE_BATCH]))
            digest.update(repr(ids).encode())
            self._check_tokens(ids, start)
            lengths += map(len, ids)
        self.digest = digest.hexdigest()[:16]
        if 0 in lengths:
            raise ValueError(
                f"{self.name}[{lengths.index(0)}]['prompt'] has no tokens; a completion needs at least one to start from."
            )
        limit = self.limit.max_length if self.limit.max_length is not None else math.inf
        too_long = [row for row, length in enumerate(lengths) if length > limit]
        if not too_long:
            return range(len(lengths))
        longest = max(too_long, key=lengths.__getitem__)
        facts = (
            f"{len(too_long)} of {len(lengths)} prompts of {self.name} leave no room for "
            f"max_completion_length={self.limit.max_completion_length} tokens (the longest, row {longest}, has "
            f"{lengths[longest]} tokens, and {limit} fit into {self.limit.limited_by})"
        )
        if self.limit.policy == "error":
            raise ValueError(f"{facts}; {self._remedy(lengths[longest])}set prompt_overflow='drop' or 'truncate_left'.")
        logger.warning("%s; prompt_overflow=%r takes care of them.", facts, self.limit.policy)
        if self.limit.policy == "truncate_left":
            return range(len(lengths))
        dropped = set(too_long)
        kept = [row for row in range(len(lengths)) if row not in dropped]
        if not kept:
            raise ValueError(f"{facts}; prompt_overflow='drop' leaves none. Lower max_completion_length.")
        return kept

    def _check_tokens(self, ids: list[list[int]], start: int) -> None:
        """Refuse prompts, of the rows from `start` on, with tokens that the model has no embedding for."""
        for row, tokens in enumerate(ids, start):
            if self.num_embeddings is not None and tokens and max(tokens) >= self.num_embeddings:
                raise ValueError(
                    f"{self.name}[{row}]['prompt'] has token {max(tokens)}, and the model has embeddings for "
                    f"{self.num_embeddings} tokens; pass the model's own tokenizer, "
                    f"or call model.resize_token_embeddings({len(self.tokenizer)})."
                )

    def _remedy(self, longest: int) -> str:
        """What besides `prompt_overflow` would make room for a prompt of `longest` tokens."""
        assert self.limit.max_length is not None
        length = self.limit.max_completion_length
        if self.limit.limited_by != CONTEXT:
            return f"set {self.limit.limited_by}={longest + length} or more, or "
        context = length + self.limit.max_length
        if longest < context:
            return f"set max_completion_length={context - longest} or less, or "
        return f"{CONTEXT} is {context}: "


def _check_dataset(dataset: Any, name: str) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}; it must be a datasets.Dataset (a streamed one has no length, which "
            "generation batches need: load it with streaming=False, or take a part of it with Dataset.from_list)."
        )
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} has the columns {dataset.column_names}, and none is named 'prompt'; rename one with "
            "dataset.rename_column(OLD, 'prompt')."
        )
    if images := sorted({"image", "images"} & set(dataset.column_names)):
        raise ValueError(
            f"{name} has the column {images[0]!r}; its images would not be seen, since only text is supported. Remove "
            f"it with dataset.remove_columns({images[0]!r})."
        )
    if not len(dataset):
        raise ValueError(f"{name} is empty; it must have at least one row.")
