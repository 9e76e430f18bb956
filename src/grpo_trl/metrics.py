"""Values that know how to reduce themselves, over the calls between two logs and over ranks.

Metrics of one kind add up with `+` and have a `value`. Tensors stay on their device until the reduction, so that counting
does not wait for the accelerator.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor


if TYPE_CHECKING:
    from typing_extensions import Self


Number = float | Tensor


class Metric(Protocol):
    """One running value."""

    def __add__(self, other: Any) -> Any: ...

    def on_cpu(self) -> Metric:
        """The same with Python numbers in place of tensors."""
        ...

    @property
    def value(self) -> float | None:
        """The reduced value; None where there was nothing to reduce."""
        ...


@dataclass(frozen=True)
class Mean:
    """`total / count`."""

    total: Number
    count: Number = 1.0

    @classmethod
    def of(cls, values: Tensor, mask: Tensor | None = None) -> Mean:
        """Mean of `values` over the places where `mask` (of the same shape) is True; over all of them without one."""
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        return cls(_wide(torch.where(mask, values.detach(), 0)).sum(), mask.sum())

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def on_cpu(self) -> Mean:
        return Mean(float(self.total), float(self.count))

    @property
    def value(self) -> float | None:
        return float(self.total / self.count) if self.count else None


@dataclass(frozen=True)
class Sum:
    """The total."""

    total: Number

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    def on_cpu(self) -> Sum:
        return Sum(float(self.total))

    @property
    def value(self) -> float | None:
        return float(self.total)


@dataclass(frozen=True)
class Max:
    """The largest; -inf stands for nothing."""

    largest: Number

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Max:
        """The largest of `values` over the places where `mask` is True."""
        values = _wide(torch.where(mask, values.detach(), -torch.inf)).flatten()
        return cls(torch.cat([values, values.new_full((1,), -torch.inf)]).max())

    def __add__(self, other: Max) -> Max:
        return Max(torch.maximum(*_tensors(self.largest, other.largest)))

    def on_cpu(self) -> Max:
        return Max(float(self.largest))

    @property
    def value(self) -> float | None:
        return float(self.largest) if math.isfinite(self.largest) else None


@dataclass(frozen=True)
class Min:
    """The smallest; inf stands for nothing."""

    smallest: Number

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Min:
        """The smallest of `values` over the places where `mask` is True."""
        return cls(-Max.of(-values, mask).largest)

    def __add__(self, other: Min) -> Min:
        return Min(torch.minimum(*_tensors(self.smallest, other.smallest)))

    def on_cpu(self) -> Min:
        return Min(float(self.smallest))

    @property
    def value(self) -> float | None:
        return float(self.smallest) if math.isfinite(self.smallest) else None


@dataclass(frozen=True)
class Std:
    """Sample standard deviation of everything added up (Chan's parallel update of mean and squared deviations)."""

    count: float
    mean: float
    norm: float
    """Root of the sum of squared deviations, which overflows later than the sum."""

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Of all values that are not NaN."""
        values = values.detach().double()
        values = values[~values.isnan()]
        if not len(values):
            return cls(0.0, 0.0, 0.0)
        largest = float(values.abs().max())
        unit = 2.0 ** (math.frexp(largest)[1] - 1) if largest > 2.0**500 else 1.0  # a power of 2, which rounds nothing
        mean = (values / unit).mean()
        return cls(len(values), float(mean * unit), float((values / unit - mean).norm() * unit))

    def __add__(self, other: Self) -> Self:
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        return type(self)(
            count,
            self.mean + delta * other.count / count,
            math.hypot(self.norm, other.norm, delta * math.sqrt(self.count * other.count / count)),
        )

    def on_cpu(self) -> Self:
        return self

    @property
    def value(self) -> float | None:
        return self.norm / math.sqrt(self.count - 1) if self.count > 1 else None


class RunningMean(Std):
    """Mean of everything added up, however large: no sum is kept that could overflow."""

    @property
    def value(self) -> float | None:
        return self.mean if self.count else None


@dataclass(frozen=True)
class Quantile:
    """The value that the given share of all values lies below, of everything added up; between two values, linearly."""

    share: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Tensor, share: float) -> Quantile:
        """Of all values that are not NaN."""
        values = values.detach()
        return cls(share, tuple(values[~values.isnan()].tolist()))

    def __add__(self, other: Quantile) -> Quantile:
        return Quantile(self.share, (*self.values, *other.values))

    def on_cpu(self) -> Quantile:
        return self

    @property
    def value(self) -> float | None:
        if not self.values:
            return None
        return float(torch.tensor(self.values, dtype=torch.float64).quantile(self.share))


def _tensors(*numbers: Number) -> list[Tensor]:
    """Tensors stay as and where they are; Python numbers become float64."""
    return [x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in numbers]


def _wide(values: Tensor) -> Tensor:
    """float64, which Apple's GPUs lack."""
    return values.float() if values.device.type == "mps" else values.double()


@dataclass
class Timer:
    """What a timed block took."""

    seconds: float = 0.0


class MetricLog:
    """Metrics by name, since the last reduction."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def add(self, name: str, metric: Metric) -> None:
        """Add to what `name` holds."""
        self._metrics[name] = self._metrics[name] + metric if name in self._metrics else metric

    def add_all(self, metrics: dict[str, Metric]) -> None:
        for name, metric in metrics.items():
            self.add(name, metric)

    def drain(self, other: MetricLog) -> None:
        """Add all that `other` holds, which is then empty."""
        self.add_all(other._metrics)
        other._metrics = {}

    def state_dict(self) -> dict[str, list[Any]]:
        """Return, for each name, the kind of metric and its numbers."""
        cpu = {name: metric.on_cpu() for name, metric in self._metrics.items()}
        return {name: [type(metric).__name__, *vars(metric).values()] for name, metric in cpu.items()}

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        """Add what a `state_dict` holds."""
        kinds = {kind.__name__: kind for kind in (Mean, Sum, Max, Min, Std, RunningMean, Quantile)}
        self.add_all({name: kinds[kind](*numbers) for name, (kind, *numbers) in state.items()})

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[Timer]:
        """Add the seconds that the block takes to the `Mean` of `name`, without counting one; the timer has them after."""
        timer, start = Timer(), time.perf_counter()
        try:
            yield timer
        finally:
            timer.seconds = time.perf_counter() - start
            self.add(name, Mean(timer.seconds, 0.0))

    def reduce(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, float]:
        """Values over all ranks, by name, without those that had nothing to reduce; then start again from nothing.

        Args:
            gather: From a list of objects on this rank to the concatenated lists of all ranks. Called once, on every
                rank; the names may differ between ranks.
        """
        merged = MetricLog()
        for metrics in gather([{name: metric.on_cpu() for name, metric in self._metrics.items()}]):
            merged.add_all(metrics)
        self._metrics = {}
        values = {name: metric.value for name, metric in merged._metrics.items()}
        return {name: value for name, value in values.items() if value is not None}
