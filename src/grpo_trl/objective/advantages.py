"""Rewards to advantages.

Axes: P prompts (groups), G completions per prompt.
"""

import torch
from torch import Tensor


STD_EPSILON = 1e-4
"""Added to the standard deviation that divides; TRL's value."""

SCALES = ("group", "batch", "none")


def group_advantages(rewards_PG: Tensor, scale_rewards: str = "group", window_rewards: Tensor | None = None) -> Tensor:
    """How much better each completion is than its group.

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)

    The mean and the sample standard deviation run over the completions of the group that have a reward. A is exactly 0
    for a completion without one, and for the whole group where the largest and the smallest reward are equal or fewer
    than two completions have one: rounding in the mean must not become a signal.

    Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2 (outcome supervision).

    Args:
        rewards_PG: Rewards of shape (P, G), any float dtype, NaN where a completion has no reward.
        scale_rewards: What divides: `"group"`, the standard deviation of the group; `"batch"`, that of
            `window_rewards`; `"none"`, nothing.
        window_rewards: Rewards of the whole window on all ranks, any shape, NaN where undefined. Read for
            `scale_rewards="batch"` only.

    Returns:
        Advantages of shape (P, G), float64. An empty input gives an empty result.

    Raises:
        ValueError: `scale_rewards` is not one of the three, or `"batch"` came without `window_rewards`.
    """
    if scale_rewards not in SCALES:
        raise ValueError(f"scale_rewards={scale_rewards!r} is unknown; use one of {', '.join(map(repr, SCALES))}.")
    rewards_PG = rewards_PG.double()
    defined_PG = ~rewards_PG.isnan()
    count_P1 = defined_PG.sum(1, keepdim=True)
    mean_P1 = rewards_PG.nansum(1, keepdim=True) / count_P1
    centred_PG = rewards_PG - mean_P1
    if scale_rewards == "group":
        variance_P1 = centred_PG.square().nansum(1, keepdim=True) / (count_P1 - 1)
        centred_PG = centred_PG / (variance_P1.sqrt() + STD_EPSILON)
    elif scale_rewards == "batch":
        if window_rewards is None:
            raise ValueError("scale_rewards='batch' needs window_rewards, the rewards of the whole window.")
        window_rewards = window_rewards.double()
        centred_PG = centred_PG / (window_rewards[~window_rewards.isnan()].std() + STD_EPSILON)
    informative_P1 = _largest(rewards_PG) > _largest(-rewards_PG).neg()
    return torch.where(informative_P1 & defined_PG, centred_PG, 0.0)


def _largest(rewards_PG: Tensor) -> Tensor:
    """Largest defined value of each row, of shape (P, 1); -inf where a row has none."""
    return rewards_PG.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(1, keepdim=True)
