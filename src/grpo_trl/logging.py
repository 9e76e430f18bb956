"""Warnings, given once however many ranks there are."""

import logging
import os


EVERY_RANK = {"every_rank": True}
"""`extra` of a warning whose facts differ between ranks."""


def get_logger(name: str) -> logging.Logger:
    """A logger of what all ranks find alike, so that the first one says it.

    That of accelerate raises where its state is not made yet, which is when a wrong launch is told.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_is_wanted)
    return logger


def _is_wanted(record: logging.LogRecord) -> bool:
    return os.environ.get("RANK", "0") == "0" or getattr(record, "every_rank", False)
