"""How the completions of a generation batch get their advantages: by their group, by GDPO, or by the user's function.

Axes: P prompts, G completions per prompt, F reward functions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed.collectives import run_on_all_ranks
from ..objective import gdpo_advantages, group_advantages, normalized_sums
from ..objective.options import ScaleRewards
from ..types import Ranks
from .generation import Advantages
from .runner import RewardedRollout


@dataclass(frozen=True)
class RewardedGroup:
    """What an `advantage_func` sees of a group besides the rewards of each function: the completions with a reward."""

    prompt: Any
    """As in the dataset."""
    completions: list[Any]
    """Texts, or lists of messages for a conversational prompt."""
    completion_ids: list[list[int]]
    rewards: Tensor
    """Weighted sums of the reward functions, of shape (G,), float64."""
    batch_rewards: Tensor
    """Those of the whole generation batch on all ranks."""


AdvantageFunc = Callable[[Tensor, RewardedGroup], Any]
"""(rewards of shape (G, F), NaN where a function gave none; the group) -> G advantages, or G lists of one per token."""


@dataclass(frozen=True)
class GroupRule:
    """Advantages within the group; see `group_advantages`."""

    scale_rewards: ScaleRewards

    def __call__(self, sampled: RewardedRollout, batch_rewards: Tensor) -> Advantages:
        return group_advantages(sampled.total_PG, self.scale_rewards, batch_rewards).flatten().tolist()


@dataclass(frozen=True)
class GdpoRule:
    """Advantages of GDPO; see `gdpo_advantages`. A completion whose total is undefined takes no part."""

    weights_F: Tensor
    ranks: Ranks

    def __call__(self, sampled: RewardedRollout, batch_rewards: Tensor) -> Advantages:
        values_BF = sampled.rewards.values_BF.masked_fill(sampled.rewards.total_B.isnan().unsqueeze(1), torch.nan)
        values_PGF = values_BF.view(*sampled.total_PG.shape, len(self.weights_F))
        sums_PG = normalized_sums(values_PGF, self.weights_F)
        batch_sums = torch.tensor(self.ranks.gather(sums_PG.flatten().tolist()), dtype=torch.float64)
        return gdpo_advantages(sums_PG, batch_sums).flatten().tolist()


@dataclass(frozen=True)
class FunctionRule:
    """Advantages that the user's function returns, group by group; 0 where fewer than two completions have a reward."""

    func: AdvantageFunc
    ranks: Ranks

    def __call__(self, sampled: RewardedRollout, batch_rewards: Tensor) -> Advantages:
        return run_on_all_ranks(lambda: self._by_group(sampled, batch_rewards), self.ranks)

    def _by_group(self, sampled: RewardedRollout, batch_rewards: Tensor) -> Advantages:
        mask_B = ~sampled.rewards.total_B.isnan()
        known = batch_rewards[~batch_rewards.isnan()]
        advantages: list[float | list[float]] = [0.0] * len(sampled.completions)
        for start in range(0, len(sampled.completions), sampled.num_generations):
            rows = [i for i in range(start, start + sampled.num_generations) if mask_B[i]]
            if len(rows) < 2:
                continue
            group = RewardedGroup(
                prompt=sampled.prompts[start],
                completions=[sampled.texts[i] for i in rows],
                completion_ids=[list(sampled.completions[i].ids) for i in rows],
                rewards=sampled.rewards.total_B[rows],
                batch_rewards=known.clone(),
            )
            result = self.func(sampled.rewards.values_BF[rows], group)
            for i, advantage in zip(rows, check_advantages(result, group.completion_ids), strict=True):
                advantages[i] = advantage
        return advantages


def check_advantages(result: Any, completion_ids: Sequence[Sequence[int]]) -> list[float | list[float]]:
    """Turn what an `advantage_func` returned into one entry per completion.

    Raises:
        ValueError: It is not one finite number, or one for each token, per completion.
    """
    try:
        entries = (
            result.tolist() if isinstance(result, Tensor) else [torch.as_tensor(entry).tolist() for entry in result]
        )
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"advantage_func returned {result!r}; it must return a list with one number, or one list of numbers, per "
            "completion."
        ) from None
    if len(entries) != len(completion_ids):
        raise ValueError(
            f"advantage_func returned {len(entries)} advantages for a group of {len(completion_ids)} completions; return "
            "one for each, or for each a list with one per token."
        )
    for entry, ids in zip(entries, completion_ids, strict=True):
        values = entry if isinstance(entry, list) else [entry]
        if isinstance(entry, list) and len(entry) != len(ids):
            raise ValueError(
                f"advantage_func returned {len(entry)} advantages for the {len(ids)} tokens of a completion; return one "
                "for each, in the order of group.completion_ids."
            )
        if not torch.tensor(values, dtype=torch.float64).isfinite().all():
            raise ValueError(f"advantage_func returned {values}; return finite numbers, 0 for no gradient.")
    return entries
