"""The loss of GRPO: ratio, surrogate, KL and aggregation put together.

Axes: B completions, T completion tokens, U units of the ratio, K units of the KL term (each T or 1; see `ratios.py`).

The loss is a sum over completions. The caller divides it by `objective.aggregation.divisor(counts)`, one number for the
whole mini-batch, so that no cut into micro-batches changes the gradient.
"""

from dataclasses import dataclass

from torch import Tensor

from .ratios import EXP_LIMIT, exp_tangent, unit_mask
from .recipes import Objective


@dataclass(frozen=True)
class LossOutput:
    """What one call of `grpo_loss` returns: `loss`, a scalar with a gradient, and detached tensors that explain it."""

    loss: Tensor
    """Minus the weighted sum of the objective's terms; shape ()."""
    mask_BU: Tensor
    """True for units of the ratio that count."""
    clipped_low_BU: Tensor
    """The surrogate clips the ratio from below; False outside the mask."""
    clipped_high_BU: Tensor
    """The surrogate clips the ratio from above; False outside the mask."""
    tail_BU: Tensor
    """The log-ratio lies above 20, where exp is continued by its tangent."""
    signal_B: Tensor
    """Size of the policy gradient that the completion contributes: the mean over its tokens of
    |derivative of the surrogate with respect to the log-ratio|, 0 where the ratio is clipped."""
    kl: "KLOutput | None"
    """None without a reference."""


@dataclass(frozen=True)
class KLOutput:
    """The KL term, detached."""

    mask_BK: Tensor
    """True for units that count."""
    kl_BK: Tensor
    """Estimated KL divergence to the reference (nats), 0 outside the mask."""
    tail_BK: Tensor
    """The log-ratio of the reference to the policy lies above 20."""


def grpo_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    objective: Objective,
    ref_logps_BT: Tensor | None = None,
) -> LossOutput:
    """Compute minus the objective, summed over completions.

    `loss_level="token"`, with d_it = logp_it - old_it, w_it = e^d_it, r_it = ref_it - logp_it, k_it = e^r_it - r_it - 1:

        sum_i  1/|o_i|  sum_t [ min(w_it A_i, clip(w_it, 1-eps_low, 1+eps_high) A_i) - beta k_it ]

    `loss_level="sequence"`, with D_i = sum_t d_it, W_i = e^D_i, R_i = sum_t r_it, K_i = e^R_i - R_i - 1:

        sum_i  [ min(W_i A_i, clip(W_i, 1-eps_low, 1+eps_high) A_i) - beta K_i ]

    exp is continued by its tangent above 20 (`exp_tangent`), so that loss and gradient with respect to `logps_BT` stay
    finite for log-ratios of a completion up to 1e6 in size.

    Source: token: DeepSeekMath, arXiv 2402.03300, Eq. (3) and (4). sequence: DeepSeek-V2, arXiv 2405.04434, section 4.2,
    and DeepSeek-V3, arXiv 2412.19437, section 5.2.2.

    Args:
        logps_BT: Logprobs (nats) of the completion's tokens under the policy, of shape (B, T), float32 or float64, with
            gradient.
        old_logps_BT: The same under the policy that sampled; `logps_BT.detach()` on policy.
        advantages_B: Advantages of shape (B,), cast to the dtype of `logps_BT`.
        mask_BT: True for tokens that count, of shape (B, T), bool. A completion with none contributes 0. Values of the
            other tensors where it is False are never read, be they NaN.
        objective: The choices; see `make_objective`.
        ref_logps_BT: Logprobs under the reference, of shape (B, T); required if `objective.beta` is not 0.

    Returns:
        The sum, which the caller divides by `objective.aggregation.divisor(counts)`, and detached tensors that explain it.

    Raises:
        ValueError: `objective.beta` is not 0 and `ref_logps_BT` is missing.
    """
    if objective.beta and ref_logps_BT is None:
        raise ValueError(f"beta={objective.beta} needs ref_logps_BT, the reference's logprobs.")
    weights_BT = objective.aggregation.weights(mask_BT, logps_BT.dtype)
    advantages_B1 = advantages_B.to(logps_BT.dtype).unsqueeze(1)

    log_ratio_BU = objective.ratio(logps_BT - old_logps_BT, mask_BT)
    mask_BU = unit_mask(log_ratio_BU, mask_BT)
    terms = objective.surrogate(log_ratio_BU, advantages_B1)
    loss = -(weights_BT * terms.objective_BU).sum()

    kl = None
    if ref_logps_BT is not None:
        ref_log_ratio_BK = objective.kl_units(ref_logps_BT - logps_BT, mask_BT)
        kl_BK = exp_tangent(ref_log_ratio_BK) - ref_log_ratio_BK - 1
        loss = loss + objective.beta * (weights_BT * kl_BK).sum()
        kl = KLOutput(unit_mask(kl_BK, mask_BT), kl_BK.detach(), ref_log_ratio_BK > EXP_LIMIT)

    per_token_BT = mask_BT / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return LossOutput(
        loss=loss,
        mask_BU=mask_BU,
        clipped_low_BU=terms.clipped_low_BU & mask_BU,
        clipped_high_BU=terms.clipped_high_BU & mask_BU,
        tail_BU=log_ratio_BU > EXP_LIMIT,
        signal_B=(per_token_BT * terms.slope_BU).sum(1),
        kl=kl,
    )
