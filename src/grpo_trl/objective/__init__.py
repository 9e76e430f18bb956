"""The objective of GRPO as pure functions of tensors. Imports torch only."""

from .advantages import group_advantages
from .aggregation import Counts
from .loss import LossOutput, grpo_loss
from .recipes import LOSS_LEVELS, Objective, make_objective


__all__ = ["LOSS_LEVELS", "Counts", "LossOutput", "Objective", "group_advantages", "grpo_loss", "make_objective"]
