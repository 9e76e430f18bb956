"""Rewards to advantages.

Axes: P prompts (groups), G completions per prompt, F reward functions.
"""

import torch
from torch import Tensor

from .options import ScaleRewards


STD_EPSILON = 1e-4
"""Added to the standard deviation that divides; TRL's value."""

LARGEST = 2.0**500
"""Of this size, as many rewards as there may be can be squared and added up in float64."""


def group_advantages(
    rewards_PG: Tensor, scale_rewards: ScaleRewards = "group", batch_rewards: Tensor | None = None
) -> Tensor:
    """Compute how much better each completion is than its group.

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)

    The mean and the sample standard deviation run over the completions of the group that have a reward. A is exactly 0
    for a completion without one, and for the whole group where the largest and the smallest reward are equal or fewer
    than two completions have one: rounding in the mean must not become a signal.

    Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2 (outcome supervision).

    Args:
        rewards_PG: Rewards of shape (P, G), any float dtype, NaN where a completion has no reward.
        scale_rewards: What divides: `"group"`, the standard deviation of the group; `"batch"`, that of
            `batch_rewards`; `"none"`, nothing.
        batch_rewards: Rewards of the whole generation batch on all ranks, any shape, NaN where undefined. Read for
            `scale_rewards="batch"` only.

    Returns:
        Advantages of shape (P, G), float64. An empty input gives an empty result.

    Raises:
        ValueError: `"batch"` came without `batch_rewards`.
    """
    rewards_PG = rewards_PG.double()
    mask_PG = ~rewards_PG.isnan()
    mask_signal_P1 = _largest(rewards_PG) > _largest(-rewards_PG).neg()
    unit_P1 = _unit(_largest(rewards_PG.abs()))
    scaled_PG = rewards_PG / unit_P1
    count_P1 = mask_PG.sum(1, keepdim=True)
    mean_P1 = scaled_PG.nansum(1, keepdim=True) / count_P1
    centered_PG = scaled_PG - mean_P1
    if scale_rewards == "group":
        variance_P1 = centered_PG.square().nansum(1, keepdim=True) / (count_P1 - 1)
        advantages_PG = centered_PG / (variance_P1.sqrt() + STD_EPSILON / unit_P1)
    elif scale_rewards == "batch":
        if batch_rewards is None:
            raise ValueError("scale_rewards='batch' needs batch_rewards, the rewards of the whole generation batch.")
        batch_rewards = batch_rewards[~batch_rewards.isnan()].double()
        unit = _unit(batch_rewards.abs().max()) if len(batch_rewards) else torch.ones(())
        std = (batch_rewards / unit).std()
        advantages_PG = centered_PG * (unit_P1 / unit) / (std + STD_EPSILON / unit)
    else:
        advantages_PG = centered_PG * unit_P1
    return torch.where(mask_signal_P1 & mask_PG, advantages_PG, 0.0)


def normalized_sums(rewards_PGF: Tensor, weights_F: Tensor) -> Tensor:
    """Compare each reward within its group, then add them up: the first half of GDPO.

        s_i = sum_f weight_f A_if,    A_if as in `group_advantages` of reward f

    Args:
        rewards_PGF: Rewards of shape (P, G, F), any float dtype, NaN where a function gave none.
        weights_F: One weight per reward function.

    Returns:
        Sums of shape (P, G), float64, NaN where no function gave a reward. Their mean over a group is 0.
    """
    compared_PGF = torch.stack([group_advantages(rewards_PG) for rewards_PG in rewards_PGF.unbind(-1)], -1)
    sums_PG = compared_PGF @ weights_F.double()
    return sums_PG.masked_fill(rewards_PGF.isnan().all(-1), torch.nan)


def gdpo_advantages(sums_PG: Tensor, batch_sums: Tensor) -> Tensor:
    """Scale the sums by their deviation over the generation batch: the second half of GDPO.

        A_i = s_i / (std(s) + 1e-4)

    The mean of the sums is 0 in each group. Source: GDPO, arXiv 2601.05242.

    Args:
        sums_PG: Sums of shape (P, G), as `normalized_sums` returns them.
        batch_sums: Those of the whole generation batch on all ranks, any shape.

    Returns:
        Advantages of shape (P, G), float64; 0 for a completion without a reward.
    """
    known = batch_sums.double()[~batch_sums.isnan()]
    std = known.std() if len(known) > 1 else torch.zeros((), dtype=torch.float64)
    return (sums_PG.double() / (std + STD_EPSILON)).nan_to_num(nan=0.0)


def _unit(largest: Tensor) -> Tensor:
    """Return what to divide rewards by so that their squares and sums do not overflow: a power of 2, which rounds nothing.

    1 for rewards up to 2^500 in size, and where there is none (`largest` is -inf).
    """
    return torch.where(largest > LARGEST, 2.0 ** (torch.frexp(largest).exponent.double() - 1), 1.0)


def _largest(rewards_PG: Tensor) -> Tensor:
    """Largest defined value of each row, of shape (P, 1); -inf where a row has none."""
    return rewards_PG.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(1, keepdim=True)
