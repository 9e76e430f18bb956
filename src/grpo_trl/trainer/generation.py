"""Making a generation batch: prompts -> completions -> rewards -> advantages -> logprobs of the old policy and reference.

Rows of a group may be sampled on several ranks. They meet on one before they are rewarded.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.prompts import PromptOrder
from ..data.schedule import GroupPart, Schedule
from ..distributed.collectives import run_on_all_ranks
from ..distributed.load_balance import Balancer
from ..errors import RunStopped
from ..logprobs.evaluator import LogprobEvaluator
from ..metrics import Mean, MetricLog
from ..objective import Counts
from ..reference import Reference
from ..reliability.guards import RankSummary
from ..rewards import RewardTable
from ..rollout.base import Rollout, RolloutRequest
from ..seeds import derive_seed
from ..types import Completion, GenerationBatch, Ranks
from .ahead import SampledRollout, SamplesAhead
from .runner import RewardedRollout, RolloutRunner, make_request
from .sampler_check import SamplerCheck
from .weight_sync import WeightSync


Advantages = Sequence[float | list[float]]
"""One entry per completion: a number, or one number for each of its tokens."""


@dataclass
class GenerationBatchBuilder:
    """Builds this rank's part of a generation batch; all ranks pass the same collectives, whatever happens on one of them.

    Args:
        order: Which prompts a generation batch has.
        schedule: Which groups of it this rank has, and which mini-batch.
        runner: Samples and rewards.
        evaluator: Computes logprobs.
        sampler_check: Compares the logprobs of a sampler that computes with the trainer's model.
        balancer: Assigns the work to ranks.
        reference: The frozen policy; None without a KL term.
        sync: Keeps an engine with weights of its own on the policy; None for one without.
        ahead: Samples generation batches before their turn; None where each is sampled when it is needed.
        old_logprobs: Whose logprobs stand for the old policy's: the `"trainer"`'s or the `"sampler"`'s.
        advantages: From the rewarded rollout and the rewards of the whole generation batch (NaN where undefined) to one
            advantage per completion. A collective.
        max_completion_length: Of a completion, in tokens.
        mask_truncated: Whether completions that were cut off are not trained on.
        seed: Of the run.
        ranks: Of the run.
        check: Sees the summaries of all ranks; may raise `RunStopped`.
        phase: Entered around each phase with its name.
    """

    order: PromptOrder
    schedule: Schedule
    runner: RolloutRunner
    evaluator: LogprobEvaluator
    sampler_check: SamplerCheck
    balancer: Balancer
    reference: Reference | None
    sync: WeightSync | None
    ahead: SamplesAhead | None
    old_logprobs: Literal["trainer", "sampler"]
    advantages: Callable[[RewardedRollout, Tensor], Advantages]
    max_completion_length: int
    mask_truncated: bool
    seed: int
    ranks: Ranks
    check: Callable[[Sequence[RankSummary]], None]
    phase: Callable[[str], AbstractContextManager[Any]]

    def build(self, index: int, policy: nn.Module, trainer_state: Any, metrics: MetricLog) -> GenerationBatch:
        """Build generation batch `index`, sampled from the wrapped `policy`. One that is interrupted leaves no trace.

        Raises:
            StopRequested, RunStopped, RuntimeError: See `run_on_all_ranks`.
        """
        log = MetricLog()
        self._read_prompts(index)
        self._prepare_sampling(index, policy, trainer_state, log)
        share = run_on_all_ranks(lambda: self._sample(index, log), self.ranks)
        met = self._meet(share)
        sampled = run_on_all_ranks(lambda: self._reward(index, met, trainer_state, log), self.ranks)
        groups, own = self.schedule.groups(self.ranks.rank), sampled.completions
        trained_tokens = [sum(sum(c.mask) for c in mini_batch) for mini_batch in self._divide(groups, own)]
        summaries = self.ranks.gather([summarize(sampled, trained_tokens)] if groups else [])
        self.check(summaries)
        rewards = torch.tensor([reward for summary in summaries for reward in summary.rewards], dtype=torch.float64)
        advantages = self.advantages(sampled, rewards)
        own = [replace(c, advantage=a) for c, a in zip(own, advantages, strict=True)]
        with log.timed("time/logprobs"), self.phase("computing logprobs of the old policy and the reference"):
            self.evaluator.compare(policy, share.rollout.completions)  # of which each rank has some
            if self.runner.engine.in_process:
                self.sampler_check.run(policy, share.rollout.completions)
            mini_batches = self.balancer.balance(
                self._divide(groups, own), self.evaluator.has_gradient, self.evaluator.packer.group_size
            )
            mini_batches = self._with_logps(mini_batches, policy)
        if self.ahead is not None:
            self.ahead.used(index)
        metrics.drain(log)
        tokens = sum(summary.tokens for summary in summaries)
        table = sampled.table() | {"advantage": [_mean(advantage) for advantage in advantages]}
        return GenerationBatch(index, mini_batches, table, self._counts(summaries), tokens)

    def _read_prompts(self, index: int) -> None:
        """Read what will be sampled, and check that all ranks have read the same."""
        last = index if self.ahead is None else index + self.ahead.distance

        def read() -> str:
            try:
                return self.order.digest(last)
            except ValueError as error:  # of a prompt that is streamed in the middle of a run, which must not be lost
                raise RunStopped(str(error)) from error

        digests = self.ranks.gather([run_on_all_ranks(read, self.ranks)])
        if len(set(digests)) > 1:
            others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise RunStopped(
                f"train_dataset has other prompts on rank {others[0]} than on rank 0 in generation batch {last}; give "
                "every rank the same dataset in the same order, not split by rank."
            )

    def _prepare_sampling(self, index: int, policy: nn.Module, trainer_state: Any, log: MetricLog) -> None:
        """Sync the engine, and start sampling what the weights of now are for."""
        if self.sync is None:
            return
        if self.ahead is None:
            self.sync.run(policy, self._request(index), log)
            return
        missing = self.ahead.missing(index)
        if missing:
            idle = run_on_all_ranks(self.ahead.wait, self.ranks)
            self.sync.run(policy, self._request(missing[0]), log)
            log.add("sampling/idle_time", Mean(idle))
            for one in missing:
                self.ahead.submit(one, self._request(one), self._reward_ahead(one, trainer_state))
        log.add("sampling/staleness", Mean(min(index, self.ahead.distance)))

    @property
    def _parts(self) -> list[GroupPart]:
        """What this rank samples of each generation batch."""
        return self.schedule.parts(self.ranks.rank, self.runner.engine.splits_groups)

    def _seed(self, index: int) -> int:
        return derive_seed(self.seed, "generation batch", index)

    def _request(self, index: int) -> RolloutRequest:
        """Ask for this rank's part; a rank without any asks for another's: sampling may be collective."""
        group_size = self.schedule.num_generations
        parts = self._parts or [GroupPart(0, range(group_size))]
        prompts = self.order.prompts(index, [part.group for part in parts])
        return make_request(prompts, group_size, self._seed(index), [part.places for part in parts])

    def _reward_ahead(self, index: int, trainer_state: Any) -> Callable[[Rollout], RewardTable | None]:
        """What rewards generation batch `index` in another thread; functions see the state of now."""
        prompts = self.order.prompts(index, self.schedule.groups(self.ranks.rank))
        if not prompts:
            return lambda rollout: None
        state = copy.copy(trainer_state)
        state.log_history = list(state.log_history)
        return partial(self.runner.reward_in_workers, prompts, self.schedule.num_generations, state)

    def _sample(self, index: int, log: MetricLog) -> SampledRollout:
        take = None if self.ahead is None else partial(self.ahead.take, index)
        return self.runner.sample(self._request(index), log if self._parts else MetricLog(), take)

    def _meet(self, share: SampledRollout) -> SampledRollout:
        """Return the completions of this rank's groups, wherever their rows were sampled. A collective."""
        if not self.schedule.divides_groups(self.runner.engine.splits_groups):
            return share
        rows = [(part.group, place) for part in self._parts for place in part.places]
        owners = {group: rank for rank in range(self.ranks.world_size) for group in self.schedule.groups(rank)}
        completions = self.balancer.meet(share.rollout.completions, rows, owners)
        return replace(share, rollout=replace(share.rollout, completions=completions))

    def _reward(self, index: int, met: SampledRollout, trainer_state: Any, log: MetricLog) -> RewardedRollout:
        prompts = self.order.prompts(index, self.schedule.groups(self.ranks.rank))
        size = self.schedule.num_generations
        sampled = self.runner.reward(prompts, size, met, self._seed(index), trainer_state, log)
        if prompts:
            log.add_all(sampled.metrics())
        sampled.table()  # raises here, where all ranks hear of it, what it would raise later
        if not self.mask_truncated:
            return sampled
        untrained = [c if c.ended else replace(c, mask=[False] * len(c.mask)) for c in sampled.completions]
        return replace(sampled, completions=untrained)

    def _divide(self, groups: list[int], completions: list[Completion]) -> list[list[Completion]]:
        """Divide the completions of this rank's `groups` into the mini-batches of the generation batch."""
        mini_batches: list[list[Completion]] = [[] for _ in range(self.schedule.mini_batches_per_generation_batch)]
        members = [(group, g) for group in groups for g in range(self.schedule.num_generations)]
        for (group, g), completion in zip(members, completions, strict=True):
            mini_batches[self.schedule.mini_batch_of(group, g)].append(completion)
        return mini_batches

    def _with_logps(self, mini_batches: list[list[Completion]], policy: nn.Module) -> list[list[Completion]]:
        completions = [completion for mini_batch in mini_batches for completion in mini_batch]
        if self.old_logprobs == "sampler":
            completions = [_with_sampler_logps(completion) for completion in completions]
        elif not self.schedule.on_policy:
            completions = self.evaluator.with_logps(policy, completions, "old_logps")
        if self.reference is not None:
            with self.reference.evaluating(policy) as reference:
                completions = self.evaluator.with_logps(reference, completions, "ref_logps")
        in_order = iter(completions)
        return [list(itertools.islice(in_order, len(mini_batch))) for mini_batch in mini_batches]

    def _counts(self, summaries: Sequence[RankSummary]) -> list[Counts]:
        """Count what each mini-batch holds over all ranks."""
        completions = self.schedule.completions_per_mini_batch
        return [
            Counts(completions, sum(tokens_of_ranks), completions * self.max_completion_length)
            for tokens_of_ranks in zip(*(summary.trained_tokens for summary in summaries), strict=True)
        ]


def _with_sampler_logps(completion: Completion) -> Completion:
    """Take the sampler's logprobs as the old policy's; tokens whose logprob it does not know are left out."""
    if completion.sampler_logps is None:
        raise ValueError(
            "old_logprobs='sampler' needs an engine that reports the policy's logprobs; set old_logprobs='trainer'."
        )
    logps = torch.tensor(completion.sampler_logps, dtype=torch.float32)
    mask = [
        counts and not math.isnan(logp) for counts, logp in zip(completion.mask, completion.sampler_logps, strict=True)
    ]
    return replace(completion, mask=mask, old_logps=logps)


def _mean(advantage: float | list[float]) -> float:
    """The advantage that the table of completions shows."""
    return sum(advantage) / max(len(advantage), 1) if isinstance(advantage, list) else advantage


def summarize(sampled: RewardedRollout, trained_tokens: list[int]) -> RankSummary:
    """Collect what a rank tells the others about what it has sampled."""
    rewards = sampled.rewards
    return RankSummary(
        tokens=sampled.num_tokens,
        trained_tokens=trained_tokens,
        rewards=rewards.total_B.tolist(),
        groups_with_signal=int(sampled.has_signal_P.sum()),
        ended=sum(c.ended for c in sampled.completions),
        failures=rewards.failures,
        reasons=rewards.reasons,
    )
