"""What a scheduler sends before it takes the machine away, and how ranks hear of each other's errors."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from .errors import RunStopped, StopRequested


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

EXIT_CODE = 75
"""Of a run that a signal has stopped and that can be resumed: EX_TEMPFAIL of sysexits.h."""

Result = TypeVar("Result")


class StopSignals:
    """Takes SIGTERM and SIGUSR1 while a run is `listening`, in the main thread; elsewhere it hears nothing."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._breaks_in = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, a signal is noted; the handlers are as they were after."""
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.received = None

    @contextlib.contextmanager
    def breaking_in(self) -> Iterator[None]:
        """Inside, which is somebody else's code, a signal raises at once.

        Raises:
            StopRequested: A signal comes, or has come.
        """
        self._breaks_in = True
        try:
            self.check()
            yield
        finally:
            self._breaks_in = False

    def check(self) -> None:
        """Raises:
        StopRequested: A signal has come.
        """
        if self.received is not None:
            raise StopRequested(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if self._breaks_in:
            self._breaks_in = False  # once: what is on its way out must not be broken again
            raise StopRequested(self.received)


def together(work: Callable[[], Result], rank: int, gather: Callable[[list[Any]], list[Any]]) -> Result:
    """`work()` on every rank. What some rank meets is raised on all of them, so that none waits for it.

    Args:
        work: Is no collective where it may raise.
        rank: Of this process.
        gather: From a list of objects on this rank to the concatenated lists of all ranks. Called once.

    Raises:
        StopRequested: A signal has come, to some rank.
        RunStopped: Some rank has met one.
        RuntimeError: Another rank has met another error; a rank's own errors are raised as they are.
    """
    error: BaseException | None = None
    try:
        result = work()
    except (Exception, StopRequested) as met:
        error = met
    report = (
        None if error is None else (rank, isinstance(error, StopRequested), isinstance(error, RunStopped), repr(error))
    )
    reports = [report for report in gather([report]) if report is not None]
    failures = [(where, saved, text) for where, stops, saved, text in reports if not stops]
    all_save = all(saved for _, saved, _ in failures)  # or none does: saving takes all ranks
    if isinstance(error, RunStopped) and not all_save:
        raise RuntimeError(str(error)) from error
    if error is not None and (not failures or not isinstance(error, StopRequested)):
        raise error
    if failures:
        where, _, text = failures[0]
        raise (RunStopped if all_save else RuntimeError)(f"Rank {where}: {text}")
    if reports:
        raise StopRequested(f"rank {reports[0][0]} was asked to stop")
    return result
