"""Making a window: prompts, completions, rewards, advantages, and what the old and the reference policy say of them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .balance import Balancer
from .data import PromptSet, Schedule
from .guards import Share
from .metrics import MetricLog
from .models import Reference
from .objective import group_advantages
from .policy import Completion
from .rollout import Round, RoundRunner
from .scoring import Scorer
from .seeds import derive_seed
from .signals import together
from .state import Window


@dataclass
class WindowMaker:
    """Makes this rank's share of a window; all ranks go through the same collectives, whatever happens on one of them.

    Args:
        prompts: What is trained on.
        schedule: Which prompts a window has.
        runner: Samples and rewards.
        scorer: Evaluates policies.
        balancer: Deals the work among ranks.
        reference: The frozen policy; None without a KL term.
        scale_rewards: See `group_advantages`.
        seed: Of the run.
        rank: Of this process.
        gather: From a list of objects on this rank to the concatenated lists of all ranks.
        check: Sees what all ranks say of their shares; may raise `RunStopped`.
        watch: Entered around each phase with its name.
    """

    prompts: PromptSet
    schedule: Schedule
    runner: RoundRunner
    scorer: Scorer
    balancer: Balancer
    reference: Reference | None
    scale_rewards: str
    seed: int
    rank: int
    gather: Callable[[list[Any]], list[Any]]
    check: Callable[[Sequence[Share]], None]
    watch: Callable[[str], Any]

    def make(self, index: int, policy: nn.Module, trainer_state: Any, metrics: MetricLog) -> Window:
        """Window `index`, sampled from the wrapped `policy`. One that is not finished leaves no trace.

        Raises:
            StopRequested, RunStopped, RuntimeError: See `together`.
        """
        log = MetricLog()
        sampled = together(lambda: self._sample(index, trainer_state, log), self.rank, self.gather)
        shares = self.gather([Share.of(sampled)])
        self.check(shares)
        advantages = self._advantages(sampled, shares).flatten().tolist()
        completions = [replace(c, advantage=a) for c, a in zip(sampled.completions, advantages, strict=True)]
        with log.timed("time/scoring"), self.watch("scoring under the old and the reference policy"):
            self.scorer.compare(policy, completions)
            size = self.schedule.batch_size * self.schedule.micro_steps_per_part
            parts = [completions[start : start + size] for start in range(0, len(completions), size)]
            parts = self.balancer.balance(parts, self.scorer.is_informative, self.scorer.packer)
            parts = self._scored(parts, policy)
        metrics.take(log)
        tokens = sum(share.tokens for share in shares)
        return Window(index, parts, sampled.table() | {"advantage": advantages}, tokens)

    def _sample(self, index: int, trainer_state: Any, log: MetricLog) -> Round:
        prompts = self.prompts.prompts(self.schedule.rows(index, self.rank))
        seed = derive_seed(self.seed, "window", index)
        sampled = self.runner.run(prompts, self.schedule.num_generations, seed, trainer_state, log)
        log.add_all(sampled.metrics())
        sampled.table()  # raises on this rank what it would raise later
        return sampled

    def _scored(self, parts: list[list[Completion]], policy: nn.Module) -> list[list[Completion]]:
        completions = [completion for part in parts for completion in part]
        if not self.schedule.on_policy:
            completions = self.scorer.with_logps(policy, completions, "old_logps")
        if self.reference is not None:
            with self.reference.evaluating(policy) as reference:
                completions = self.scorer.with_logps(reference, completions, "ref_logps")
        in_order = iter(completions)
        return [list(itertools.islice(in_order, len(part))) for part in parts]

    def _advantages(self, sampled: Round, shares: Sequence[Share]) -> Tensor:
        """Advantages by group, of shape (P, G)."""
        rewards = torch.tensor([reward for share in shares for reward in share.rewards], dtype=torch.float64)
        return group_advantages(sampled.total_PG, self.scale_rewards, rewards)
