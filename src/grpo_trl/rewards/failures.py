"""Failed calls: find the completions that cause them, report them, and keep the rewards of the others."""

import logging
import math
import traceback
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import RunStopped
from .batch import RewardBatch, RewardLogs
from .values import RewardResult
from .worker import WorkerError


logger = logging.getLogger(__name__)

OnError = Literal["exclude", "raise"]
COMPLETION_CHARACTERS = 500


class RewardError(RunStopped):
    """A reward function failed on a completion, and `on_reward_error="raise"`.

    Args:
        name: The reward function.
        completion: What it failed on.
        message: What went wrong, in one line.
        traceback: Of the exception; empty where there was none, as for a worker that was killed.
    """

    def __init__(self, name: str, completion: Any, message: str, traceback: str):
        super().__init__(describe(name, completion, message, traceback))
        self.name = name
        self.completion = completion
        self.message = message
        self.traceback = traceback

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.completion, self.message, self.traceback)


@dataclass(frozen=True)
class RewardCall:
    """Rows of the batch that a function is called on together, and how often the call is retried unchanged."""

    rows: range
    retries: int


class FailureReport:
    """Log the first failure of each function in the run, or raise it.

    Args:
        on_error: "exclude" or "raise".
    """

    def __init__(self, on_error: OnError):
        self.on_error = on_error
        self._logged: set[str] = set()

    def completion_failed(
        self, name: str, completion: Any, message: str, traceback: str, watches: bool = False
    ) -> None:
        """Report that a function gave no reward to a completion.

        Raises:
            RewardError: With `on_error="raise"`, unless the function only `watches`.
        """
        if self.on_error == "raise" and not watches:
            raise RewardError(name, completion, message, traceback)
        self._log_first(name, describe(name, completion, message, traceback))

    def only_together(self, name: str, count: int, message: str, traceback: str) -> None:
        """Report that a call on `count` completions failed, but no call on its parts."""
        head = f"The reward function {name!r} failed on {count} completions together, on none of them alone: {message}"
        self._log_first(name, f"{head}\n{traceback}".rstrip())

    def _log_first(self, name: str, text: str) -> None:
        if name not in self._logged:
            self._logged.add(name)
            logger.warning("%s\nFurther failures of it are only counted, in rewards/%s/failures.", text, name)


class RewardCallTracker:
    """Results of one function's calls for the completions of a batch.

    A call that fails is retried `retries` times unchanged; then each of its groups is called alone, and in a group that
    fails again each completion, that again with `retries`. A value that is no reward fails its own completion only. A
    result that is wrong as a whole is a mistake in the function, and is not retried.

    Args:
        name: The function's name in the log.
        function: What is called.
        batch: All completions.
        retries: How often the first and the last calls are retried.
        report: Told of each completion whose failure is final.
        watches: Whether its weight is 0. Its failures and mistakes are logged and stop nothing.
        largest: A value beyond this size fails its completion, since the weighted sum could overflow.
    """

    def __init__(
        self,
        name: str,
        function: Any,
        batch: RewardBatch,
        retries: int,
        report: FailureReport,
        *,
        watches: bool = False,
        largest: float = math.inf,
    ):
        self.name = name
        self.watches = watches
        self.largest = largest
        self.function = function
        self.batch = batch
        self.retries = retries
        self.report = report
        self.clear()

    def clear(self) -> None:
        """Forget everything recorded."""
        self.failed = [False] * len(self.batch.completions)
        self._results: list[tuple[range, RewardResult]] = []
        self._first_failure: tuple[int, str, str] | None = None
        self.reason = ""
        """Why the first completion that failed did."""

    def calls(self, parts: int = 1) -> list[RewardCall]:
        """Divide the batch into at most `parts` calls on whole groups."""
        count, group = len(self.batch.completions), self.batch.num_generations
        return self._split(range(count), math.ceil(count / group / parts) * group, self.retries)

    def record(self, call: RewardCall, outcome: RewardResult | Exception) -> list[RewardCall]:
        """Record the result of a call, or its failure; return the calls to make in its place.

        Raises:
            ValueError: The result is wrong as a whole; see `RewardResult.mistake`.
            RewardError: A completion failed, and the report says that this stops the run.
        """
        if isinstance(outcome, RewardResult):
            self._accept(call.rows, outcome)
            return []
        message, text = _explained(outcome)
        self._first_failure = self._first_failure or (len(call.rows), message, text)
        if call.retries:
            return [replace(call, retries=call.retries - 1)]
        if len(call.rows) > self.batch.num_generations > 1:
            return self._split(call.rows, self.batch.num_generations, 0)
        if len(call.rows) > 1:
            return self._split(call.rows, 1, self.retries)
        self._fail(call.rows[0], message, text)
        return []

    def close(self) -> tuple[list[float], RewardLogs]:
        """Return the values of all completions, NaN where the function returned None or failed, and its logs.

        Both are in the order of the completions, whatever the order of the calls; a column has None where
        nothing was logged.
        """
        if self._first_failure and not any(self.failed):
            self.report.only_together(self.name, *self._first_failure)
        values = [math.nan] * len(self.failed)
        logs = RewardLogs()
        for rows, result in sorted(self._results, key=lambda entry: entry[0].start):
            values[rows.start : rows.stop] = result.values
            for name, column in result.logs.columns.items():
                whole = logs.columns.setdefault(name, [None] * len(values))
                whole[rows.start : rows.stop] = column
            for name, numbers in result.logs.metrics.items():
                logs.metrics[name].extend(numbers)
        return values, logs

    def _split(self, rows: range, size: int, retries: int) -> list[RewardCall]:
        return [RewardCall(rows[start : start + size], retries) for start in range(0, len(rows), max(size, 1))]

    def _accept(self, rows: range, result: RewardResult) -> None:
        if result.mistake and not self.watches:
            raise ValueError(result.mistake)
        if result.mistake:
            for row in rows:
                self._fail(row, result.mistake, "")
            return
        too_large = {i: f"returned {v}, which overflows" for i, v in enumerate(result.values) if abs(v) > self.largest}
        values = [math.nan if i in too_large else value for i, value in enumerate(result.values)]
        self._results.append((rows, replace(result, values=values)))
        for place, message in (result.wrong | too_large).items():
            self._fail(rows[place], message, "")

    def _fail(self, row: int, message: str, text: str) -> None:
        self.failed[row] = True
        self.reason = self.reason or message
        self.report.completion_failed(self.name, self.batch.completions[row], message, text, self.watches)


def describe(name: str, completion: Any, message: str, traceback: str) -> str:
    """Describe a failure: which function, why, the completion (its first characters), the traceback."""
    text = completion if isinstance(completion, str) else repr(completion)
    if len(text) > COMPLETION_CHARACTERS:
        text = text[:COMPLETION_CHARACTERS] + "..."
    head = f"The reward function {name!r} failed on a completion: {message}"
    return f"{head}\nThe completion: {text}\n{traceback}".rstrip()


def _explained(error: Exception) -> tuple[str, str]:
    """Return the error in one line, and its traceback."""
    if isinstance(error, WorkerError):
        return str(error), error.traceback
    return f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
