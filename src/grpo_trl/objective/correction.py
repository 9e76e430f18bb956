"""Correction for a sampler that is not the old policy: another engine, or a distribution that top-p and the like truncate.

Axes: B completions, T completion tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .ratios import EXP_LIMIT, sequence, token


CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True)
class Correction:
    """Computes the importance weights of the old policy over the sampling distribution.

        d_it = old_it - drawn_it
        token:     v_it = exp(d_it)              sequence:  v_i = exp(sum_t d_it)
        truncate:  v <- clip(v, clip_min, clip_max)
        mask:      v <- v where clip_min <= v <= clip_max, 0 elsewhere

    With q the distribution that tokens were drawn from, E_q[v f] is the old policy's expectation of f over what q can
    draw. What q cannot draw, e.g. the tokens outside of top-p's nucleus, no weight can bring back.

    Source: truncated weights: Ionides, "Truncated Importance Sampling", 2008. Names and bounds are TRL's.
    """

    mode: CorrectionMode = "sequence_mask"
    clip_max: float | None = 3.0
    clip_min: float | None = None

    def weights(self, old_logps_BT: Tensor, drawn_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Weigh each token's term of the policy gradient.

        Args:
            old_logps_BT: Logprobs (nats) under the old policy, of shape (B, T), float32 or float64.
            drawn_logps_BT: Logprobs of the distribution that each token was drawn from; NaN where it is not known.
            mask_BT: True for tokens that count, bool. Values elsewhere are never read.

        Returns:
            Weights of shape (B, T), detached; 0 outside the mask and where `drawn_logps_BT` is NaN, which the product over
            a sequence leaves out.
        """
        known_BT = mask_BT & ~drawn_logps_BT.isnan()
        units = token if self.mode.startswith("token") else sequence
        log_weight_BU = units((old_logps_BT - drawn_logps_BT).detach(), known_BT)
        weight_BU = torch.exp(log_weight_BU.clamp(max=EXP_LIMIT))
        low = 0.0 if self.clip_min is None else self.clip_min
        high = float("inf") if self.clip_max is None else self.clip_max
        if self.mode.endswith("truncate"):
            weight_BU = weight_BU.clamp(low, high)
        else:
            weight_BU = weight_BU.masked_fill((weight_BU < low) | (weight_BU > high), 0.0)
        return torch.where(known_BT, weight_BU, 0.0)
