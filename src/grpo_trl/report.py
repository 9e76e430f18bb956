"""What a person looks at: the table of completions and the curves of a run."""

import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from rich.console import Console
from rich.table import Table
from rich.text import Text


CURVES = (
    ("reward", "reward"),
    ("eval_reward", "reward, held out"),
    ("policy_signal", "size of the policy gradient's signal"),
    ("frac_reward_zero_std", "share of groups with equal rewards"),
    ("completions/mean_length", "tokens per completion"),
    ("entropy", "entropy (nats)"),
    ("kl", "KL to the reference (nats)"),
    ("grad_norm", "norm of the gradient"),
    ("step_time", "seconds per step"),
)
"""Metrics that are drawn, where the log has them, and their titles."""

PAPERS = {"token": ["2402.03300"], "sequence": ["2405.04434", "2412.19437"]}
"""The papers of each `loss_level`, by their number on arXiv."""


def merge_tables(parts: list[dict[str, list[Any]]], unique_prompts: bool = False) -> dict[str, list[Any]]:
    """The tables of all ranks as one, rank after rank.

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
    """Write the columns of `table` to a parquet file; the folder is made. Columns of mixed kinds are written as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({name: _arrow(values) for name, values in table.items()}), path)


def print_completions(
    table: dict[str, list[Any]], step: int, limit: int | None = None, console: Console | None = None
) -> None:
    """Print a table of completions.

    Args:
        table: Columns of equal length, `"prompt"` and `"completion"` first; numbers in the others.
        step: The optimizer step, for the title.
        limit: Print this many rows, drawn at random without touching the global random state; all if None.
        console: Where to print; a new one on standard output if None.
    """
    rows: list[int] = list(range(len(table["prompt"])))
    if limit is not None and limit < len(rows):
        rows = sorted(random.Random(step).sample(rows, max(limit, 0)))
    view = Table(title=f"step {step}", show_lines=True, expand=True)
    for name in table:
        wide = name in ("prompt", "completion")
        view.add_column(Text(name), ratio=4 if wide else 1, overflow="fold", justify="left" if wide else "right")
    for row in rows:
        view.add_row(*(Text(_shown(values[row])) for values in table.values()))
    (console or Console()).print(view)


def plot_run(log_history: list[dict[str, float]], path: str | Path, title: str = "") -> None:
    """Draw the curves of a run as a PNG.

    Args:
        log_history: `trainer.state.log_history`.
        path: Where the picture goes; the folder is made.
        title: Stands above it.

    Raises:
        ValueError: The log has none of the metrics in `CURVES`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [(name, label) for name, label in CURVES if any(name in entry for entry in log_history)]
    if not drawn:
        raise ValueError(
            "log_history holds none of the metrics that are drawn; train for at least logging_steps steps."
        )
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, label) in enumerate(drawn, start=1):
        axes = figure.add_subplot(lines, columns, place)
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 15 else None, markersize=3, linewidth=1.4)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def append_objective(card: Path, loss_level: str) -> None:
    """Add the training objective and its papers to a model card, where there is one."""
    if card.exists():
        papers = " and ".join(f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in PAPERS[loss_level])
        text = f'GRPO, `loss_level="{loss_level}"` ({papers}), with grpo_trl.'
        card.write_text(f"{card.read_text()}\n## Training objective\n\n{text}\n")


def _arrow(values: list[Any]) -> pyarrow.Array:
    """A column; as text where its values are of several kinds, since a log must not end a run."""
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError):
        return pyarrow.array([None if value is None else str(value) for value in values])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list) and all(isinstance(m, dict) and "content" in m for m in value):
        return "\n".join(f"{m['role']}: {m['content']}" for m in value)
    return str(value)
