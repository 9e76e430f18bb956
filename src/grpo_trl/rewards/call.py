"""Call one reward function, here or in a worker, and check what it returns.

A worker imports this module, which therefore imports neither torch nor transformers.
"""

import asyncio
import copy
import functools
import inspect
import math
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from numbers import Real
from types import SimpleNamespace
from typing import Any

from .isolation import isolated


OWN_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments that every reward function can take; a column never hides one of them."""


@dataclass
class RewardLogs:
    """Columns of the completions table and values for metrics that reward functions log."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column to the completions table; one value per completion of the call."""
        self.columns[column].extend(map(_copy, values))

    def log_metric(self, name: str, value: float) -> None:
        """Log a number; it is averaged over calls and ranks until the next log."""
        self.metrics[name].append(float(value))

    def add(self, other: "RewardLogs") -> None:
        """Append the logs of another function."""
        for column, values in other.columns.items():
            self.columns[column].extend(values)
        for name, numbers in other.metrics.items():
            self.metrics[name].extend(numbers)

    def mistake(self, count: int) -> str:
        """Describe what is wrong with the logs of a call on `count` completions; empty where nothing is."""
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


class FunctionReward:
    """A callable, sync or async, that takes the arguments it names of `RewardBatch.arguments` (all with `**kwargs`).

    Raises:
        TypeError: It is a class, or a generator.
        ValueError: It takes nothing by keyword.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.name = _callable_name(function)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - an object whose __call__ is a coroutine function
        )
        self._check_kind()
        self._check_parameters()

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Call the function on the whole batch. If a sync function returns an awaitable, it is awaited.

        Raises:
            Exception: What the function raises.
        """
        logs = RewardLogs()
        with isolated():
            returned = self.function(**batch.arguments(self._names(), logs))
            if inspect.isawaitable(returned):
                [returned] = EVENT_LOOP.run([_finish(returned)])
            return RewardResult.of(returned, len(batch.completions), logs, self.name)

    async def call_async(self, batch: RewardBatch) -> RewardResult:
        """Call a coroutine function on the whole batch."""
        logs = RewardLogs()
        returned = await _finish(self.function(**batch.arguments(self._names(), logs)))
        return RewardResult.of(returned, len(batch.completions), logs, self.name)

    def check_columns(self, columns: Collection[str], dataset: str = "the dataset") -> None:
        """Refuse a function that cannot be called with these columns.

        Raises:
            ValueError: It takes what neither the dataset nor the trainer has, or nothing that they have.
        """
        parameters, takes_all = self._parameters()
        available = {*columns, *OWN_ARGUMENTS}
        missing = [name for name, p in parameters.items() if p.default is p.empty and name not in available]
        offer = f"it may take {', '.join(sorted(available))}, or **kwargs"
        if missing:
            raise ValueError(
                f"The reward function {self.name!r} takes {', '.join(missing)}, which neither {dataset} nor the trainer "
                f"has; {offer}. Give a parameter a default if only some datasets have its column."
            )
        if not takes_all and not available & parameters.keys():
            raise ValueError(
                f"The reward function {self.name!r} takes nothing that {dataset} or the trainer has; {offer}."
            )

    def for_worker(self, batch: RewardBatch) -> RewardBatch:
        """Return the part of a batch that a worker is sent: what the function names.

        With `**kwargs` that is everything, but only the plain values of the trainer's state: its log grows, and unpickling
        it would make the worker import transformers.
        """
        named = self._names()
        if named is None:
            return replace(batch, trainer_state=_plain(batch.trainer_state))
        return replace(
            batch,
            prompts=batch.prompts if "prompts" in named else [],
            completion_ids=batch.completion_ids if "completion_ids" in named else [],
            columns={name: values for name, values in batch.columns.items() if name in named},
            trainer_state=batch.trainer_state if "trainer_state" in named else None,
        )

    def _check_kind(self) -> None:
        function = _innermost(self.function)
        if inspect.isclass(function):
            raise TypeError(
                f"reward_funcs has the class {self.name}, not an instance of it; pass {self.name}(...) with its arguments."
            )
        called = function if inspect.isroutine(function) else type(function).__call__
        if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
            raise TypeError(
                f"The reward function {self.name!r} is a generator; it must return a list with one number, or None, per "
                "completion."
            )

    def _check_parameters(self) -> None:
        """Refuse a function that cannot be called by keyword."""
        try:
            parameters = inspect.signature(self.function, follow_wrapped=False).parameters.values()
        except (ValueError, TypeError):  # some built-in callables have no signature
            return
        by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
        if by_position:
            raise ValueError(
                f"The reward function {self.name!r} takes {', '.join(by_position)} by position only; arguments are passed "
                "by keyword, as in def f(completions, **kwargs)."
            )
        if not any(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters):
            raise ValueError(
                f"The reward function {self.name!r} takes no argument by keyword, so it would not see the completions; "
                "define it as in def f(completions, **kwargs)."
            )

    def _parameters(self) -> tuple[dict[str, inspect.Parameter], bool]:
        """Return the parameters that can be passed by keyword, and whether the function takes everything else too."""
        try:
            parameters = inspect.signature(self.function).parameters
        except (ValueError, TypeError):  # some built-in callables have no signature
            return {}, True
        named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        return named, any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def _names(self) -> Collection[str] | None:
        """Return the arguments that the function is passed, None for all."""
        named, takes_all = self._parameters()
        return None if takes_all else named.keys()


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
                with isolated():  # all of them together: they run at the same time
                    return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        future = asyncio.run_coroutine_threadsafe(gather(), self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # if a signal handler raises here, they must not keep running


EVENT_LOOP = EventLoop()
"""Of this process."""


async def _finish(awaitable: Awaitable[Any]) -> Any:
    """Await what a reward function returned; what it must not do to the event loop becomes an ordinary error."""
    try:
        return await awaitable
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or not hasattr(task, "cancelling") or task.cancelling():  # of Python 3.11
            raise
        raise RuntimeError("CancelledError in an async function") from error
    except (SystemExit, KeyboardInterrupt) as error:  # would end the event loop, and its caller would wait forever
        raise RuntimeError(f"{type(error).__name__} in an async function") from error


# ---- Copies ----
def _copy(value: Any) -> Any:
    """Return a copy, or the object itself where it cannot be copied."""
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


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


# ---- Values ----
def _values(returned: Any, count: int) -> tuple[Sequence[Any], str]:
    """Return the values that a function returned for `count` completions, and what is wrong with them as a whole."""
    shape = tuple(getattr(returned, "shape", ()))
    if len(shape) > 1:
        if shape[0] != count or math.prod(shape) != count:
            return [], f"returned an array of shape {shape} for {count} completions; its shape must be ({count},)"
        returned = returned.reshape(count)
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        return [], (
            f"returned {type(returned).__name__}; it must return a list with one number, or None, per completion"
        )
    if len(values) != count:
        return [], (
            f"returned {len(values)} values for {count} completions; it must return one number, or None, per completion"
        )
    return values, ""


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


def _plain(state: Any) -> SimpleNamespace | None:
    """Return the attributes of the trainer's state that are numbers, strings or None."""
    if state is None:
        return None
    kinds = (int, float, str, type(None))
    return SimpleNamespace(**{k: v for k, v in getattr(state, "__dict__", {}).items() if isinstance(v, kinds)})


def _innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a `functools.partial` calls."""
    return _innermost(function.func) if isinstance(function, functools.partial) else function


def _callable_name(function: Callable[..., Any]) -> str:
    function = _innermost(function)
    return str(getattr(function, "__name__", type(function).__name__))
