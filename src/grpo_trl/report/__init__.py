"""What a person looks at: completions, curves, the log of a run and its page, the model card."""

from .card import append_objective
from .completions import merge_tables, print_completions, write_completions
from .curves import CURVES, plot_run
from .html import write_report
from .log import RunLog
from .run import Run


__all__ = [
    "CURVES",
    "Run",
    "RunLog",
    "append_objective",
    "merge_tables",
    "plot_run",
    "print_completions",
    "write_completions",
    "write_report",
]
