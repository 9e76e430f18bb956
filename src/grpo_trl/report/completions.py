"""Tables of completions: joined over ranks, written to parquet, printed."""

import random
import sys
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .tolerant import clean, str_of, tolerated


CELL = 4000
"""Characters of a cell that are printed."""


def merge_tables(parts: list[dict[str, list[Any]]], unique_prompts: bool = False) -> dict[str, list[Any]]:
    """Join the tables of all ranks, rank after rank.

    Args:
        parts: Columns by name, of equal length within a part, each with a column `"prompt"`. What a part lacks is None.
        unique_prompts: Keep the first row of each prompt alone.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    table = {name: [v for part in parts for v in part.get(name, [None] * len(part["prompt"]))] for name in names}
    if not unique_prompts:
        return table
    rows: dict[str, int] = {}
    for row, prompt in enumerate(table["prompt"]):
        rows.setdefault(str(prompt), row)
    return {name: [values[row] for row in rows.values()] for name, values in table.items()}


def write_completions(table: dict[str, list[Any]], path: Path) -> None:
    """Write the columns of `table` to a parquet file; the folder is made.

    A column that parquet cannot hold (of mixed kinds, huge integers, arbitrary objects) is written as text. A file that
    cannot be written is a warning.
    """
    with tolerated(f"Writing completions to {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {clean(str_of(name)): _arrow(values) for name, values in table.items()}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)


def print_completions(
    table: dict[str, list[Any]], step: int, limit: int | None = None, console: Console | None = None
) -> None:
    """Print a table of completions; where that fails, warn.

    Args:
        table: Columns of equal length, `"prompt"` and `"completion"` first; numbers in the others.
        step: The optimizer step, for the title.
        limit: Print this many rows, chosen at random without touching the global random state; all if None.
        console: Where to print; a new one on standard output if None.
    """
    with tolerated("Printing completions"):
        rows: list[int] = list(range(len(table["prompt"])))
        if limit is not None and limit < len(rows):
            rows = sorted(random.Random(step).sample(rows, max(limit, 0)))
        view = Table(title=f"step {step}", show_lines=True, expand=True)
        for name in table:
            wide = name in ("prompt", "completion")
            view.add_column(as_text(name), ratio=4 if wide else 1, overflow="fold", justify="left" if wide else "right")
        for row in rows:
            view.add_row(*(as_text(values[row]) for values in table.values()))
        if console is None:
            _print(view)
        else:
            console.print(view)


def as_text(value: Any) -> Text:
    """Render a value for a terminal: without markup, without control codes, not longer than `CELL` characters."""
    shown = clean(shown_as(value))
    return Text(shown if len(shown) <= CELL else f"{shown[:CELL]}... ({len(shown):,} characters)")


def shown_as(value: Any) -> str:
    """Read a value as a person does: numbers with three digits, conversations as roles and contents, one message alone."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list) and all(isinstance(m, dict) and "content" in m for m in value):
        if len(value) == 1:
            return str_of(value[0]["content"])
        return "\n".join(f"{m.get('role', '')}: {str_of(m['content'])}" for m in value)
    return str_of(value)


def _print(view: Table) -> None:
    """Print on standard output, in characters that its encoding has."""
    if sys.stdout is None or getattr(sys.stdout, "closed", False):
        raise ValueError("standard output is closed")
    console = Console()
    with console.capture() as captured:
        console.print(view)
    stream: TextIO = sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(captured.get().encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def _arrow(values: list[Any]) -> pyarrow.Array:
    """Convert a column; to text where its values are of several kinds, or of none that parquet has."""
    try:
        column = pyarrow.array(values)
        if pyarrow.types.is_nested(column.type):  # some of these exist, and cannot be written: {} in each row
            pyarrow.parquet.write_table(pyarrow.table({"": column}), pyarrow.BufferOutputStream())
        return column
    except Exception:
        return pyarrow.array([None if value is None else clean(str_of(value)) for value in values])
