"""A word when something takes long: a hang says nothing by itself."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator


logger = logging.getLogger(__name__)


class Watchdog:
    """Warns of a phase that takes longer than `seconds`, and again whenever that time has doubled.

    Args:
        seconds: None: never.
        rank: Of this process, for the message.
    """

    def __init__(self, seconds: float | None, rank: int):
        self.seconds = seconds
        self.rank = rank
        self.now: tuple[str, float] | None = None
        """The phase that is under way, and when it began, by `time.monotonic`."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch what runs inside; `name` reads as in "sampling has taken 600 s"."""
        before, self.now = self.now, (name, time.monotonic())
        ended = threading.Event()
        if self.seconds is not None:
            threading.Thread(target=self._watch, args=(name, self.seconds, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            self.now = before

    def _watch(self, name: str, seconds: float, ended: threading.Event) -> None:
        start = time.monotonic()
        while not ended.wait(start + seconds - time.monotonic()):
            logger.warning("Rank %d: %s has taken %.4g s so far (phase_warning_seconds).", self.rank, name, seconds)
            seconds *= 2
