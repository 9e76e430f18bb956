"""Sampling and rewarding the completions of some prompts.

Axes: P prompts, G completions per prompt, B = P*G completions, F reward functions.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import OutOfStep, RunStopped
from ..metrics import Max, Mean, Metric, MetricLog, Min, Quantile, RunningMean, Std, Sum
from ..model_utils import ran_out_of_memory
from ..rewards import RewardBatch, Rewards, RewardTable
from ..rollout.base import Rollout, RolloutEngine, RolloutRequest
from ..seeds import derive_seed, seeded
from ..types import Completion, Prompt
from .ahead import SampledRollout


TRAINER_METRICS = ("loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens", "step_time", "kl", "entropy")
"""What the log contains besides the metrics of a rollout."""

TIMED = ("time/sampling", "time/rewards", "sampling/tokens_per_second", "sampling/useful_share")
"""What `RolloutRunner` adds to these."""

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
            "reward": RunningMean.of(total_B),
            "reward_std": Std.of(total_B),
            "reward/quantile_10": Quantile.of(total_B, 0.1),
            "reward/quantile_90": Quantile.of(total_B, 0.9),
            "frac_reward_zero_std": Mean.of((~self.has_signal_P).double()),
        }
        for f, name in enumerate(self.rewards.names):
            values_B = self.rewards.values_BF[:, f]
            metrics[f"rewards/{name}/mean"] = RunningMean.of(values_B)
            metrics[f"rewards/{name}/std"] = Std.of(values_B)
            metrics[f"rewards/{name}/failures"] = Sum(self.rewards.failed_BF[:, f].sum())
        for name, values in self.rewards.logs.metrics.items():
            if name in metrics or name in TRAINER_METRICS:
                raise ValueError(f"log_metric({name!r}, ...) names a metric that the log has; choose another name.")
            metrics[name] = Mean(sum(values), len(values))
        return metrics

    def _length_metrics(self) -> dict[str, Metric]:
        length_B = torch.tensor([sum(c.mask) for c in self.completions], dtype=torch.float64)
        ended_B = torch.tensor([c.ended for c in self.completions], dtype=torch.bool)
        metrics: dict[str, Metric] = {"completions/clipped_ratio": Mean.of((~ended_B).double())}
        for suffix, mask_B in (("", torch.ones_like(ended_B)), ("terminated_", ended_B)):
            metrics[f"completions/mean_{suffix}length"] = Mean.of(length_B, mask_B)
            metrics[f"completions/min_{suffix}length"] = Min.of(length_B, mask_B)
            metrics[f"completions/max_{suffix}length"] = Max.of(length_B, mask_B)
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

    @property
    def metric_names(self) -> set[str]:
        """Names of what `run` counts and times, without what reward functions log."""
        nothing = RewardedRollout(1, [], [], [], self.rewards.of_nothing())
        return {*nothing.metrics(), *TIMED}

    def run(
        self, prompts: Sequence[Prompt], num_generations: int, seed: int, trainer_state: Any, metrics: MetricLog
    ) -> RewardedRollout:
        """Sample `num_generations` completions of each prompt, and reward them."""
        sampled = self.sample(make_request(prompts, num_generations, seed), metrics)
        return self.reward(prompts, num_generations, sampled, seed, trainer_state, metrics)

    def sample(
        self, request: RolloutRequest, metrics: MetricLog, take: Callable[[], SampledRollout] | None = None
    ) -> SampledRollout:
        """Sample what is asked for; its speed goes to `metrics`. `take` gives what has been sampled ahead.

        Raises:
            RunStopped: Memory runs out, and the engine cannot do with less.
        """
        with metrics.timed("time/sampling") as timer, self.phase("sampling"):
            taken = None if take is None else take()
            rollout = self._rollout(request) if taken is None else taken.rollout
        sampled = taken or SampledRollout(rollout, timer.seconds, None)
        tokens = sum(len(c.ids) for c in rollout.completions)
        metrics.add("sampling/tokens_per_second", Mean(tokens, sampled.seconds))
        if rollout.computed_tokens is not None:
            useful = sum(sum(c.mask) for c in rollout.completions)
            metrics.add("sampling/useful_share", Mean(useful, rollout.computed_tokens))
        return sampled

    def _rollout(self, request: RolloutRequest) -> Rollout:
        try:
            return self.engine.rollout(request)
        except OutOfStep:
            raise
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            raise RunStopped(
                f"Memory ran out in sampling, however few completions at a time ({type(error).__name__}: {error}). Lower "
                "max_completion_length or the length of prompts, or use ZeRO-3 or LoRA."
            ) from error

    def reward(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampled: SampledRollout,
        seed: int,
        trainer_state: Any,
        metrics: MetricLog,
    ) -> RewardedRollout:
        """Reward `num_generations` completions of each prompt, unless that is done; the time goes to `metrics`.

        Reward functions that draw random numbers draw the same ones for the same `seed` and prompts. Without prompts no
        function is called.
        """
        rollout, rewards = sampled.rollout, sampled.rewards
        if not prompts:
            return RewardedRollout(num_generations, [], [], [], self.rewards.of_nothing())
        batch = self._reward_batch(prompts, num_generations, rollout, trainer_state)
        with metrics.timed("time/rewards"):
            if rewards is None:
                with seeded(derive_seed(seed, "rewards", prompts[0].row)), self.interruptible():
                    rewards = self.rewards(batch, self.phase)
        return RewardedRollout(num_generations, batch.prompts, rollout.completions, batch.completions, rewards)

    def reward_in_workers(
        self, prompts: Sequence[Prompt], num_generations: int, trainer_state: Any, rollout: Rollout
    ) -> RewardTable | None:
        """Reward what was sampled for `prompts`, in any thread; None where workers cannot."""
        return self.rewards.in_workers(self._reward_batch(prompts, num_generations, rollout, trainer_state), self.phase)

    def _reward_batch(
        self, prompts: Sequence[Prompt], num_generations: int, rollout: Rollout, trainer_state: Any
    ) -> RewardBatch:
        rows = [prompt for prompt in prompts for _ in range(num_generations)]
        columns = {name: [row.example[name] for row in rows] for name in reward_columns(rows[0].example)}
        return RewardBatch(
            prompts=[row.example["prompt"] for row in rows],
            completions=self._texts(rows, rollout.completions),
            completion_ids=[c.ids for c in rollout.completions],
            columns=columns | rollout.columns,
            num_generations=num_generations,
            trainer_state=trainer_state,
        )

    def _texts(self, rows: list[Prompt], completions: list[Completion]) -> list[Any]:
        texts = self.tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
        return [
            text if isinstance(row.example["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]


def make_request(
    prompts: Sequence[Prompt], num_generations: int, seed: int, places: Sequence[range] | None = None
) -> RolloutRequest:
    """Ask for completions of each prompt, whose noise follows from `seed` and its row in the dataset.

    They are `num_generations`, or those at `places` of its group.
    """
    return RolloutRequest(
        prompts=[prompt.example["prompt"] for prompt in prompts],
        prompt_ids=[prompt.ids for prompt in prompts],
        num_generations=num_generations,
        seeds=[derive_seed(seed, prompt.row) for prompt in prompts],
        places=places,
    )


def reward_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns of a dataset that reward functions get; the others come under the names of the trainer."""
    return [name for name in columns if name not in ("prompt", "completion", "completion_ids")]
