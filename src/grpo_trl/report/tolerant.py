"""Logging that cannot end a run: what fails is reported once, and any object becomes text that is safe to show."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..logging import get_logger


logger = get_logger(__name__)

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control codes except tab and newline, marks that turn the direction of writing, and halves of surrogate pairs."""

_reported: set[str] = set()


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Continue after an exception inside, with one warning per `what` and process.

    Signals and interrupts still pass.
    """
    try:
        yield
    except Exception as error:
        if what not in _reported:
            _reported.add(what)
            logger.warning(
                "%s failed (%s: %s); training continues, and this is reported once.",
                what,
                type(error).__name__,
                str_of(error),
            )


def str_of(value: Any) -> str:
    """Convert any object to text, whatever its own `__str__` does."""
    try:
        return str(value)
    except Exception as error:
        return f"<{type(value).__name__} without text: {type(error).__name__}>"


def clean(text: str) -> str:
    """Replace what could act on a terminal or a page by its escape: `"\\x1b[2J"` is shown as `\\x1b[2J`."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
