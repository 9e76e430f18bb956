"""What options of entropy need beside the loss: a threshold over a mini-batch, and a coefficient that is steered.

Axes: N tokens of a mini-batch.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor

from .options import ObjectiveOptions


def entropy_threshold(entropy_N: Tensor, share: float) -> float:
    """Find the entropy at or above which the `share` of tokens of highest entropy lies, between tokens linearly.

    Source: "Beyond the 80/20 Rule", arXiv 2506.01939, Eq. (6).

    Args:
        entropy_N: Entropies (nats) of all trained tokens of a mini-batch on all ranks, of shape (N,).
        share: Of the tokens, from 0 (the highest alone) to 1.

    Returns:
        The threshold (nats); infinity for no tokens.
    """
    if not len(entropy_N):
        return math.inf
    place = round((1 - share) * (len(entropy_N) - 1), 6)  # 1 - 0.9 is a little more than 0.1
    below = math.floor(place)
    low, high = (entropy_N.kthvalue(min(k, len(entropy_N))).values.item() for k in (below + 1, below + 2))
    return low + (place - below) * (high - low)


@dataclass
class EntropyCoefficient:
    """The weight of the entropy bonus: constant, or steered towards a target once per optimizer step.

        coef <- clip(coef + delta if H <= target else coef - delta, min, max);    applied where H <= target

    H is the mean entropy per token of the step before. Source: Skywork-OR1, arXiv 2505.22312, section 4.
    """

    options: ObjectiveOptions
    coef: float = field(init=False)
    last_entropy: float = field(default=math.inf, init=False)
    """Mean entropy per token (nats) of the last optimizer step; infinite before the first, which has no bonus."""

    def __post_init__(self) -> None:
        self.coef = self.options.entropy_coef

    @property
    def applied(self) -> float:
        """The coefficient of the next optimizer step."""
        adaptive = self.options.use_adaptive_entropy
        return 0.0 if adaptive and self.last_entropy > self.options.entropy_target else self.coef

    def update(self, entropy: float) -> None:
        """Take in the mean entropy per token (nats) of the optimizer step that ends, over all ranks."""
        options = self.options
        if not options.use_adaptive_entropy:
            return
        self.last_entropy = entropy
        step = options.entropy_coef_delta if entropy <= options.entropy_target else -options.entropy_coef_delta
        self.coef = min(max(self.coef + step, options.entropy_coef_min), options.entropy_coef_max)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run continues with."""
        return {"coef": self.coef, "last_entropy": self.last_entropy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef, self.last_entropy = state["coef"], state["last_entropy"]
