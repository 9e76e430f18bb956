"""A run on a terminal: progress, reward, phases, memory, the best and the worst completion of the last log."""

import datetime
import math
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .completions import shown_as
from .run import Run, newest_completions
from .tolerant import clean


BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=*%#@"
SPARKS = 48
EXCERPT = 400
"""Characters of a completion that are shown."""
NUMBERS = (
    ("kl", "KL"),
    ("entropy", "entropy"),
    ("completions/mean_length", "tokens per completion"),
    ("frac_reward_zero_std", "groups with equal rewards"),
    ("grad_norm", "gradient norm"),
    ("memory/peak_gib", "peak memory, GiB"),
)


def sparkline(values: list[float], width: int = SPARKS, blocks: str = BLOCKS) -> str:
    """Draw values as a line of blocks, the newest at the right; several share a block if there are many."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    share = max(1, math.ceil(len(finite) / width))
    means = [sum(part) / len(part) for part in (finite[i : i + share] for i in range(0, len(finite), share))]
    low, high = min(means), max(means)
    top = len(blocks) - 0.001
    return "".join(blocks[int((mean - low) / (high - low) * top) if high > low else 0] for mean in means)


class _Sparkline:
    """A sparkline in characters that the terminal has."""

    def __init__(self, values: list[float]):
        self.values = values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blocks = ASCII_BLOCKS if options.ascii_only else BLOCKS
        yield Text(sparkline(self.values, min(SPARKS, options.max_width), blocks), style="green")


class _Foreign:
    """Text of others, without control codes, and with escapes for characters that the terminal lacks."""

    def __init__(self, text: str):
        self.text = clean(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text.encode(options.encoding, "backslashreplace").decode(options.encoding))


def view(
    run: Run, folder: Path | None = None, step: int | None = None, pace: float | None = None, doing: str = ""
) -> RenderableType:
    """Show a run as it is now.

    Args:
        run: What it has logged.
        folder: Where its completions are.
        step: The optimizer step it has reached; that of the last log if None.
        pace: Seconds of a step; those of the last log if None.
        doing: The phase that is under way.
    """
    reached, seconds = run.step if step is None else step, run.last("step_time") if pace is None else pace
    parts: list[RenderableType] = [_progress(run, reached, seconds, doing), _metrics(run)]
    table = newest_completions(folder, _differ) if folder is not None else {}
    return Panel(Group(*parts, *_extremes(table)), title=Text(clean(run.name)), border_style="dim")


def _progress(run: Run, step: int, seconds: float | None, doing: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        ProgressBar(total=max(run.max_steps, 1), completed=step, width=40),
        Text(f"step {step} of {run.max_steps}"),
        Text(clean(run.over) or _left(max(run.max_steps - step, 0), seconds)),
        Text(clean(doing), style="dim"),
    )
    return grid


def _left(steps: int, seconds: float | None) -> str:
    """The time that is left for so many steps; empty while it is unknown."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    return f"{datetime.timedelta(seconds=round(seconds * steps))} left"


def _metrics(run: Run) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, title in (("reward", "reward"), ("eval_reward", "held-out reward")):
        _, values = run.series(name)
        if values:
            grid.add_row(
                Text(title, style="dim"),
                Text(f"{values[-1]:.4g}", style="bold"),
                _Sparkline(values),
            )
    for name, title in NUMBERS:
        value = run.last(name)
        if value is not None:
            grid.add_row(Text(title, style="dim"), Text(f"{value:.4g}"), "")
    _add_phases(grid, run)
    return grid


def _add_phases(grid: Table, run: Run) -> None:
    logged: dict[str, Any] = next((entry for entry in reversed(run.entries) if "time/update" in entry), {})
    phases = {name[len("time/") :]: value for name, value in logged.items() if name.startswith("time/")}
    total = sum(phases.values())
    if total > 0:
        shares = ", ".join(f"{clean(name)} {value / total:.0%}" for name, value in phases.items())
        grid.add_row(Text("a step takes", style="dim"), Text(f"{total:.3g} s"), Text(shares))


def _known(table: dict[str, list[Any]]) -> list[int]:
    """The rows that have an advantage."""
    advantages = table.get("advantage", [])
    return [row for row, value in enumerate(advantages) if isinstance(value, float) and math.isfinite(value)]


def _differ(table: dict[str, list[Any]]) -> bool:
    return len({table["advantage"][row] for row in _known(table)}) > 1


def _extremes(table: dict[str, list[Any]]) -> list[RenderableType]:
    """The completions of the largest and of the smallest advantage."""
    rows, advantages = _known(table), table.get("advantage", [])
    if not rows:
        return []
    best, worst = max(rows, key=advantages.__getitem__), min(rows, key=advantages.__getitem__)
    return [_excerpt(table, best, "best", "green"), _excerpt(table, worst, "worst", "red")]


def _excerpt(table: dict[str, list[Any]], row: int, title: str, color: str) -> Panel:
    text = clean(shown_as(table["completion"][row]))
    text = text if len(text) <= EXCERPT else f"{text[:EXCERPT]}..."
    label = f"{title} completion, advantage {table['advantage'][row]:+.3g}"
    return Panel(_Foreign(text), title=Text(label), title_align="left", border_style=color)
