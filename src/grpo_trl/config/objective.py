"""Options of the objective: advantages, ratio, clipping, KL."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ObjectiveOptions:
    """The objective."""

    loss_level: Literal["token", "sequence"] = field(
        default="token",
        metadata={
            "help": "The published objective: 'token' is DeepSeekMath's (arXiv 2402.03300), a ratio and a KL per token; "
            "'sequence' is that of DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437), a ratio and a KL per completion.",
        },
    )
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL term to the reference. 0: no reference is kept or evaluated."}
    )
    epsilon: float = field(default=0.2, metadata={"help": "The ratio is clipped below 1 - epsilon."})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "The ratio is clipped above 1 + epsilon_high. Default: epsilon."}
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="group",
        metadata={
            "help": "What advantages are divided by: the standard deviation of the 'group', of the 'batch' (the whole "
            "generation batch on all ranks), or nothing ('none').",
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function. Default: all 1."}
    )
