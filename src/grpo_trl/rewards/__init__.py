"""Reward functions and models: what may be passed, how they are called, how their values become one reward."""

from .call import RewardBatch, RewardNotes
from .rewards import Rewards, RewardTable


__all__ = ["RewardBatch", "RewardNotes", "RewardTable", "Rewards"]
