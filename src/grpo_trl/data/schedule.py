"""Which mini-batch each optimizer step trains on, and which groups of a generation batch each rank has."""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from ..logging import get_logger


logger = get_logger(__name__)


@dataclass(frozen=True)
class MiniBatchRef:
    """One of the mini-batches of a generation batch."""

    generation: int
    mini_batch: int


class GroupPart(NamedTuple):
    """Completions of a group that one rank samples."""

    group: int
    """Its index in the generation batch."""
    places: range
    """Which of its completions."""


@dataclass(frozen=True)
class Schedule:
    """Which generation batches an epoch has, and which micro-steps each optimizer step.

    All of it follows from these numbers and the count of optimizer steps so far; nothing is carried.

    >>> s = Schedule(num_prompts=10, num_generations=2, batch_size=4, accumulation=2, steps_per_generation=2,
    ...              num_iterations=1, world_size=1)
    >>> s.generation_batches_per_epoch, s.items_per_epoch, s.groups(rank=0)
    (2, 4, [0, 1, 2, 3])
    """

    num_prompts: int | None
    """None of a stream, which is one endless epoch."""
    num_generations: int
    batch_size: int
    """Completions per rank and micro-step."""
    accumulation: int
    """Micro-steps per optimizer step."""
    steps_per_generation: int
    num_iterations: int
    world_size: int

    @property
    def completions_per_generation_batch(self) -> int:
        """Over all ranks."""
        return self.batch_size * self.steps_per_generation * self.world_size

    @property
    def prompts_per_generation_batch(self) -> int:
        return self.completions_per_generation_batch // self.num_generations

    @property
    def generation_batches_per_epoch(self) -> int:
        """The last, incomplete generation batch of an epoch is dropped."""
        assert self.num_prompts is not None
        return self.num_prompts // self.prompts_per_generation_batch

    @property
    def items_per_epoch(self) -> int:
        return self.generation_batches_per_epoch * self.steps_per_generation * self.num_iterations

    @property
    def optimizer_steps_per_epoch(self) -> int:
        """The last one has fewer micro-steps where those of an epoch are no multiple of `accumulation`."""
        return math.ceil(self.items_per_epoch / self.accumulation)

    @property
    def optimizer_steps_per_generation_batch(self) -> float:
        """How many train on a generation batch; below 1 where each needs several."""
        return self.num_iterations * self.steps_per_generation / self.accumulation

    @property
    def unseen_prompts(self) -> int:
        """How many an epoch leaves out, because they do not fill a generation batch; shuffling changes which."""
        return 0 if self.num_prompts is None else self.num_prompts % self.prompts_per_generation_batch

    def items(self, max_steps: int) -> int:
        """Return the micro-steps of an epoch; those of `max_steps` optimizer steps of a stream."""
        return max_steps * self.accumulation if self.num_prompts is None else self.items_per_epoch

    @property
    def micro_steps_per_mini_batch(self) -> int:
        """A generation batch is cut into the optimizer steps it lasts; into one where a step takes several of them."""
        return min(self.accumulation, self.steps_per_generation)

    @property
    def on_policy(self) -> bool:
        """Whether every use of a generation batch lies in the one optimizer step that follows its sampling."""
        return self.num_iterations == 1 and self.steps_per_generation <= self.accumulation

    def check(self) -> None:
        """Refuse a dataset that does not fill a generation batch, and say what is left out of each epoch.

        Raises:
            ValueError: The dataset has fewer prompts than a generation batch.
        """
        if self.num_prompts is None:
            return
        need = self.prompts_per_generation_batch
        if not self.generation_batches_per_epoch:
            raise ValueError(
                f"train_dataset has {self.num_prompts} prompts and a generation batch needs {need} (generation_batch_size="
                f"{need * self.num_generations} completions / num_generations={self.num_generations}); use at least {need} "
                f"prompts, or lower per_device_train_batch_size={self.batch_size} or steps_per_generation="
                f"{self.steps_per_generation}."
            )
        if self.unseen_prompts:
            logger.warning(
                "%d of %d prompts do not fill a generation batch of %d and are left out of each epoch.",
                self.unseen_prompts,
                self.num_prompts,
                need,
            )

    def mini_batches(self, optimizer_step: int, micro_steps: int) -> list[MiniBatchRef]:
        """Return what optimizer step `optimizer_step` (from 0, over the run), of so many `micro_steps`, trains on."""
        first_generation, step = 0, optimizer_step
        if self.num_prompts is not None:
            epoch, step = divmod(optimizer_step, self.optimizer_steps_per_epoch)
            first_generation = epoch * self.generation_batches_per_epoch
        start = step * self.accumulation
        refs = []
        for item in range(start, start + micro_steps, self.micro_steps_per_mini_batch):
            generation, use = divmod(item, self.steps_per_generation * self.num_iterations)
            mini_batch = use % self.steps_per_generation // self.micro_steps_per_mini_batch
            refs.append(MiniBatchRef(first_generation + generation, mini_batch))
        return refs

    def groups(self, rank: int) -> list[int]:
        """Return which groups of a generation batch `rank` rewards, by their index there; whole ones, so it may be none.

        The groups of each mini-batch are split among ranks into equal blocks; what is left over goes to the ranks with the
        fewest groups so far.
        """
        owned: list[int] = []
        counts = [0] * self.world_size
        for _, in_mini_batch in itertools.groupby(
            range(self.prompts_per_generation_batch), lambda group: self.mini_batch_of(group, 0)
        ):
            block = list(in_mini_batch)
            each, left = divmod(len(block), self.world_size)
            fewest = sorted(range(self.world_size), key=counts.__getitem__)[:left]
            shares = [each + (other in fewest) for other in range(self.world_size)]
            start = sum(shares[:rank])
            owned += block[start : start + shares[rank]]
            counts = [count + share for count, share in zip(counts, shares, strict=True)]
        return owned

    def divides_groups(self, splits: bool) -> bool:
        """Whether rows of one group are sampled on several ranks: where whole groups would leave ranks with fewer.

        `splits` says whether the rollout engine can.
        """
        return splits and self.prompts_per_generation_batch % self.world_size != 0

    def parts(self, rank: int, splits: bool) -> list[GroupPart]:
        """Return what `rank` samples of a generation batch: its groups, or as many completions as every other rank."""
        if not self.divides_groups(splits):
            return [GroupPart(group, range(self.num_generations)) for group in self.groups(rank)]
        size = self.batch_size * self.steps_per_generation
        rows = range(rank * size, (rank + 1) * size)
        parts = []
        for group in range(rows.start // self.num_generations, -(-rows.stop // self.num_generations)):
            first = group * self.num_generations
            start, stop = max(rows.start, first), min(rows.stop, first + self.num_generations)
            parts.append(GroupPart(group, range(start - first, stop - first)))
        return parts

    @property
    def mini_batches_per_generation_batch(self) -> int:
        return self.steps_per_generation // self.micro_steps_per_mini_batch

    def mini_batch_of(self, group: int, completion: int) -> int:
        """Return which mini-batch of a generation batch a completion of a group belongs to, for any number of ranks."""
        return (group * self.num_generations + completion) // self.completions_per_mini_batch

    @property
    def completions_per_mini_batch(self) -> int:
        """Over all ranks."""
        return self.batch_size * self.micro_steps_per_mini_batch * self.world_size
