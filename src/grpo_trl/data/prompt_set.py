"""Prompts of a dataset with a length, any of which can be read at any time; and their order in training."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..logging import get_logger
from ..seeds import derive_seed
from ..types import Prompt, Ranks
from .prompts import PromptLimit, Prompts, Share


logger = get_logger(__name__)

TOKENIZE_BATCH = 1000


class PromptSet(Prompts):
    """The rows of a dataset that serve as prompts.

    Every row is rendered once at the start, so that a prompt which does not fit is found then and not hours later; its
    tokens are not kept.

    Args:
        dataset: See `Prompts`.
        tokenizer: See `Prompts`.
        limit: See `Prompts`.
        options: See `Prompts`.

    Raises:
        ValueError: See `Prompts`.
    """

    def __init__(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, limit: PromptLimit, **options: Any):
        columns = list(dataset.column_names) if len(dataset) else []
        super().__init__(dataset, columns, tokenizer, limit, **options)
        self.digest = ""
        """Tells other prompts from these, by their tokens."""
        self.rows = self._fitting_rows()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def count(self) -> int:
        return len(self)

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """Return the prompts at `indices`, each in `range(len(self))`."""
        rows = [self.rows[i] for i in indices]
        examples = [self.dataset[row] for row in rows]
        return self._prompts(examples, self._tokenize([example["prompt"] for example in examples], 0), rows)

    def first(self, count: int) -> list[Prompt]:
        return self.prompts(range(min(count, len(self))))

    def shares(self, size: int | None, ranks: Ranks) -> Iterator[Share]:
        size = size or len(self)
        for start in range(0, len(self), size):
            indices = range(start + ranks.rank, min(start + size, len(self)), ranks.world_size)
            yield Share(indices, self.prompts(indices or [start]))

    def _fitting_rows(self) -> Sequence[int]:
        lengths: list[int] = []
        column, digest = self.dataset["prompt"], hashlib.sha256()
        for start in range(0, len(self.dataset), TOKENIZE_BATCH):
            ids = self._tokenize(list(column[start : start + TOKENIZE_BATCH]), start)
            digest.update(repr(ids).encode())
            lengths += map(len, ids)
        self.digest = digest.hexdigest()[:16]
        too_long = [row for row, length in enumerate(lengths) if length > self.limit.most_tokens]
        if not too_long:
            return range(len(lengths))
        longest = max(too_long, key=lengths.__getitem__)
        facts = (
            f"{len(too_long)} of {len(lengths)} prompts of {self.name} leave no room for "
            f"max_completion_length={self.limit.max_completion_length} tokens (the longest, row {longest}, has "
            f"{lengths[longest]} tokens, and {self.limit.max_length} fit into {self.limit.limited_by})"
        )
        if self.limit.policy == "error":
            remedy = self.limit.remedy(lengths[longest])
            raise ValueError(f"{facts}; {remedy}set prompt_overflow='drop' or 'truncate_left'.")
        logger.warning("%s; %s.", facts, self.limit.effect(column[longest]))
        if self.limit.policy == "truncate_left":
            return range(len(lengths))
        dropped = set(too_long)
        kept = [row for row in range(len(lengths)) if row not in dropped]
        if not kept:
            raise ValueError(f"{facts}; prompt_overflow='drop' leaves none. Lower max_completion_length.")
        return kept


class EpochOrder:
    """The order in which a set of prompts is trained on: all of it follows from the number of the generation batch.

    The prompts that do not fill a generation batch are left out of an epoch.
    """

    def __init__(self, source: PromptSet, prompts_per_generation_batch: int, seed: int, shuffle: bool):
        self.source = source
        self.prompts_per_generation_batch = prompts_per_generation_batch
        self.seed = seed
        self.shuffle = shuffle
        self.fingerprint = {"prompts": source.digest, "seed": seed, "shuffle": shuffle}

    def prompts(self, generation: int, groups: Sequence[int]) -> list[Prompt]:
        rows = self._rows(generation)
        return self.source.prompts([rows[group] for group in groups])

    def digest(self, generation: int) -> str:
        return self.source.digest

    def forget(self, before: int) -> None:
        """Nothing is kept."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is none."""

    def _rows(self, generation: int) -> list[int]:
        """Return the prompts of generation batch `generation`, by their index in the set."""
        per_epoch = len(self.source) // self.prompts_per_generation_batch
        epoch, number = divmod(generation, per_epoch)
        order = list(range(len(self.source)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "prompts", epoch))
            order = torch.randperm(len(self.source), generator=generator).tolist()
        start = number * self.prompts_per_generation_batch
        return order[start : start + self.prompts_per_generation_batch]
