"""The loss of GRPO at both published levels.

Axes: B completions, T completion tokens, U units. A unit is what one importance ratio belongs to: a token
(`loss_level="token"`, U = T) or a whole completion (`loss_level="sequence"`, U = 1). The two levels differ in nothing
but their units and in the weight that a unit has within its completion.

Left out on purpose: every division by a number of completions. The loss is a sum; the caller divides by the count of
the whole optimizer step, so that no cut of the step into pieces changes the gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


EXP_LIMIT = 20.0
"""Log-ratio above which exp is continued by its tangent."""


@dataclass(frozen=True)
class LossOutput:
    """What one call of `grpo_loss` gives.

    `loss` is a scalar with a gradient; all else is detached. Where `counts_BU` is False, the unit's other values are 0.
    """

    loss: Tensor
    """Minus the sum over completions of the objective's bracket; shape ()."""
    counts_BU: Tensor
    """Whether the unit takes part; bool."""
    kl_BU: Tensor | None
    """Estimated KL divergence to the reference, nats; None without a reference."""
    clipped_low_BU: Tensor
    """Ratio below 1 - epsilon with a negative advantage: no gradient; bool."""
    clipped_high_BU: Tensor
    """Ratio above 1 + epsilon_high with a positive advantage: no gradient; bool."""
    tail_BU: Tensor
    """Some log-ratio of the unit lies above 20, where exp is continued by its tangent; bool."""
    signal_B: Tensor
    """Size of the policy gradient that the completion contributes, taken with respect to log-probabilities:
    sum_u weight_u w_u |A| over the units that are not clipped."""


def exp_tangent(x: Tensor) -> Tensor:
    """exp(x), continued by its tangent above 20.

        x <= 20:  e^x            x > 20:  e^20 (1 + x - 20)

    Value and slope are continuous and the result is convex, finite in float32 for x up to 1e29. A clamp would have slope
    0 there and turn the gradient of exp(R) - R - 1 round.

    Args:
        x: Log-ratios (nats), any shape, floating.

    Returns:
        A tensor like `x`.
    """
    tangent = math.exp(EXP_LIMIT) * (1 + x - EXP_LIMIT)
    return torch.where(x > EXP_LIMIT, tangent, torch.exp(x.clamp(max=EXP_LIMIT)))


def _token_units(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, values_BT, 0.0)


def _token_weights(mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    return mask_BT.to(dtype) / mask_BT.sum(1, keepdim=True).clamp(min=1)


def _sequence_units(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, values_BT, 0.0).sum(1, keepdim=True)


def _sequence_weights(mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    return mask_BT.any(1, keepdim=True).to(dtype)


LOSS_LEVELS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, torch.dtype], Tensor]]] = {
    "token": (_token_units, _token_weights),
    "sequence": (_sequence_units, _sequence_weights),
}
"""`loss_level` -> (log-ratios of tokens to those of units, weight of each unit in its completion)."""


def grpo_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    loss_level: str,
    epsilon: float,
    epsilon_high: float,
    beta: float = 0.0,
    ref_logps_BT: Tensor | None = None,
) -> LossOutput:
    """Minus the clipped objective, summed over completions.

    `loss_level="token"`, with d_it = logp_it - old_it, w_it = e^d_it, r_it = ref_it - logp_it, k_it = e^r_it - r_it - 1:

        sum_i  1/|o_i|  sum_t [ min(w_it A_i, clip(w_it, 1-eps_low, 1+eps_high) A_i) - beta k_it ]

    `loss_level="sequence"`, with D_i = sum_t d_it, W_i = e^D_i, R_i = sum_t r_it, K_i = e^R_i - R_i - 1:

        sum_i  [ min(W_i A_i, clip(W_i, 1-eps_low, 1+eps_high) A_i) - beta K_i ]

    exp is continued by its tangent above 20 (`exp_tangent`), so that loss and gradient with respect to `logps_BT` stay
    finite for log-ratios of a completion up to 1e6 in size.

    Source: token: DeepSeekMath, arXiv 2402.03300, Eq. (3) and (4). sequence: DeepSeek-V2, arXiv 2405.04434, section 4.2,
    and DeepSeek-V3, arXiv 2412.19437, section 5.2.2.

    Args:
        logps_BT: Log-probabilities (nats) of the completion's tokens under the policy, of shape (B, T), float32 or
            float64, with gradient.
        old_logps_BT: The same under the policy that sampled; `logps_BT.detach()` on policy.
        advantages_B: Advantages of shape (B,), cast to the dtype of `logps_BT`.
        mask_BT: True for tokens that count, of shape (B, T), bool. A completion with none contributes 0. What stands in
            the other tensors where it is False is never read, be it NaN.
        loss_level: `"token"` or `"sequence"`.
        epsilon: Clip range below 1.
        epsilon_high: Clip range above 1.
        beta: Weight of the KL term.
        ref_logps_BT: Log-probabilities under the reference, of shape (B, T); required if `beta` is not 0.

    Returns:
        The sum (not divided by B), and detached tensors that explain it.

    Raises:
        ValueError: `loss_level` is unknown, or `beta` is not 0 and `ref_logps_BT` is missing.
    """
    if loss_level not in LOSS_LEVELS:
        raise ValueError(f"loss_level={loss_level!r} is unknown; use {' or '.join(map(repr, LOSS_LEVELS))}.")
    if beta and ref_logps_BT is None:
        raise ValueError(f"beta={beta} needs ref_logps_BT, the reference's log-probabilities.")
    to_units, to_weights = LOSS_LEVELS[loss_level]
    weights_BU = to_weights(mask_BT, logps_BT.dtype)
    counts_BU = weights_BU > 0
    advantages_B1 = advantages_B.to(logps_BT.dtype).unsqueeze(1)

    log_ratio_BU = to_units(logps_BT - old_logps_BT, mask_BT)
    ratio_BU = exp_tangent(log_ratio_BU)
    clipped_ratio_BU = ratio_BU.clamp(1 - epsilon, 1 + epsilon_high)
    objective_BU = torch.minimum(ratio_BU * advantages_B1, clipped_ratio_BU * advantages_B1)

    kl_BU = None
    tail_BU = log_ratio_BU > EXP_LIMIT
    if ref_logps_BT is not None:
        ref_log_ratio_BU = to_units(ref_logps_BT - logps_BT, mask_BT)
        kl_BU = exp_tangent(ref_log_ratio_BU) - ref_log_ratio_BU - 1
        tail_BU = tail_BU | (ref_log_ratio_BU > EXP_LIMIT)
        objective_BU = objective_BU - beta * kl_BU
        kl_BU = kl_BU.detach()

    clipped_low_BU = counts_BU & (ratio_BU < 1 - epsilon) & (advantages_B1 < 0)
    clipped_high_BU = counts_BU & (ratio_BU > 1 + epsilon_high) & (advantages_B1 > 0)
    signal_BU = weights_BU * ratio_BU.detach() * advantages_B1.abs()
    return LossOutput(
        loss=-(weights_BU * objective_BU).sum(),
        counts_BU=counts_BU,
        kl_BU=kl_BU,
        clipped_low_BU=clipped_low_BU,
        clipped_high_BU=clipped_high_BU,
        tail_BU=tail_BU,
        signal_B=signal_BU.masked_fill(clipped_low_BU | clipped_high_BU, 0.0).sum(1),
    )
