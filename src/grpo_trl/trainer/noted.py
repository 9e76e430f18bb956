"""Metrics that subclasses, callbacks and reward functions written for TRL's trainer add to its log."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from ..metrics import Mean, MetricLog


class NotedMetrics:
    """Values by name, whose means are in the next log: `noted[name].append(value)`."""

    def __init__(self, log: MetricLog):
        self._log = log

    def __getitem__(self, name: str) -> "NotedValues":
        return NotedValues(self._log, name)


class NotedValues:
    """The values of one name; they can be added to, and not read."""

    def __init__(self, log: MetricLog, name: str):
        self._log = log
        self._name = name

    def append(self, value: Any) -> None:
        """Add a number, or a tensor of one."""
        self._log.add(self._name, Mean(float(value)))

    def extend(self, values: Iterable[Any]) -> None:
        """Add several."""
        for value in values:
            self.append(value)


def reduce_noted(log: MetricLog, gather: Callable[[list[Any]], list[Any]], known: Collection[str]) -> dict[str, float]:
    """Return the means over all ranks of what was noted since the last time.

    Raises:
        ValueError: A name is one of those `known`, which the log has already.
    """
    means = log.reduce(gather)
    for name in means:
        if name in known:
            raise ValueError(f"_metrics[...][{name!r}] is a metric that the log has; choose another name.")
    return means
