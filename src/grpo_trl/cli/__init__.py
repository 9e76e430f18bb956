"""The command `grpo-trl`: plan, train, init, watch, report."""

from .app import app, main


__all__ = ["app", "main"]
