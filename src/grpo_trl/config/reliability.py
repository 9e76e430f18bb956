"""Options of the guards that stop a run or warn of it."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ReliabilityOptions:
    """Guards."""

    max_nonfinite_steps: int = field(
        default=5,
        metadata={
            "help": "Save and stop after so many optimizer steps in a row whose loss or gradient is not finite; such "
            "steps change no weights."
        },
    )
    dead_run_patience: int | None = field(
        default=20,
        metadata={
            "help": "So many generation batches in a row in which no group has rewards that differ, or every "
            "completion is cut off, "
            "are a dead run. None: never."
        },
    )
    on_dead_run: Literal["warn", "stop"] = field(
        default="warn",
        metadata={
            "help": "Say that a run is dead ('warn'), or save and stop ('stop').",
        },
    )
    phase_warning_seconds: float | None = field(
        default=600, metadata={"help": "Say which phase, of which rank, takes longer than this. None: never."}
    )
