"""What a run looks out for: rewards that fail, groups that teach nothing, updates that are not finite."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import RunStopped
from ..logging import get_logger


logger = get_logger(__name__)


@dataclass(frozen=True)
class RankSummary:
    """What a rank tells the others about its part of a generation batch."""

    tokens: int
    """Of prompts and completions, as `RewardedRollout.num_tokens` counts them."""
    trained_tokens: list[int]
    """Of each mini-batch."""
    rewards: list[float]
    """Of each completion; NaN where undefined."""
    groups_with_signal: int
    """Groups whose rewards differ."""
    ended: int
    """Completions that came to their end."""
    failures: dict[str, int]
    """Completions that each reward function failed on; those whose weight is 0 are left out."""
    reasons: dict[str, str]
    """Why each reward function that failed did, at first."""


def check_failures(summaries: Sequence[RankSummary], max_rate: float) -> None:
    """Stop a run whose rewards are broken.

    Raises:
        RunStopped: A reward function failed on more than `max_rate` of the completions of a generation batch.
    """
    count = sum(len(summary.rewards) for summary in summaries)
    for name in summaries[0].failures:
        failed = sum(summary.failures[name] for summary in summaries)
        if failed > max_rate * count:
            reason = next(summary.reasons[name] for summary in summaries if name in summary.reasons)
            raise RunStopped(
                f"The reward function {name!r} failed on {failed} of the {count} completions of a generation batch "
                f"(max_reward_failure_rate={max_rate}), first with: {reason}. The log has more of it. Repair it and "
                "resume, or raise max_reward_failure_rate."
            )


def warn_of_drift(metrics: Mapping[str, float], allowed: float) -> None:
    """Log a warning where the sampler's logprobs differ from the trainer's by more than `allowed` nats on average."""
    difference = metrics.get("sampling/sampling_logp_difference/mean")
    if difference is not None and difference > allowed:
        logger.warning(
            "The sampler's logprobs differ from the trainer's by %.2g nats on average, where rounding explains %.2g "
            "(sampling/sampling_logp_difference/mean): completions come from another distribution than the one that is "
            "trained, which biases the gradient.",
            difference,
            allowed,
        )


class DeadRun:
    """Counts generation batches in a row that taught nothing, or in which no completion came to its end.

    Args:
        patience: So many are too many; None: never.
        action: `"warn"` or `"stop"`.
        max_completion_length: For the message.
    """

    def __init__(self, patience: int | None, action: Literal["warn", "stop"], max_completion_length: int):
        self.patience = patience
        self.action = action
        self.max_completion_length = max_completion_length
        self.counts = {"no signal": 0, "cut off": 0}
        """Generation batches in a row, by what was wrong with them."""

    def state_dict(self) -> dict[str, int]:
        return dict(self.counts)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.counts = dict(state)

    def update(self, summaries: Sequence[RankSummary]) -> None:
        """Count a generation batch.

        Raises:
            RunStopped: It was one too many, and `action="stop"`.
        """
        rewards = [reward for summary in summaries for reward in summary.rewards]
        met = {
            "no signal": not any(summary.groups_with_signal for summary in summaries),
            "cut off": not any(summary.ended for summary in summaries),
        }
        self.counts = {kind: self.counts[kind] + 1 if met[kind] else 0 for kind in met}
        for kind, count in self.counts.items():
            if self.patience is not None and count and count % self.patience == 0:
                self._act(self._explanation(kind, count, rewards))

    def _act(self, message: str) -> None:
        if self.action == "stop":
            raise RunStopped(
                f"{message} (dead_run_patience={self.patience}, on_dead_run='stop') A resumed run samples this generation "
                "batch again, and stops again if nothing was changed; on_dead_run='warn' lets it pass."
            )
        logger.warning("%s (dead_run_patience=%d)", message, self.patience)

    def _explanation(self, kind: str, count: int, rewards: list[float]) -> str:
        if kind == "cut off":
            return (
                f"All completions of the last {count} generation batches were cut off at max_completion_length="
                f"{self.max_completion_length} tokens. The model does not end its answers: raise the limit, or see whether "
                "its chat template, and the end tokens of its generation settings, are those that it was trained with."
            )
        defined = [reward for reward in rewards if not math.isnan(reward)]
        if not defined:
            seen = "No completion of the last one has a reward: all reward functions returned None or failed."
        elif min(defined) == max(defined):
            seen = f"All rewards of the last one are {defined[0]:.4g}."
        else:
            seen = f"Rewards of the last one go from {min(defined):.4g} to {max(defined):.4g}, equal within each group."
        return (
            f"No group of the last {count} generation batches has rewards that differ, so nothing was learned. "
            f"{seen} The task may be "
            "too hard or solved, the reward function may never apply (log_completions=True shows what it judges), or all "
            "completions of a group may be the same (temperature too low)."
        )


class NonFinite:
    """Keeps updates that are not finite out of the weights.

    Args:
        patience: So many skipped optimizer steps in a row are too many.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.count = 0
        """Skipped in a row."""

    def state_dict(self) -> dict[str, int]:
        return {"count": 0 if self.exhausted else self.count}  # a run saved when exhausted could never be resumed

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]

    def should_skip(self, loss: Tensor, grad_norm: Any, agree: Any) -> bool:
        """Whether the optimizer step that is about to be made has to be skipped, on all ranks.

        Args:
            loss: Of the step on this rank.
            grad_norm: Of its gradients; None where it is not known yet.
            agree: From a flag as a tensor of shape () to its largest value over ranks.
        """
        values = [loss.detach().double()]
        if grad_norm is not None:
            values.append(torch.as_tensor(grad_norm, dtype=torch.float64, device=loss.device))
        broken = bool(agree((~torch.stack(values).isfinite().all()).float()))
        self.count = self.count + 1 if broken else 0
        if broken:
            logger.warning(
                "The loss or the gradient is not finite; the optimizer step is skipped (%d in a row).", self.count
            )
        return broken

    @property
    def exhausted(self) -> bool:
        return self.count >= self.patience

    def check(self) -> None:
        """Raises:
        RunStopped: Too many steps were skipped in a row.
        """
        if self.exhausted:
            raise RunStopped(
                f"The last {self.count} optimizer steps had a loss or a gradient that is not finite and were skipped "
                f"(max_nonfinite_steps={self.patience}). The weights are those before them. Check that the model itself is "
                "finite (bf16 in place "
                "of fp16), and start from its weights with a lower learning_rate, or with max_grad_norm."
            )
