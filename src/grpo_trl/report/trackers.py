"""Tables of completions for the trackers that a run reports to."""

import importlib
from pathlib import Path
from typing import Any

from .completions import shown_as
from .tolerant import clean, str_of, tolerated


def track_completions(table: dict[str, list[Any]], step: int, report_to: list[str], output_dir: str) -> None:
    """Send a table of completions to wandb, trackio and tensorboard, where the run reports to them.

    What fails is one warning per tracker.

    Args:
        table: Columns of equal length.
        step: The optimizer step.
        report_to: As in the configuration.
        output_dir: Where tensorboard writes if TENSORBOARD_LOGGING_DIR is not set.
    """
    senders = {"wandb": _to_wandb, "trackio": _to_trackio, "tensorboard": _to_tensorboard}
    for name, send in senders.items():
        if name in report_to:
            with tolerated(f"Sending completions to {name}"):
                send(_as_cells(table), step, output_dir)


def _as_cells(table: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Numbers as they are, everything else as text without control codes."""
    return {
        clean(str_of(name)): [value if type(value) in (int, float) else clean(shown_as(value)) for value in values]
        for name, values in table.items()
    }


def _to_wandb(table: dict[str, list[Any]], step: int, output_dir: str) -> None:
    wandb = importlib.import_module("wandb")
    if wandb.run is not None:
        rows = [list(row) for row in zip(*table.values(), strict=True)]
        wandb.log({"completions": wandb.Table(columns=list(table), data=rows, allow_mixed_types=True)})


def _to_trackio(table: dict[str, list[Any]], step: int, output_dir: str) -> None:
    trackio, pandas = importlib.import_module("trackio"), importlib.import_module("pandas")
    trackio.log({"completions": trackio.Table(dataframe=pandas.DataFrame(table))})


def _to_tensorboard(table: dict[str, list[Any]], step: int, output_dir: str) -> None:
    tensorboard = importlib.import_module("torch.utils.tensorboard")
    head = "|" + "|".join(table) + "|\n|" + "---|" * len(table)
    rows = ["|" + "|".join(_cell(value) for value in row) + "|" for row in zip(*table.values(), strict=True)]
    with tensorboard.SummaryWriter(str(Path(output_dir) / "runs" / "completions")) as writer:
        writer.add_text("completions", "\n".join([head, *rows]), step)


def _cell(value: Any) -> str:
    """A value in a table of Markdown, which tensorboard renders."""
    text = shown_as(value)
    for character in "\\`*_{}[]<>|#":
        text = text.replace(character, f"&#{ord(character)};")
    return text.replace("\n", "<br>")
