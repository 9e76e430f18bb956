"""Several workers that share the calls of reward functions.

What goes to a worker is a synchronous function that can be pickled. The others are left to the caller: coroutine functions
and models, closures and lambdas, and what a worker cannot import.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import wait
from typing import Any

from ..notices import EVERY_RANK, get_logger
from .call import Answer, FunctionReward
from .failures import Call, Ledger
from .worker import PENDING, POLL_SECONDS, CallNotLoaded, Worker, WorkerError, packed_call, packed_function


logger = get_logger(__name__)

LARGEST_FUNCTION = 64 * 1024**2
"""Bytes of a packed function. One that carries more, such as a model of the script, would be sent with each call."""

Watch = Callable[[str], AbstractContextManager[Any]]
Job = tuple[Ledger, Call]


class RewardPool:
    """Worker processes, started as calls come, and the queue in front of them.

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
        """The functions of this batch. They are packed anew for each, so that what changes in them here changes there."""

    def run(self, ledgers: Sequence[Ledger], watch: Watch = nullcontext) -> list[Ledger]:
        """Make the calls of all functions that workers can call; the rest, for which nothing is recorded.

        The groups of a batch are divided evenly among the workers. `watch` is entered around the wait with all names.

        Raises:
            ValueError, RewardError: What `Ledger.record` raises.
        """
        self._packed.clear()
        for ledger in ledgers:
            self._pack(ledger)
        if pooled := [ledger for ledger in ledgers if ledger.name in self._packed]:
            with watch(", ".join(ledger.name for ledger in pooled)):
                self._work(deque((ledger, call) for ledger in pooled for call in ledger.calls(len(self._workers))))
        return [ledger for ledger in ledgers if ledger.name not in self._packed]

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.kill()

    def _pack(self, ledger: Ledger) -> None:
        if ledger.name in self._kept_out:
            return
        function = ledger.function
        if not isinstance(function, FunctionReward):
            return self._keep_out(ledger, "it is a model")
        if function.is_async:
            return self._keep_out(ledger, "it is async")
        try:
            packed = packed_function(function)
        except Exception as error:
            return self._keep_out(ledger, f"it cannot be pickled: {error}")
        if len(packed) > LARGEST_FUNCTION:
            return self._keep_out(ledger, f"pickled it has {len(packed) / 1024**2:.0f} MiB")
        self._packed[ledger.name] = packed

    def _keep_out(self, ledger: Ledger, reason: str) -> None:
        logger.warning(
            "The reward function %r is called in the training process, not by reward_workers: %s.",
            ledger.name,
            reason,
            extra=EVERY_RANK,
        )
        self._kept_out.add(ledger.name)
        self._packed.pop(ledger.name, None)
        ledger.clear()

    def _work(self, queue: deque[Job]) -> None:
        """Hand out calls to idle workers and take in answers until both are none."""
        busy: dict[Worker, Job] = {}
        try:
            while queue or busy:
                self._hand_out(queue, busy)
                wait([worker.connection for worker in busy if worker.connection], self._patience(busy))
                for worker in [worker for worker in busy if worker.has_news()]:
                    self._take_in(worker, queue, busy)
        except BaseException:  # what is still being computed must not answer the next call
            for worker in busy:
                worker.kill()
            raise

    def _hand_out(self, queue: deque[Job], busy: dict[Worker, Job]) -> None:
        for worker in self._workers:
            while queue and worker not in busy:
                ledger, call = queue.popleft()
                if message := self._packed_job(ledger, call):
                    busy[worker] = ledger, call  # before it is sent: see the end of `_work`
                    worker.send(message, self.timeout)

    def _packed_job(self, ledger: Ledger, call: Call) -> bytes | None:
        """The call as a worker gets it; None for that of a function which has been found to stay here."""
        packed = self._packed.get(ledger.name)
        if packed is None:
            return None
        try:
            return packed_call(packed, ledger.function.for_worker(ledger.batch.part(call.rows)))
        except Exception as error:
            self._keep_out(ledger, f"its arguments cannot be pickled: {error}")
            return None

    def _take_in(self, worker: Worker, queue: deque[Job], busy: dict[Worker, Job]) -> None:
        outcome: Answer | WorkerError
        try:
            outcome = worker.receive()
            if outcome is PENDING:
                return
        except WorkerError as error:
            if not error.worker_is_usable:
                worker.kill()
            outcome = error
        ledger, call = busy[worker]
        if ledger.name not in self._packed:
            pass
        elif isinstance(outcome, CallNotLoaded):
            self._keep_out(ledger, f"a worker cannot load it: {outcome}")
        else:
            queue.extend((ledger, further) for further in ledger.record(call, outcome))
        del busy[worker]

    def _patience(self, busy: dict[Worker, Job]) -> float:
        """Seconds to wait for news, short so that signal handlers run and workers that ended are found."""
        next_deadline = min((worker.deadline for worker in busy), default=0.0)
        return min(POLL_SECONDS, max(0.0, next_deadline - time.monotonic()))
