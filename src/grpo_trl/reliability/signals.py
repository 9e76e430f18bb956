"""What a scheduler sends before it takes the machine away, and how ranks hear of each other's errors."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from ..errors import StopRequested


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

EXIT_CODE = 75
"""Of a run that a signal has stopped and that can be resumed: EX_TEMPFAIL of sysexits.h."""


class StopSignals:
    """Takes SIGTERM and SIGUSR1 while a run is `listening`, in the main thread; elsewhere it hears nothing."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._interruptible = False

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
    def interruptible(self) -> Iterator[None]:
        """Inside, which is somebody else's code, a signal raises at once. Other threads than the main one hear nothing.

        Raises:
            StopRequested: A signal comes, or has come.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._interruptible = True
        try:
            self.check()
            yield
        finally:
            self._interruptible = False

    def check(self) -> None:
        """Raises:
        StopRequested: A signal has come.
        """
        if self.received is not None:
            raise StopRequested(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if self._interruptible:
            self._interruptible = False  # once: what is on its way out must not be broken again
            raise StopRequested(self.received)
