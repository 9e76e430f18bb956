"""The objective of GRPO as pure functions of tensors. Imports torch only."""

from .advantages import gdpo_advantages, group_advantages, normalized_sums
from .aggregation import Counts
from .entropy import EntropyCoefficient, entropy_threshold
from .loss import LossOutput, grpo_loss
from .options import ObjectiveOptions
from .recipes import Objective, make_objective
from .surrogates import Clipped


__all__ = [
    "Clipped",
    "Counts",
    "EntropyCoefficient",
    "LossOutput",
    "Objective",
    "ObjectiveOptions",
    "entropy_threshold",
    "gdpo_advantages",
    "group_advantages",
    "grpo_loss",
    "make_objective",
    "normalized_sums",
]
