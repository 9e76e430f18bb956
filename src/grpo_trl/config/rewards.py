"""Options of reward functions and their failures."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class RewardOptions:
    """Rewards."""

    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function. Default: all 1."}
    )
    reward_workers: int = field(
        default=0,
        metadata={
            "help": "Processes in which reward functions run, on each rank. 0: they run in the training process."
        },
    )
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that a call of a reward function may take. Needs reward_workers."}
    )
    reward_retries: int = field(
        default=0, metadata={"help": "How many times a failed reward call is retried unchanged."}
    )
    reward_memory_limit: float = field(
        default=4.0, metadata={"help": "GiB of memory that a process of reward_workers may take (on Linux)."}
    )
    on_reward_error: Literal["exclude", "raise"] = field(
        default="exclude",
        metadata={
            "help": "What happens to a completion whose reward call fails: it gets no reward and no advantage "
            "('exclude'), or the run saves and stops ('raise').",
        },
    )
    max_reward_failure_rate: float = field(
        default=0.5,
        metadata={"help": "Save and stop when a reward function fails on more than this share of a generation batch."},
    )
