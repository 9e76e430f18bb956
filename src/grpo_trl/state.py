"""What a run is in the middle of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .policy import Completion


@dataclass(frozen=True)
class Window:
    """This rank's share of the window in use: whole groups, in the order in which micro-steps take them."""

    index: int
    """From the start of the run."""
    completions: Sequence[Completion]
    table: dict[str, list[Any]]
    """What `log_completions` shows of them, by column."""
