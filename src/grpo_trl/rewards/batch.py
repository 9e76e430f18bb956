"""What a reward function is given and what it logs: copies of a batch of completions, columns and metrics.

A worker imports this module, which therefore imports neither torch nor transformers.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


_TOO_DEEP = "<nested too deeply>"
"""Shown in place of a value that no table can hold."""
OWN_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments that every reward function can take; a column never hides one of them."""


@dataclass
class RewardLogs:
    """Columns of the completions table and values for metrics that reward functions log."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    mistakes: list[str] = field(default_factory=list)
    """Calls that log nothing that could be shown."""

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column to the completions table; one value per completion of the call."""
        if isinstance(values, Iterable):
            self.columns[column].extend(_copy(value) if _is_shallow(value) else _TOO_DEEP for value in values)
        else:
            self.mistakes.append(f"calls log_extra({column!r}, {_brief(values)}); give a list with one value each")

    def log_metric(self, name: str, value: float) -> None:
        """Log a number; it is averaged over calls and ranks until the next log."""
        try:
            self.metrics[name].append(float(value))
        except (TypeError, ValueError, OverflowError):
            self.mistakes.append(f"calls log_metric({name!r}, {_brief(value)}); give a number")

    def add(self, other: "RewardLogs") -> None:
        """Append the logs of another function."""
        for column, values in other.columns.items():
            self.columns[column].extend(values)
        for name, numbers in other.metrics.items():
            self.metrics[name].extend(numbers)

    def mistake(self, count: int) -> str:
        """Describe what is wrong with the logs of a call on `count` completions; empty where nothing is."""
        if self.mistakes:
            return self.mistakes[0]
        for function, names in (("log_extra", self.columns), ("log_metric", self.metrics)):
            for name in names:
                if not isinstance(name, str):
                    return f"calls {function}({name!r}, ...); the name must be a string"
        for column, values in self.columns.items():
            if len(values) != count:
                return (
                    f"calls log_extra({column!r}, ...) with {len(values)} values for {count} completions; give one each"
                )
        return ""


@dataclass(frozen=True)
class RewardBatch:
    """Arguments of reward functions, one entry per completion: prompts and completions as text (or lists of messages),
    token ids, and the dataset's other columns. The completions of a group follow each other."""

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    trainer_state: Any = None
    num_generations: int = 1

    def arguments(self, names: Collection[str] | None, logs: RewardLogs) -> dict[str, Any]:
        """Return a function's keyword arguments, those in `names` (all if None), as copies that are its own.

        Each completion has its own copy, also where a group shares an object. Only what cannot be copied is shared.
        """
        arguments = self.columns | {
            "prompts": self.prompts,
            "completions": self.completions,
            "completion_ids": self.completion_ids,
            "trainer_state": self.trainer_state,
            "log_extra": logs.log_extra,
            "log_metric": logs.log_metric,
        }
        wanted = arguments.keys() if names is None else arguments.keys() & names
        return {name: _COPIES.get(name, _copy_each)(arguments[name]) for name in arguments if name in wanted}

    def part(self, rows: range) -> "RewardBatch":
        """Return some completions that follow each other."""
        return replace(
            self,
            prompts=self.prompts[rows.start : rows.stop],
            completions=self.completions[rows.start : rows.stop],
            completion_ids=self.completion_ids[rows.start : rows.stop],
            columns={name: values[rows.start : rows.stop] for name, values in self.columns.items()},
        )


def _copy(value: Any) -> Any:
    """Return a copy, or the object itself where it cannot be copied."""
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def _brief(value: Any) -> str:
    return repr(value)[:100]


def _is_shallow(value: Any, levels: int = 20) -> bool:
    """Whether lists and dicts are nested in at most so many `levels`, and none in itself."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in inner)


def _copy_each(values: Any) -> Any:
    return list(map(_copy, values)) if isinstance(values, (list, tuple)) else _copy(values)


def _copy_state(state: Any) -> Any:
    """Copy the trainer's state. Its log, which grows, has entries of numbers, so that copying these is enough."""
    try:
        own = copy.copy(state)
    except Exception:
        return state
    for name, value in getattr(state, "__dict__", {}).items():
        own.__dict__[name] = [dict(entry) for entry in value] if name == "log_history" else _copy(value)
    return own


_COPIES: dict[str, Callable[[Any], Any]] = {
    "completion_ids": lambda rows: [list(ids) for ids in rows],
    "trainer_state": _copy_state,
    "log_extra": lambda function: function,
    "log_metric": lambda function: function,
}
"""Of arguments that are not one object per completion."""
