"""Call one reward function, here or in a worker.

A worker imports this module, which therefore imports neither torch nor transformers.
"""

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from .batch import OWN_ARGUMENTS, RewardBatch, RewardLogs
from .event_loop import EVENT_LOOP, finish
from .isolation import isolated
from .values import RewardResult


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
            Exception: What the function raises; a RuntimeError where it exits.
        """
        logs = RewardLogs()
        with isolated():
            try:
                returned = self.function(**batch.arguments(self._names(), logs))
            except SystemExit as error:  # as of a program that a completion has written
                raise RuntimeError(f"SystemExit({error.code!r})") from error
            if inspect.isawaitable(returned):
                [returned] = EVENT_LOOP.run([finish(returned)])
            return RewardResult.of(returned, len(batch.completions), logs, self.name)

    async def call_async(self, batch: RewardBatch) -> RewardResult:
        """Call a coroutine function on the whole batch."""
        logs = RewardLogs()
        returned = await finish(self.function(**batch.arguments(self._names(), logs)))
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

    def takes(self, name: str) -> bool:
        """Whether the function is passed the argument `name` where there is one."""
        names = self._names()
        return names is None or name in names

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
