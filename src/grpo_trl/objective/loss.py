"""The loss of GRPO: ratio, surrogate, KL and aggregation put together.

Axes: B completions, T completion tokens, U units of the ratio, K units of the KL term (each T or 1; see `ratios.py`).

The loss is a sum over completions. The caller divides it by `objective.aggregation.divisor(counts)`, one number for the
whole mini-batch, so that no cut into micro-batches changes the gradient.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .ratios import EXP_LIMIT, exp_tangent, unit_mask
from .recipes import Objective
from .surrogates import Clipped


LEAST_LOG_WEIGHT = math.log(1e-8)
"""Of a correction that multiplies the ratio, where its weight is 0."""


@dataclass(frozen=True)
class KLOutput:
    """The KL term, detached."""

    mask_BK: Tensor
    """True for units that count."""
    kl_BK: Tensor
    """Estimated KL divergence to the reference (nats), without the ratio; 0 outside the mask."""
    tail_BK: Tensor
    """The log-ratio of the reference to the policy lies above 20."""


@dataclass(frozen=True)
class LossOutput:
    """What one call of `grpo_loss` returns: `loss`, a scalar with a gradient, and detached tensors that explain it."""

    loss: Tensor
    """Minus the weighted sum of the objective's terms; shape ()."""
    mask_BU: Tensor
    """True for units of the ratio that count."""
    tail_BU: Tensor
    """The log-ratio lies above 20, where exp is continued by its tangent."""
    clipped: Clipped | None
    """What the surrogate clips; False outside the mask. None where it has no clip range."""
    means: Mapping[str, Tensor]
    """Further values per unit of which the mean is a metric, by the metric's name."""
    signal_B: Tensor
    """Size of the policy gradient that the completion contributes: the mean over its tokens of
    |derivative of the surrogate with respect to the log-ratio|, 0 where the ratio is clipped or the term is dropped."""
    kl: KLOutput | None
    """None without a reference."""
    entropy: Tensor
    """Sum of the entropies (nats) of the tokens that the entropy bonus acts on; 0 if none were given. Shape ()."""


def grpo_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages_BU: Tensor,
    mask_BT: Tensor,
    *,
    objective: Objective,
    ref_logps_BT: Tensor | None = None,
    sampler_logps_BT: Tensor | None = None,
    mask_policy_BT: Tensor | None = None,
    entropy_BT: Tensor | None = None,
    entropy_weight: float = 0.0,
    correction_BT: Tensor | None = None,
) -> LossOutput:
    """Compute minus the objective, summed over completions.

    `loss_level="token"`, with d_it = logp_it - old_it, w_it = e^d_it, r_it = ref_it - logp_it, k_it = e^r_it - r_it - 1:

        sum_i  1/|o_i|  sum_t [ min(w_it A_i, clip(w_it, 1-eps_low, 1+eps_high) A_i) - beta k_it ]

    `loss_level="sequence"`, with D_i = sum_t d_it, W_i = e^D_i, R_i = sum_t r_it, K_i = e^R_i - R_i - 1:

        sum_i  [ min(W_i A_i, clip(W_i, 1-eps_low, 1+eps_high) A_i) - beta K_i ]

    In general, with what `objective` chooses, c_it the weight of a token and S the surrogate, plus the entropy bonus:

        sum_i  sum_t [ c_it (S(w_it, A_it) - beta k_it) + entropy_weight H_it ]

    exp is continued by its tangent above 20 (`exp_tangent`), so that loss and gradient with respect to `logps_BT` stay
    finite for log-ratios of a completion up to 1e6 in size.

    Source: token: DeepSeekMath, arXiv 2402.03300, Eq. (3) and (4). sequence: DeepSeek-V2, arXiv 2405.04434, section 4.2,
    and DeepSeek-V3, arXiv 2412.19437, section 5.2.2. The others: `recipes.LOSS_TYPES`.

    Args:
        logps_BT: Logprobs (nats) of the completion's tokens under the policy, of shape (B, T), float32 or float64, with
            gradient.
        old_logps_BT: The same under the policy that sampled; `logps_BT.detach()` on policy.
        advantages_BU: Advantages of shape (B, 1), or (B, T) where each token has its own; cast to the dtype of `logps_BT`.
        mask_BT: True for tokens that count, of shape (B, T), bool. A completion with none contributes 0. Values of the
            other tensors where it is False are never read, be they NaN.
        objective: The choices; see `make_objective`.
        ref_logps_BT: Logprobs under the reference, of shape (B, T); required if `objective.beta` is not 0.
        sampler_logps_BT: Logprobs of the sampler, of shape (B, T), NaN where unknown; read for
            `off_policy_mask_threshold` only, which compares with the old policy without them.
        mask_policy_BT: True for tokens with a policy term and an entropy term (`top_entropy_quantile`); all by default.
        entropy_BT: Entropies (nats) of the policy, of shape (B, T), with gradient; required if `entropy_weight` is not 0.
        entropy_weight: Weight of a token's entropy in the sum.
        correction_BT: Weights of old policy over sampler (see `Correction`), of shape (B, T), without gradient; all 1 by
            default. They multiply the policy term, or the ratio where `objective.corrects_ratio`.

    Returns:
        The sum, which the caller divides by `objective.aggregation.divisor(counts)`, and detached tensors that explain it.

    Raises:
        ValueError: `objective.beta` is not 0 and `ref_logps_BT` is missing.
    """
    if objective.beta and ref_logps_BT is None:
        raise ValueError(f"beta={objective.beta} needs ref_logps_BT, the reference's logprobs.")
    weights_BT = objective.aggregation.weights(mask_BT, logps_BT.dtype)
    advantages_BU = torch.where(unit_mask(advantages_BU, mask_BT), advantages_BU, 0.0).to(logps_BT.dtype)

    log_ratio_BU = objective.ratio(logps_BT - old_logps_BT, mask_BT)
    corrected_BU = log_ratio_BU
    if correction_BT is not None and objective.corrects_ratio:
        corrected_BU = log_ratio_BU + torch.where(mask_BT, correction_BT.log().clamp(min=LEAST_LOG_WEIGHT), 0.0)
        correction_BT = None
    terms = objective.surrogate(corrected_BU, advantages_BU, torch.where(mask_BT, logps_BT, 0.0))
    effective_BT = mask_BT if mask_policy_BT is None else mask_BT & mask_policy_BT
    kept_BT = effective_BT & _near_policy(logps_BT, old_logps_BT, sampler_logps_BT, advantages_BU, mask_BT, objective)
    scale_BT = kept_BT if correction_BT is None else kept_BT * correction_BT
    loss = -(weights_BT * scale_BT * terms.objective_BU).sum()

    kl = None
    if ref_logps_BT is not None:
        kl_BK, kl = _kl(ref_logps_BT - logps_BT, log_ratio_BU, mask_BT, objective)
        loss = loss + objective.beta * (weights_BT * kl_BK).sum()
    entropy = loss.new_zeros(()) if entropy_BT is None else torch.where(effective_BT, entropy_BT, 0.0).sum()
    if entropy_weight:
        loss = loss - entropy_weight * entropy

    mask_BU = unit_mask(terms.slope_BU, mask_BT)
    return LossOutput(
        loss=loss,
        mask_BU=mask_BU,
        tail_BU=log_ratio_BU > EXP_LIMIT,
        clipped=None if terms.clipped is None else Clipped(*(side_BU & mask_BU for side_BU in terms.clipped)),
        means=terms.means,
        signal_B=(scale_BT * terms.slope_BU).sum(1) / mask_BT.sum(1).clamp(min=1),
        kl=kl,
        entropy=entropy.detach(),
    )


def _near_policy(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    sampler_logps_BT: Tensor | None,
    advantages_BU: Tensor,
    mask_BT: Tensor,
    objective: Objective,
) -> Tensor:
    """Mask of what `off_policy_mask_threshold` keeps, of shape (B, 1) or (B, T).

        A >= 0  or  mean_t (sampler_it - logp_it) <= threshold

    Source: DeepSeek-V3.2, arXiv 2512.02556, Eq. (9).
    """
    if objective.off_policy_threshold is None:
        return mask_BT
    behind_BT = old_logps_BT if sampler_logps_BT is None else sampler_logps_BT
    gap_B1 = policy_gap(logps_BT, behind_BT, mask_BT)
    return (advantages_BU >= 0) | (gap_B1 <= objective.off_policy_threshold)


def policy_gap(logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Estimate, for each completion, the KL divergence of its sampler to the policy per token, of shape (B, 1).

        mean_t (sampler_it - logp_it)

    A token whose sampler is unknown (NaN) counts as equal; without tokens in the mask it is 0.
    """
    gap_BT = torch.where(mask_BT, sampler_logps_BT - logps_BT.detach(), 0.0).nan_to_num(nan=0.0)
    return gap_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)


def _kl(
    ref_log_ratio_BT: Tensor, log_ratio_BU: Tensor, mask_BT: Tensor, objective: Objective
) -> tuple[Tensor, KLOutput]:
    """Estimate the KL divergence, times the ratio if `kl_times_ratio`, and collect what explains it."""
    ref_log_ratio_BK = objective.kl_units(ref_log_ratio_BT, mask_BT)
    kl_BK = objective.kl_estimator(ref_log_ratio_BK)
    output = KLOutput(unit_mask(kl_BK, mask_BT), kl_BK.detach(), ref_log_ratio_BK > EXP_LIMIT)
    return kl_BK * exp_tangent(log_ratio_BU) if objective.kl_times_ratio else kl_BK, output
