"""What a person looks at: completions, curves, the model card."""

from .card import append_objective
from .completions import merge_tables, print_completions, write_completions
from .curves import CURVES, plot_run


__all__ = ["CURVES", "append_objective", "merge_tables", "plot_run", "print_completions", "write_completions"]
