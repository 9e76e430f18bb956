"""Sampling ahead: generation batches are sampled, and rewarded by workers, while earlier ones are trained on."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from ..reliability.run_state import plain
from ..rewards import RewardLogs, RewardTable
from ..rollout.base import Rollout, RolloutEngine, RolloutRequest
from ..types import Completion


CHECK_SECONDS = 0.2

Result = TypeVar("Result")


@dataclass(frozen=True)
class SampledRollout:
    """What an engine sampled of a generation batch, and its rewards where it was sampled ahead and workers know them."""

    rollout: Rollout
    seconds: float
    """That sampling took."""
    rewards: RewardTable | None
    """None where they must be computed by the main thread."""

    def state_dict(self) -> dict[str, Any]:
        completions = [vars(completion) for completion in self.rollout.completions]
        rewards = None if self.rewards is None else _plain_rewards(self.rewards)
        return {"completions": completions, "seconds": self.seconds, "rewards": rewards}

    @classmethod
    def of_state_dict(cls, state: dict[str, Any]) -> "SampledRollout":
        rewards = state["rewards"]
        return cls(
            Rollout([Completion(**completion) for completion in state["completions"]]),
            state["seconds"],
            None if rewards is None else _rewards(**rewards),
        )


def _plain_rewards(table: RewardTable) -> dict[str, Any]:
    """Rewards in types that can be loaded without running code; what reward functions logged becomes plain."""
    logs = {"columns": plain(table.logs.columns), "metrics": plain(table.logs.metrics)}
    return vars(table) | {"logs": logs, "watching": sorted(table.watching)}


def _rewards(*, logs: dict[str, Any], watching: list[str], **values: Any) -> RewardTable:
    return RewardTable(logs=RewardLogs(**logs), watching=frozenset(watching), **values)


class SamplesAhead:
    """Samples generation batches in a thread, one after the other, rewards them in another, and keeps them until used.

    Weights must not change while it samples: `wait` comes before a sync. A checkpoint holds what is sampled and not used
    yet, and waits for what is being sampled; so which weights a generation batch is sampled from follows from its number
    alone, whatever the speed of the engine and wherever the run is interrupted.

    Args:
        engine: Samples; called in the thread.
        distance: Generation batches that are sampled ahead.
        check: Called while the main thread waits; may raise.
    """

    def __init__(self, engine: RolloutEngine, distance: int, check: Callable[[], None] = lambda: None):
        self.distance = distance
        self._engine = engine
        self._check = check
        self._sampler = _Thread("sampling-ahead")
        self._rewarder = _Thread("rewarding-ahead")
        self._sampling: list[Future[tuple[Rollout, float]]] = []
        self._running: dict[int, Future[SampledRollout]] = {}
        self._done: dict[int, SampledRollout] = {}
        self._idle_since = 0.0

    def missing(self, index: int) -> list[int]:
        """Which generation batches must be sampled from the weights with which generation batch `index` begins."""
        return [i for i in range(index, index + self.distance + 1) if i not in self._running and i not in self._done]

    def submit(self, index: int, request: RolloutRequest, reward: Callable[[Rollout], RewardTable | None]) -> None:
        """Sample generation batch `index` once those submitted before are sampled; then `reward` it."""

        def finish() -> SampledRollout:
            rollout, seconds = sampling.result()
            return SampledRollout(rollout, seconds, reward(rollout))

        sampling = self._sampler.submit(lambda: self._sample(request))
        self._sampling.append(sampling)
        self._running[index] = self._rewarder.submit(finish)

    def take(self, index: int) -> SampledRollout:
        """Wait for generation batch `index`. It stays until it is `used`, so that nothing is lost with an interruption."""
        if index in self._running:
            self._done[index] = self._result(self._running[index])
            del self._running[index]
        return self._done[index]

    def used(self, index: int) -> None:
        """Forget generation batch `index`."""
        del self._done[index]

    def wait(self) -> float:
        """Wait until nothing is being sampled; return the seconds since then."""
        while self._sampling:
            self._result(self._sampling[0])
            del self._sampling[0]
        return time.perf_counter() - self._idle_since if self._idle_since else 0.0

    def wait_for_rewards(self) -> None:
        """Wait until nothing is being sampled or rewarded."""
        for index in list(self._running):
            self.take(index)

    def state_dict(self) -> dict[str, Any]:
        """All that is sampled and not used, once nothing is being sampled or rewarded.

        What could not be sampled is left out: whoever takes it hears why.
        """
        finished = {index: future.result() for index, future in self._running.items() if not future.exception()}
        return {str(index): one.state_dict() for index, one in (self._done | finished).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampling, self._running = [], {}
        self._done = {int(index): SampledRollout.of_state_dict(saved) for index, saved in state.items()}

    def _sample(self, request: RolloutRequest) -> tuple[Rollout, float]:
        start = time.perf_counter()
        try:
            return self._engine.rollout(request), time.perf_counter() - start
        finally:
            self._idle_since = time.perf_counter()

    def _result(self, future: "Future[Any]") -> Any:
        while True:
            self._check()
            try:
                return future.result(timeout=CHECK_SECONDS)
            except StillRunning:
                if future.done():  # a TimeoutError of its own
                    raise


class _Thread:
    """Does work in a thread, one after the other. Unlike an executor's, it does not keep the process from ending."""

    def __init__(self, name: str):
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], Result]) -> "Future[Result]":
        future: Future[Result] = Future()
        self._queue.put((future, work))
        return future

    def _run(self) -> None:
        while True:
            future, work = self._queue.get()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
