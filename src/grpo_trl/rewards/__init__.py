"""Reward functions and models: how they are called, and how their values become one reward.

Names are imported when they are used, so that a worker process that calls one function loads neither torch nor the rest.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .batch import RewardBatch, RewardLogs
    from .failures import RewardError
    from .library.answers import MathAnswer, gsm8k_answer, math_answer
    from .library.format import format_tags, json_schema, length_penalty, repetition_penalty
    from .library.python_tests import python_tests
    from .rewards import Rewards, RewardTable

__all__ = [
    "MathAnswer",
    "RewardBatch",
    "RewardError",
    "RewardLogs",
    "RewardTable",
    "Rewards",
    "format_tags",
    "gsm8k_answer",
    "json_schema",
    "length_penalty",
    "math_answer",
    "python_tests",
    "repetition_penalty",
]

_MODULES = {
    "library.answers": ("MathAnswer", "gsm8k_answer", "math_answer"),
    "batch": ("RewardBatch", "RewardLogs"),
    "failures": ("RewardError",),
    "library.format": ("format_tags", "json_schema", "length_penalty", "repetition_penalty"),
    "library.python_tests": ("python_tests",),
    "rewards": ("RewardTable", "Rewards"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
