"""The published objectives, as choices of four things that do not know of each other."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .aggregation import PER_COMPLETION, Aggregation
from .ratios import RATIOS
from .surrogates import Clip, Surrogate


@dataclass(frozen=True)
class Recipe:
    """What a paper chooses."""

    ratio: str
    """A key of `RATIOS`."""
    surrogate: Callable[..., Surrogate]
    kl_units: str
    """A key of `RATIOS`: what one KL estimate belongs to."""
    aggregation: Aggregation
    papers: tuple[str, ...]
    """Numbers on arXiv."""


LOSS_LEVELS = {
    "token": Recipe("token", Clip, "token", PER_COMPLETION, ("2402.03300",)),
    "sequence": Recipe("sequence", Clip, "sequence", PER_COMPLETION, ("2405.04434", "2412.19437")),
}
"""`loss_level` -> DeepSeekMath's objective, Eq. (3) and (4); DeepSeek-V2's, section 4.2, and V3's, section 5.2.2."""


@dataclass(frozen=True)
class Objective:
    """A recipe with its numbers."""

    ratio: Callable[[Tensor, Tensor], Tensor]
    """See `RATIOS`."""
    surrogate: Surrogate
    kl_units: Callable[[Tensor, Tensor], Tensor]
    """See `RATIOS`."""
    beta: float
    """Weight of the KL term."""
    aggregation: Aggregation


def make_objective(
    loss_level: str, *, epsilon: float, epsilon_high: float | None = None, beta: float = 0.0
) -> Objective:
    """Build the objective that the options name.

    Raises:
        ValueError: `loss_level` is unknown.
    """
    if loss_level not in LOSS_LEVELS:
        raise ValueError(f"loss_level={loss_level!r} is unknown; use {' or '.join(map(repr, LOSS_LEVELS))}.")
    recipe = LOSS_LEVELS[loss_level]
    return Objective(
        ratio=RATIOS[recipe.ratio],
        surrogate=recipe.surrogate(epsilon=epsilon, epsilon_high=epsilon if epsilon_high is None else epsilon_high),
        kl_units=RATIOS[recipe.kl_units],
        beta=beta,
        aggregation=recipe.aggregation,
    )
