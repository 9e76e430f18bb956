"""The event loop in which reward functions that are coroutines run."""

import asyncio
import threading
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any

from .isolation import isolated


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


async def finish(awaitable: Awaitable[Any]) -> Any:
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
