"""Prompts of a streamed dataset, which are read one after the other; and their order in training."""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from datasets.iterable_dataset import BufferShuffledExamplesIterable
from transformers import PreTrainedTokenizerBase

from ..logging import get_logger
from ..types import Prompt, Ranks
from .prompts import PromptLimit, Prompts, Share


logger = get_logger(__name__)

CHECKED = 16
"""Examples that are read and checked before training."""
AT_A_TIME = 64
"""Prompts of a rank that are held in an evaluation, where nothing else limits them."""


class PromptStream(Prompts):
    """The examples of a streamed dataset that serve as prompts. What does not fit is found when it is read.

    Args:
        dataset: See `Prompts`. It may be endless.
        tokenizer: See `Prompts`.
        limit: See `Prompts`.
        options: See `Prompts`.

    Raises:
        ValueError: See `Prompts`; of the first examples.
    """

    def __init__(
        self, dataset: IterableDataset, tokenizer: PreTrainedTokenizerBase, limit: PromptLimit, **options: Any
    ):
        examples = list(_independent(dataset).take(CHECKED))
        super().__init__(dataset, list(examples[0]) if examples else [], tokenizer, limit, **options)
        self._warned = False
        self._first, _ = self.read(iter(examples), CHECKED, 0)

    @property
    def count(self) -> None:
        return None

    def first(self, count: int) -> list[Prompt]:
        return self._first[:count]

    def shares(self, size: int | None, ranks: Ranks) -> Iterator[Share]:
        size = size or AT_A_TIME * ranks.world_size
        examples = iter(_independent(self.dataset))
        start = row = 0
        while True:
            prompts, row = self.read(examples, size, row)
            if prompts:
                indices = range(start + ranks.rank, start + len(prompts), ranks.world_size)
                yield Share(indices, prompts[ranks.rank :: ranks.world_size] or prompts[:1])
            if len(prompts) < size:
                return
            start += size

    def read(self, examples: Iterator[dict[str, Any]], count: int, row: int) -> tuple[list[Prompt], int]:
        """Take prompts from `examples`, the next of which is `row`, until there are `count` that fit, or none is left.

        Returns:
            The prompts, and the row of the next example.
        """
        prompts: list[Prompt] = []
        while chunk := list(itertools.islice(examples, count - len(prompts))):
            ids = self._tokenize([example["prompt"] for example in chunk], row)
            prompts += self._fitting(self._prompts(chunk, ids, range(row, row + len(chunk))), ids)
            row += len(chunk)
        return prompts, row

    def _fitting(self, prompts: list[Prompt], ids: list[list[int]]) -> list[Prompt]:
        """Return the prompts, of tokens `ids` before they were truncated, without those that are dropped."""
        too_long = [i for i, tokens in enumerate(ids) if len(tokens) > self.limit.most_tokens]
        if not too_long:
            return prompts
        first, length = prompts[too_long[0]], len(ids[too_long[0]])
        facts = (
            f"{self.name} has a prompt that leaves no room for max_completion_length={self.limit.max_completion_length} "
            f"tokens (row {first.row} of the stream has {length} tokens, and {self.limit.max_length} fit "
            f"into {self.limit.limited_by})"
        )
        if self.limit.policy == "error":
            raise ValueError(f"{facts}; {self.limit.remedy(length)}set prompt_overflow='drop' or 'truncate_left'.")
        if not self._warned:
            logger.warning("%s; %s.", facts, self.limit.effect(first.example["prompt"]))
            self._warned = True
        if self.limit.policy == "truncate_left":
            return prompts
        return [prompt for i, prompt in enumerate(prompts) if i not in set(too_long)]


@dataclass(frozen=True)
class _Position:
    """Where a generation batch begins in the stream."""

    generation: int = 0
    epoch: int = 0
    """Passes through the whole stream before."""
    row: int = 0
    """Examples of this pass before."""
    dataset: dict[str, Any] | None = None
    """The dataset's own state there; None where it does not say all, and at the beginning."""


@dataclass(frozen=True)
class _Batch:
    position: _Position
    prompts: list[Prompt]

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr([prompt.ids for prompt in self.prompts]).encode()).hexdigest()[:16]


class StreamOrder:
    """The order in which a stream is trained on: generation batch after generation batch, again from its start at its end.

    Only the generation batches in use are held. Where a pass ends, the prompts that do not fill a generation batch are left
    out. With `shuffle`, the dataset's shuffle buffer stands between; its content is no part of a dataset's state, so a run
    resumes by reading the stream up to its position.
    """

    def __init__(self, source: PromptStream, prompts_per_generation_batch: int, seed: int, shuffle: bool):
        self.source = source
        self.prompts_per_generation_batch = prompts_per_generation_batch
        self.fingerprint = {"prompts": "a stream", "seed": seed, "shuffle": shuffle}
        self._dataset = source.dataset.shuffle(seed=seed) if shuffle else source.dataset
        self._knows_position = not _has_shuffle_buffer(self._dataset._ex_iterable)
        self._reading: IterableDataset | None = None
        self._examples: Iterator[dict[str, Any]] = iter(())
        self._kept: dict[int, _Batch] = {}
        self._next = _Position()
        self._expected: str | None = None
        """Digest of the next generation batch, where it was read before a checkpoint."""

    def prompts(self, generation: int, groups: Sequence[int]) -> list[Prompt]:
        prompts = self._batch(generation).prompts
        return [prompts[group] for group in groups]

    def digest(self, generation: int) -> str:
        return self._batch(generation).digest

    def forget(self, before: int) -> None:
        self._kept = {generation: batch for generation, batch in self._kept.items() if generation >= before}

    def state_dict(self) -> dict[str, Any]:
        """The position of the first generation batch that is kept."""
        if not self._kept:
            return {"position": asdict(self._next), "digest": self._expected}
        batch = self._kept[min(self._kept)]
        return {"position": asdict(batch.position), "digest": batch.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._go_to(_Position(**state["position"]), state["digest"])

    def _batch(self, generation: int) -> _Batch:
        if generation < min(self._kept, default=self._next.generation):
            self._go_to(_Position(), None)
        while generation not in self._kept:
            self._read()
        return self._kept[generation]

    def _go_to(self, position: _Position, digest: str | None) -> None:
        self._kept, self._reading = {}, None
        self._next, self._expected = position, digest

    def _read(self) -> None:
        """Read the next generation batch.

        Raises:
            ValueError: A whole pass does not fill one; or it is not what was read before the checkpoint.
        """
        batch, row = self._read_at(self._next)
        if self._expected not in (None, batch.digest) and self._next.dataset is not None:
            self._reading = None
            batch, row = self._read_at(replace(self._next, dataset=None))
        if self._expected not in (None, batch.digest):
            raise ValueError(
                f"{self.source.name} does not stream the prompts of generation batch {self._next.generation} again that it "
                "streamed before the checkpoint; resume with the same dataset, whose order must not change."
            )
        self._expected = None
        self._kept[batch.position.generation] = batch
        assert self._reading is not None
        state = self._reading.state_dict() if self._knows_position else None
        self._next = _Position(batch.position.generation + 1, batch.position.epoch, row, state)

    def _read_at(self, position: _Position) -> tuple[_Batch, int]:
        """Return the generation batch at `position`, or at the start of the next pass, and the row after it."""
        size = self.prompts_per_generation_batch
        while True:
            if self._reading is None:
                self._open(position)
            prompts, row = self.source.read(self._examples, size, position.row)
            if len(prompts) == size:
                return _Batch(position, prompts), row
            if not position.row:
                raise ValueError(
                    f"{self.source.name} ends after {len(prompts)} prompts and a generation batch needs {size}; use at "
                    f"least {size} prompts, or lower per_device_train_batch_size or steps_per_generation."
                )
            if prompts and not position.epoch:
                logger.warning(
                    "The last %d prompts of %s do not fill a generation batch of %d and are left out of each epoch.",
                    len(prompts),
                    self.source.name,
                    size,
                )
            position = _Position(position.generation, position.epoch + 1)
            self._reading = None

    def _open(self, position: _Position) -> None:
        self._reading = _independent(self._dataset)
        self._reading.set_epoch(position.epoch)
        if position.dataset is not None:
            self._reading.load_state_dict(position.dataset)
        self._examples = iter(self._reading)
        if position.dataset is None and position.row:
            logger.warning(
                "%s is read again up to row %d, where the run resumes: the content of its shuffle buffer is not saved. "
                "shuffle_dataset=False resumes at once.",
                self.source.name,
                position.row,
            )
            deque(itertools.islice(self._examples, position.row), maxlen=0)


def _independent(dataset: IterableDataset) -> IterableDataset:
    """Return the same stream with a position and an epoch of its own: copies share theirs."""
    return split_dataset_by_node(dataset, rank=0, world_size=1)


def _has_shuffle_buffer(examples: Any) -> bool:
    inner = [getattr(examples, "ex_iterable", None), *getattr(examples, "ex_iterables", [])]
    return isinstance(examples, BufferShuffledExamplesIterable) or any(map(_has_shuffle_buffer, filter(None, inner)))
