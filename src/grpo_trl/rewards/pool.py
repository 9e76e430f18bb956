"""Worker processes that share the calls of reward functions.

Workers call synchronous functions that can be pickled. The others are left to the caller: coroutine functions and models,
closures and lambdas, and functions that a worker cannot import.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import wait
from typing import Any

from ..logging import EVERY_RANK, get_logger
from .call import FunctionReward
from .failures import RewardCall, RewardCallTracker
from .values import RewardResult
from .worker import PENDING, POLL_SECONDS, CallNotLoaded, Worker, WorkerError, packed_call, packed_function


logger = get_logger(__name__)

LARGEST_FUNCTION = 64 * 1024**2
"""Bytes of a packed function. A larger one, e.g. with a model of the script, would be sent with each call."""

Phase = Callable[[str], AbstractContextManager[Any]]
QueuedCall = tuple[RewardCallTracker, RewardCall]


class RewardPool:
    """Worker processes, started when they are first needed, and the queue of calls.

    Args:
        workers: How many processes.
        timeout: Seconds that a call may take once its function is loaded; None for no limit.
        memory_limit: Bytes of data per process; None for no limit.
    """

    def __init__(self, workers: int, timeout: float | None, memory_limit: int | None):
        self.timeout = timeout
        self._workers = [Worker(memory_limit) for _ in range(workers)]
        self._kept_out: set[str] = set()
        self._packed: dict[str, bytes] = {}
        """The functions of this batch, packed again for each batch, so that workers see their current state."""

    def run(self, trackers: Sequence[RewardCallTracker], phase: Phase = nullcontext) -> list[RewardCallTracker]:
        """Make the calls of all functions that workers can call; return the others, for which nothing is recorded.

        The groups of a batch are divided evenly among the workers. `phase` is entered around the wait with all names.

        Raises:
            ValueError, RewardError: What `RewardCallTracker.record` raises.
        """
        self._packed.clear()
        for tracker in trackers:
            self._pack(tracker)
        if pooled := [tracker for tracker in trackers if tracker.name in self._packed]:
            with phase(", ".join(tracker.name for tracker in pooled)):
                self._work(deque((tracker, call) for tracker in pooled for call in tracker.calls(len(self._workers))))
        return [tracker for tracker in trackers if tracker.name not in self._packed]

    def serves(self, tracker: RewardCallTracker) -> bool:
        """Whether workers can call a function, as far as is known before it is packed."""
        function = tracker.function
        return isinstance(function, FunctionReward) and not function.is_async and tracker.name not in self._kept_out

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.kill()

    def _pack(self, tracker: RewardCallTracker) -> None:
        if tracker.name in self._kept_out:
            return
        function = tracker.function
        if not isinstance(function, FunctionReward):
            return self._keep_out(tracker, "it is a model")
        if function.is_async:
            return self._keep_out(tracker, "it is async")
        try:
            packed = packed_function(function)
        except Exception as error:
            return self._keep_out(tracker, f"it cannot be pickled: {error}")
        if len(packed) > LARGEST_FUNCTION:
            return self._keep_out(tracker, f"pickled it has {len(packed) / 1024**2:.0f} MiB")
        self._packed[tracker.name] = packed

    def _keep_out(self, tracker: RewardCallTracker, reason: str) -> None:
        logger.warning(
            "The reward function %r is called in the training process, not by reward_workers: %s.",
            tracker.name,
            reason,
            extra=EVERY_RANK,
        )
        self._kept_out.add(tracker.name)
        self._packed.pop(tracker.name, None)
        tracker.clear()

    def _work(self, queue: deque[QueuedCall]) -> None:
        """Hand out calls to idle workers and record results until there are no more."""
        busy: dict[Worker, QueuedCall] = {}
        try:
            while queue or busy:
                self._hand_out(queue, busy)
                wait([worker.connection for worker in busy if worker.connection], self._patience(busy))
                for worker in [worker for worker in busy if worker.has_news()]:
                    self._take_in(worker, queue, busy)
        except BaseException:  # what is still running must not answer the next call
            for worker in busy:
                worker.kill()
            raise

    def _hand_out(self, queue: deque[QueuedCall], busy: dict[Worker, QueuedCall]) -> None:
        for worker in self._workers:
            while queue and worker not in busy:
                tracker, call = queue.popleft()
                if message := self._packed_call(tracker, call):
                    busy[worker] = tracker, call  # before it is sent: see the end of `_work`
                    worker.send(message, self.timeout)

    def _packed_call(self, tracker: RewardCallTracker, call: RewardCall) -> bytes | None:
        """Pack a call for a worker; None if its function turned out to stay here."""
        packed = self._packed.get(tracker.name)
        if packed is None:
            return None
        try:
            return packed_call(packed, tracker.function.for_worker(tracker.batch.part(call.rows)))
        except Exception as error:
            self._keep_out(tracker, f"its arguments cannot be pickled: {error}")
            return None

    def _take_in(self, worker: Worker, queue: deque[QueuedCall], busy: dict[Worker, QueuedCall]) -> None:
        outcome: RewardResult | WorkerError
        try:
            outcome = worker.receive()
            if outcome is PENDING:
                return
        except WorkerError as error:
            if not error.worker_is_usable:
                worker.kill()
            outcome = error
        tracker, call = busy[worker]
        if tracker.name not in self._packed:
            pass
        elif isinstance(outcome, CallNotLoaded):
            self._keep_out(tracker, f"a worker cannot load it: {outcome}")
        else:
            queue.extend((tracker, further) for further in tracker.record(call, outcome))
        del busy[worker]

    def _patience(self, busy: dict[Worker, QueuedCall]) -> float:
        """Return the seconds to wait for news: short, so that signal handlers run and dead workers are found."""
        next_deadline = min((worker.deadline for worker in busy), default=0.0)
        return min(POLL_SECONDS, max(0.0, next_deadline - time.monotonic()))
