"""What a reward function returned: one number per completion, or what is wrong with it.

A worker imports this module, which therefore imports neither torch nor transformers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

from .batch import RewardLogs


@dataclass(frozen=True)
class RewardResult:
    """Result of one call."""

    values: list[float]
    """One per completion of the call: a finite number, or NaN where it returned None or something that is no reward."""
    wrong: dict[int, str]
    """What is wrong with the values that are no reward, by their index in the call."""
    logs: RewardLogs
    mistake: str = ""
    """What is wrong with the result as a whole, so that it has no values: the function has to be corrected."""

    @classmethod
    def of(cls, returned: Any, count: int, logs: RewardLogs, name: str) -> "RewardResult":
        """Read what the function `name` returned and logged for `count` completions."""
        values, mistake = _values(returned, count)
        if mistake := mistake or logs.mistake(count):
            return cls([], {}, RewardLogs(), f"The reward function {name!r} {mistake}.")
        numbers = [_number(value) for value in values]
        wrong = {
            i: f"returned {repr(values[i])[:200]} ({type(values[i]).__name__}); it must return a finite number, or None "
            "where it does not apply"
            for i, number in enumerate(numbers)
            if number is None
        }
        return cls([math.nan if number is None else number for number in numbers], wrong, logs)


def _values(returned: Any, count: int) -> tuple[Sequence[Any], str]:
    """Return the values that a function returned for `count` completions, and what is wrong with them as a whole."""
    shape = tuple(getattr(returned, "shape", ()))
    if len(shape) > 1 and (shape[0] != count or math.prod(shape) != count):
        return [], f"returned an array of shape {shape} for {count} completions; its shape must be ({count},)"
    try:
        values = _as_list(returned, len(shape))
    except Exception as error:  # a tensor without data, an array that is no array
        return [], f"returned a {type(returned).__name__} that cannot be read ({type(error).__name__}: {error})"
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, bytearray)):
        return [], (
            f"returned {type(returned).__name__}; it must return a list with one number, or None, per completion"
        )
    if len(values) != count:
        return [], (
            f"returned {len(values)} values for {count} completions; it must return one number, or None, per completion"
        )
    if all(isinstance(value, (list, tuple)) and len(value) == 1 for value in values):  # an array (n, 1) as lists
        values = [value for [value] in values]
    return values, ""


def _as_list(returned: Any, dimensions: int) -> Any:
    """Return the values of an array, tensor, series or frame as a list; anything else as it is."""
    if dimensions > 1 and not hasattr(returned, "tolist"):  # a frame
        returned = returned.to_numpy()
    if getattr(returned, "is_sparse", False):
        returned = returned.to_dense()
    if not hasattr(returned, "tolist"):
        return returned
    return (returned.reshape(-1) if dimensions > 1 else returned).tolist()


def _number(value: Any) -> float | None:
    """Return the float that a returned value stands for, NaN for None; None if it is no reward."""
    if value is None:
        return math.nan
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        value = value.item()
    if not isinstance(value, (Real, Decimal)):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an integer larger than any float; a signaling NaN
        return None
    return number if math.isfinite(number) else None
