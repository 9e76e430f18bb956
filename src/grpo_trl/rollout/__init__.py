"""How completions are written: one protocol, its engines, and the round that rewards what they write."""

from .base import Rollout, RolloutEngine, RolloutRequest, SamplingOptions
from .custom import RolloutFuncEngine
from .generate import GenerateEngine
from .group import GroupEngine
from .round import Round, RoundRunner, reward_columns


__all__ = [
    "GenerateEngine",
    "GroupEngine",
    "Rollout",
    "RolloutEngine",
    "RolloutFuncEngine",
    "RolloutRequest",
    "Round",
    "RoundRunner",
    "SamplingOptions",
    "reward_columns",
]
