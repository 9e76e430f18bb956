"""What a run is in the middle of, and the seeds that need not be carried because they are derived."""

import hashlib
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


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that follows from `parts` alone, on every platform and in every process.

    >>> derive_seed(0, "prompts", 1) == derive_seed(0, "prompts", 1) != derive_seed(0, "prompts", 2)
    True
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
