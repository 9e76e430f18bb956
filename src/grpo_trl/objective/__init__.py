"""The objective of GRPO as pure functions of tensors. Imports torch only."""

from .advantages import group_advantages
from .loss import LOSS_LEVELS, LossOutput, grpo_loss


__all__ = ["LOSS_LEVELS", "LossOutput", "group_advantages", "grpo_loss"]
