"""Making a generation batch: prompts -> completions -> rewards -> advantages -> logprobs of the old policy and reference.

Axes: P prompts, G completions per prompt, B = P*G completions, F reward functions.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.prompts import PromptSet
from ..data.schedule import Schedule
from ..distributed.collectives import run_on_all_ranks
from ..distributed.load_balance import Balancer
from ..logprobs.evaluator import LogprobEvaluator
from ..metrics import Max, Mean, Metric, MetricLog, Min, Quantile, Std, Sum
from ..models import Reference
from ..objective import Counts
from ..reliability.guards import RankSummary
from ..rewards import RewardBatch, Rewards, RewardTable
from ..rollout.base import Rollout, RolloutEngine, RolloutRequest
from ..seeds import derive_seed, seeded
from ..types import Completion, GenerationBatch, Prompt, Ranks
from .ahead import SamplesAhead
from .weight_sync import WeightSync


TRAINER_METRICS = ("loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens", "step_time", "kl", "entropy")
"""What the log contains besides the metrics of a rollout."""

Advantages = Sequence[float | list[float]]
"""One entry per completion: a number, or one number for each of its tokens."""

TABLE_COLUMNS = ("step", "group", "prompt", "completion", "advantage")
"""Columns of the completions table besides the rewards."""


@dataclass(frozen=True)
class RewardedRollout:
    """G completions of each prompt, group after group, and their rewards."""

    num_generations: int
    prompts: list[Any]
    """What each row was prompted with, as in the dataset."""
    completions: list[Completion]
    texts: list[Any]
    """What each row reads: a string, or a list with one assistant message for a conversational prompt."""
    rewards: RewardTable
    computed_tokens: int | None = None
    """See `Rollout`."""

    @property
    def total_PG(self) -> Tensor:
        """Rewards by group, float64, NaN where undefined."""
        return self.rewards.total_B.view(-1, self.num_generations)

    @property
    def has_signal_P(self) -> Tensor:
        """Whether the rewards of each group differ."""
        return self.total_PG.nan_to_num(-torch.inf).amax(1) > self.total_PG.nan_to_num(torch.inf).amin(1)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, the prompt counted with each of its completions."""
        return sum(len(c.prompt_ids) + len(c.ids) for c in self.completions)

    def metrics(self) -> dict[str, Metric]:
        """TRL's metrics of rewards and lengths, under TRL's names."""
        return self._reward_metrics() | self._length_metrics()

    def table(self) -> dict[str, list[Any]]:
        """Prompts, completions, rewards and what reward functions noted, by column, one entry per completion.

        Raises:
            ValueError: A reward function gave `log_extra` another number of values than completions, or the name of
                another column.
        """
        rewards = dict(zip(self.rewards.names, self.rewards.values_BF.T.tolist(), strict=True))
        table = {"prompt": self.prompts, "completion": self.texts} | rewards
        for name, values in self.rewards.logs.columns.items():
            if len(values) != len(self.texts):
                raise ValueError(
                    f"log_extra({name!r}, ...) got {len(values)} values for {len(self.texts)} completions; give one each."
                )
            if name in (*table, *TABLE_COLUMNS):
                raise ValueError(f"log_extra({name!r}, ...) names a column that the table has; choose another name.")
        return table | self.rewards.logs.columns

    def _reward_metrics(self) -> dict[str, Metric]:
        total_B = self.rewards.total_B
        metrics: dict[str, Metric] = {
            "reward": Mean.of(total_B, ~total_B.isnan()),
            "reward_std": Std.of(total_B),
            "reward/quantile_10": Quantile.of(total_B, 0.1),
            "reward/quantile_90": Quantile.of(total_B, 0.9),
            "frac_reward_zero_std": Mean.of((~self.has_signal_P).double()),
        }
        for f, name in enumerate(self.rewards.names):
            values_B = self.rewards.values_BF[:, f]
            metrics[f"rewards/{name}/mean"] = Mean.of(values_B, ~values_B.isnan())
            metrics[f"rewards/{name}/std"] = Std.of(values_B)
            metrics[f"rewards/{name}/failures"] = Sum(self.rewards.failed_BF[:, f].sum())
        for name, values in self.rewards.logs.metrics.items():
            if name in metrics or name in TRAINER_METRICS:
                raise ValueError(f"log_metric({name!r}, ...) names a metric that the log has; choose another name.")
            metrics[name] = Mean(sum(values), len(values))
        return metrics

    def _length_metrics(self) -> dict[str, Metric]:
        length_B = torch.tensor([sum(c.mask) for c in self.completions], dtype=torch.float64)
        ended_B = torch.tensor([c.ended for c in self.completions])
        metrics: dict[str, Metric] = {"completions/clipped_ratio": Mean.of((~ended_B).double())}
        for suffix, mask_B in (("", torch.ones_like(ended_B)), ("terminated_", ended_B)):
            metrics[f"completions/mean_{suffix}length"] = Mean.of(length_B, mask_B)
            metrics[f"completions/min_{suffix}length"] = Min.of(length_B, mask_B)
            metrics[f"completions/max_{suffix}length"] = Max.of(length_B, mask_B)
        if self.computed_tokens is not None:
            metrics["sampling/useful_share"] = Mean(length_B.sum(), self.computed_tokens)
        return metrics


class RolloutRunner:
    """Samples with an engine, decodes, and rewards.

    Args:
        engine: Samples the completions.
        rewards: Rewards them.
        tokenizer: Decodes them, without special tokens.
        phase: Entered around each phase with its name.
        interruptible: Entered around code of the user, which a signal may end at any point.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rewards: Rewards,
        tokenizer: PreTrainedTokenizerBase,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        interruptible: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.engine = engine
        self.rewards = rewards
        self.tokenizer = tokenizer
        self.phase = phase
        self.interruptible = interruptible

    def run(
        self,
        prompts: list[Prompt],
        num_generations: int,
        seed: int,
        trainer_state: Any,
        metrics: MetricLog,
        sample: Callable[[RolloutRequest], Rollout] | None = None,
    ) -> RewardedRollout:
        """`num_generations` rewarded completions of each prompt; the time of both phases goes to `metrics`.

        A prompt's noise follows from `seed` and its row in the dataset; reward functions that draw random numbers draw the
        same ones for the same `seed` and prompts. `sample` stands in for the engine.
        """
        request = make_request(prompts, num_generations, seed)
        with metrics.timed("time/sampling") as timer, self.phase("sampling"):
            rollout = (sample or self.engine.rollout)(request)
        tokens = sum(len(c.ids) for c in rollout.completions)
        metrics.add("sampling/tokens_per_second", Mean(tokens, timer.seconds))
        with metrics.timed("time/rewards"):
            rows = [prompt for prompt in prompts for _ in range(num_generations)]
            texts = self._texts(rows, rollout.completions)
            batch = RewardBatch(
                prompts=[row.example["prompt"] for row in rows],
                completions=texts,
                completion_ids=[c.ids for c in rollout.completions],
                columns=_columns(rows) | rollout.columns,
                num_generations=num_generations,
                trainer_state=trainer_state,
            )
            with seeded(derive_seed(seed, "rewards", prompts[0].row)), self.interruptible():
                rewards = self.rewards(batch, self.phase)
        return RewardedRollout(
            num_generations, batch.prompts, rollout.completions, texts, rewards, rollout.computed_tokens
        )

    def _texts(self, rows: list[Prompt], completions: list[Completion]) -> list[Any]:
        texts = self.tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
        return [
            text if isinstance(row.example["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]


def make_request(prompts: Sequence[Prompt], num_generations: int, seed: int) -> RolloutRequest:
    """Ask for `num_generations` completions of each prompt, whose noise follows from `seed` and its row."""
    return RolloutRequest(
        prompts=[prompt.example["prompt"] for prompt in prompts],
        prompt_ids=[prompt.ids for prompt in prompts],
        num_generations=num_generations,
        seeds=[derive_seed(seed, prompt.row) for prompt in prompts],
    )


def reward_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns of a dataset that reward functions get; the others come under the names of the trainer."""
    return [name for name in columns if name not in ("prompt", "completion", "completion_ids")]


def _columns(rows: list[Prompt]) -> dict[str, list[Any]]:
    names = [name for name in rows[0].example if name not in ("prompt", "completion", "completion_ids")]
    return {name: [row.example[name] for row in rows] for name in names}


@dataclass
class GenerationBatchBuilder:
    """Builds this rank's part of a generation batch; all ranks pass the same collectives, whatever happens on one of them.

    Args:
        prompts: What is trained on.
        schedule: Which prompts a generation batch has.
        runner: Samples and rewards.
        evaluator: Computes logprobs.
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

    prompts: PromptSet
    schedule: Schedule
    runner: RolloutRunner
    evaluator: LogprobEvaluator
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
        self._prepare_sampling(index, policy, log)
        sampled = run_on_all_ranks(lambda: self._sample(index, trainer_state, log), self.ranks)
        groups = self.schedule.groups(self.ranks.rank)
        own = sampled.completions if groups else []
        trained_tokens = [sum(sum(c.mask) for c in mini_batch) for mini_batch in self._divide(groups, own)]
        summaries = self.ranks.gather([summarize(sampled, trained_tokens)] if groups else [])
        self.check(summaries)
        rewards = torch.tensor([reward for summary in summaries for reward in summary.rewards], dtype=torch.float64)
        advantages = self.advantages(sampled, rewards) if groups else []
        own = [replace(c, advantage=a) for c, a in zip(own, advantages, strict=True)]
        with log.timed("time/logprobs"), self.phase("computing logprobs of the old policy and the reference"):
            self.evaluator.compare(policy, sampled.completions)
            mini_batches = self.balancer.balance(
                self._divide(groups, own), self.evaluator.has_gradient, self.evaluator.packer.group_size
            )
            mini_batches = self._with_logps(mini_batches, policy)
        if self.ahead is not None:
            self.ahead.used(index)
        metrics.drain(log)
        tokens = sum(summary.tokens for summary in summaries)
        table = {name: values[: len(own)] for name, values in sampled.table().items()}
        table |= {"advantage": [_mean(advantage) for advantage in advantages]}
        return GenerationBatch(index, mini_batches, table, self._counts(summaries), tokens)

    def _prepare_sampling(self, index: int, policy: nn.Module, log: MetricLog) -> None:
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
            log.add("time/sampler_idle", Mean(idle))
            for one in missing:
                self.ahead.submit(one, self._request(one))
        log.add("sampling/staleness", Mean(min(index, self.ahead.distance)))

    def _prompts(self, index: int) -> list[Prompt]:
        """This rank's; a rank without any takes another's first: sampling and reward models may be collective."""
        return self.prompts.prompts(self.schedule.rows(index, self.ranks.rank) or self.schedule.rows(index, 0)[:1])

    def _request(self, index: int) -> RolloutRequest:
        return make_request(
            self._prompts(index), self.schedule.num_generations, derive_seed(self.seed, "generation batch", index)
        )

    def _sample(self, index: int, trainer_state: Any, log: MetricLog) -> RewardedRollout:
        if not self.schedule.rows(index, self.ranks.rank):
            log = MetricLog()
        prompts = self._prompts(index)
        seed = derive_seed(self.seed, "generation batch", index)
        take = None if self.ahead is None else partial(self._take, index)
        sampled = self.runner.run(prompts, self.schedule.num_generations, seed, trainer_state, log, take)
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

    def _take(self, index: int, request: RolloutRequest) -> Rollout:
        assert self.ahead is not None
        return self.ahead.take(index)

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
    )
