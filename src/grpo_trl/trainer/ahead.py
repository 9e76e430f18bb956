"""Sampling ahead: generation batches are sampled while earlier ones are trained on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from typing import Any

from ..rollout.base import Rollout, RolloutEngine, RolloutRequest
from ..types import Completion


CHECK_SECONDS = 0.2


class SamplesAhead:
    """Samples generation batches in a thread, one after the other, and keeps them until they are used.

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
        self._thread = ThreadPoolExecutor(1, "sampling-ahead")
        self._running: dict[int, Future[Rollout]] = {}
        self._rollouts: dict[int, Rollout] = {}
        self._idle_since = 0.0

    def missing(self, index: int) -> list[int]:
        """Which generation batches must be sampled from the weights with which generation batch `index` begins."""
        return [
            i for i in range(index, index + self.distance + 1) if i not in self._running and i not in self._rollouts
        ]

    def submit(self, index: int, request: RolloutRequest) -> None:
        """Sample generation batch `index` once those submitted before are done."""
        self._running[index] = self._thread.submit(self._sample, request)

    def take(self, index: int) -> Rollout:
        """Wait for generation batch `index`. It stays until it is `used`, so that nothing is lost with an interruption."""
        self._finish(index)
        return self._rollouts[index]

    def used(self, index: int) -> None:
        """Forget generation batch `index`."""
        del self._rollouts[index]

    def wait(self) -> float:
        """Wait until nothing is being sampled; return the seconds since then."""
        for index in list(self._running):
            self._finish(index)
        return time.perf_counter() - self._idle_since if self._idle_since else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that is sampled and not used, once nothing is being sampled."""
        for index, future in list(self._running.items()):
            self._rollouts[index] = future.result()
            del self._running[index]
        return {str(index): [vars(c) for c in rollout.completions] for index, rollout in self._rollouts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._running = {}
        self._rollouts = {int(index): Rollout([Completion(**c) for c in saved]) for index, saved in state.items()}

    def _sample(self, request: RolloutRequest) -> Rollout:
        try:
            return self._engine.rollout(request)
        finally:
            self._idle_since = time.perf_counter()

    def _finish(self, index: int) -> None:
        while index in self._running:
            self._check()
            try:
                self._rollouts[index] = self._running[index].result(timeout=CHECK_SECONDS)
            except StillRunning:
                continue
            del self._running[index]
