"""Calling one reward function, here or in a worker, and checking what it returns.

A worker imports this module, which therefore imports neither torch nor transformers.
"""

import asyncio
import functools
import inspect
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any


@dataclass
class RewardLogs:
    """What reward functions log: columns of the completions table, and values that are averaged into metrics."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column to the completions table; one value per completion of the call."""
        self.columns[column].extend(values)

    def log_metric(self, name: str, value: float) -> None:
        """Log a number; it is averaged over calls and ranks until the next log."""
        self.metrics[name].append(float(value))

    def add(self, other: "RewardLogs") -> None:
        """Append the logs of another function."""
        for column, values in other.columns.items():
            self.columns[column].extend(values)
        for name, numbers in other.metrics.items():
            self.metrics[name].extend(numbers)


@dataclass(frozen=True)
class RewardBatch:
    """What reward functions see, one entry per completion: prompts and completions as text (or lists of messages), token
    ids, and the dataset's other columns. The completions of a prompt, its group, follow each other."""

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    trainer_state: Any = None
    num_generations: int = 1

    def arguments(self, logs: RewardLogs) -> dict[str, Any]:
        """Keyword arguments of a reward function. A column never hides one of the trainer's own names."""
        return self.columns | {
            "prompts": self.prompts,
            "completions": self.completions,
            "completion_ids": self.completion_ids,
            "trainer_state": self.trainer_state,
            "log_extra": logs.log_extra,
            "log_metric": logs.log_metric,
        }

    def part(self, rows: range) -> "RewardBatch":
        """Some completions that follow each other."""
        return replace(
            self,
            prompts=self.prompts[rows.start : rows.stop],
            completions=self.completions[rows.start : rows.stop],
            completion_ids=self.completion_ids[rows.start : rows.stop],
            columns={name: values[rows.start : rows.stop] for name, values in self.columns.items()},
        )


@dataclass(frozen=True)
class RewardResult:
    """What one call gave."""

    values: list[float]
    """One per completion of the call: a finite number, or NaN where it returned None or what is no reward."""
    wrong: dict[int, str]
    """What is wrong with the values that are no reward, by their place in the call."""
    logs: RewardLogs

    @classmethod
    def of(cls, returned: Any, count: int, logs: RewardLogs, name: str) -> "RewardResult":
        """Read what the function `name` returned for `count` completions.

        Raises:
            ValueError: It is no list of `count` values.
        """
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, (list, tuple)):
            raise ValueError(
                f"The reward function {name!r} returned {type(returned).__name__}; it must return a list with one "
                "number, or None, per completion."
            )
        if len(values) != count:
            raise ValueError(
                f"The reward function {name!r} returned {len(values)} values for {count} completions; it must return "
                "one number, or None, per completion."
            )
        numbers = [_number(value) for value in values]
        wrong = {
            i: f"returned {repr(values[i])[:200]} ({type(values[i]).__name__}); it must return a finite number, or None "
            "where it does not apply"
            for i, number in enumerate(numbers)
            if number is None
        }
        return cls([math.nan if number is None else number for number in numbers], wrong, logs)


class FunctionReward:
    """A callable, sync or async, that takes what it names of `RewardBatch.arguments` (all of it with `**kwargs`)."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.name = _callable_name(function)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - an object whose __call__ is a coroutine function
        )

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Call the function on the whole batch.

        Raises:
            ValueError: It returned no list with one value per completion.
            Exception: What the function raises.
        """
        logs = RewardLogs()
        returned = self.function(**self._select(batch.arguments(logs)))
        return RewardResult.of(returned, len(batch.completions), logs, self.name)

    async def call_async(self, batch: RewardBatch) -> RewardResult:
        """The same for a coroutine function."""
        logs = RewardLogs()
        try:
            returned = await self.function(**self._select(batch.arguments(logs)))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or not hasattr(task, "cancelling") or task.cancelling():  # of Python 3.11
                raise
            raise RuntimeError("CancelledError in an async function") from error
        except (SystemExit, KeyboardInterrupt) as error:  # would end the event loop, and its caller would wait for ever
            raise RuntimeError(f"{type(error).__name__} in an async function") from error
        return RewardResult.of(returned, len(batch.completions), logs, self.name)

    def check(self, batch: RewardBatch) -> None:
        """Refuse a function that cannot be called on the batch.

        Raises:
            ValueError: The function takes what neither the dataset nor the trainer has.
        """
        arguments = batch.arguments(RewardLogs())
        required = [
            name
            for name, p in (self._parameters() or {}).items()
            if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
        ]
        if missing := [name for name in required if name not in arguments]:
            raise ValueError(
                f"The reward function {self.name!r} takes {', '.join(missing)}, which neither the dataset nor the trainer "
                f"has; it may take {', '.join(sorted(arguments))}, or **kwargs."
            )

    def for_worker(self, batch: RewardBatch) -> RewardBatch:
        """What a worker is sent of a batch: what the function names.

        With `**kwargs` that is everything, the trainer's state reduced to its plain values: the whole of it grows with each
        log, and loading it would have the worker import transformers.
        """
        named = self._parameters()
        if named is None:
            return replace(batch, trainer_state=_plain(batch.trainer_state))
        return replace(
            batch,
            prompts=batch.prompts if "prompts" in named else [],
            completion_ids=batch.completion_ids if "completion_ids" in named else [],
            columns={name: values for name, values in batch.columns.items() if name in named},
            trainer_state=batch.trainer_state if "trainer_state" in named else None,
        )

    def _parameters(self) -> dict[str, inspect.Parameter] | None:
        """What the function names; None if it takes everything."""
        try:
            parameters = inspect.signature(self.function).parameters
        except ValueError:  # some built-in callables have no signature
            return None
        return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else dict(parameters)

    def _select(self, arguments: dict[str, Any]) -> dict[str, Any]:
        named = self._parameters()
        return arguments if named is None else {name: value for name, value in arguments.items() if name in named}


class EventLoop:
    """An event loop in a thread of its own, started at the first use, for reward functions that are coroutines.

    It outlives a call, so that clients which a function keeps open stay usable, and does not collide with a notebook's.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Await all at the same time; their results in the order given. If one raises, the others are cancelled."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="grpo_trl-rewards", daemon=True).start()

        async def gather() -> list[Any]:
            tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        future = asyncio.run_coroutine_threadsafe(gather(), self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # what a signal handler has raised here must not leave them running


def _number(value: Any) -> float | None:
    """The float that a returned value stands for, NaN for None; None for what is no reward."""
    if value is None:
        return math.nan
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        value = value.item()
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:  # an integer larger than any float
        return None


def _plain(state: Any) -> SimpleNamespace | None:
    """The attributes of the trainer's state that are numbers, strings or None."""
    if state is None:
        return None
    kinds = (int, float, str, type(None))
    return SimpleNamespace(**{k: v for k, v in getattr(state, "__dict__", {}).items() if isinstance(v, kinds)})


def _callable_name(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        return _callable_name(function.func)
    return getattr(function, "__name__", type(function).__name__)
