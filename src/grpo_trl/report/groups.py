"""Completions of a run as the page shows them: group by group, and the first evaluation beside the last."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .completions import shown_as
from .log import completion_files, evaluation_files, plain, step_of
from .run import Run, read_completions
from .tolerant import clean


MOST_COMPLETIONS = 10_000
"""Of all runs together; above that, whole groups are left out evenly."""
MOST_CHARACTERS = 8_000_000
"""Of all prompts and completions together."""
LONGEST = 20_000
"""Characters of a prompt or completion that are shown."""

Group = dict[str, Any]
"""A step, a prompt, and its rows: text, reward, advantage, reward of each function."""


def groups_of(folder: Path, run: Run) -> list[Group]:
    """Read the groups of a run that were kept while it trained."""
    return [group for file in completion_files(folder) for group in _groups(file, run)]


def evaluations_of(folder: Path, run: Run) -> list[dict[str, Any]]:
    """Read the prompts of the first and the last evaluation of each dataset: name, steps, and pairs of groups."""
    found = []
    for name, files in evaluation_files(folder).items():
        if len(files) < 2:
            continue
        last = {group["number"]: group for group in _groups(files[-1], run)}
        pairs = [
            {"prompt": group["prompt"], "first": group["rows"], "last": last[group["number"]]["rows"]}
            for group in _groups(files[0], run)
            if group["number"] in last
        ]
        found.append({"name": clean(name), "steps": [step_of(files[0]), step_of(files[-1])], "pairs": pairs})
    return found


def stride(groups: Sequence[Group], most_completions: int, most_characters: int) -> int:
    """Keep every so many groups, so that no more remain."""
    rows = [[row for name in ("rows", "first", "last") for row in group.get(name, [])] for group in groups]
    completions = sum(map(len, rows))
    characters = sum(len(group["prompt"]) for group in groups) + sum(len(row["text"]) for of in rows for row in of)
    return max(1, math.ceil(completions / most_completions), math.ceil(characters / most_characters))


def _groups(file: Path, run: Run) -> Iterable[Group]:
    try:
        table = read_completions(file)
    except (OSError, ValueError):
        return  # written by a run that is not over, or that was killed while it wrote
    weights = _weights(run, table)
    starts = [row for row, group in enumerate(table["group"]) if row == 0 or group != table["group"][row - 1]]
    for start, end in zip(starts, [*starts[1:], len(table["group"])], strict=True):
        yield {
            "step": int(table["step"][start]),
            "number": int(table["group"][start]),
            "prompt": _text(table["prompt"][start]),
            "rows": [_row(table, row, weights) for row in range(start, end)],
        }


def _weights(run: Run, table: dict[str, list[Any]]) -> dict[str, float]:
    """The weight of each reward function among the columns."""
    logged = {name for entry in run.entries for name in entry if name.endswith("/mean")}
    names = [name for name in table if any(metric.endswith(f"rewards/{name}/mean") for metric in logged)]
    given = run.config.get("reward_weights") or [1.0] * len(names)
    return dict(zip(names, given, strict=False))


def _row(table: dict[str, list[Any]], row: int, weights: dict[str, float]) -> dict[str, Any]:
    values = {name: table[name][row] for name in weights}
    defined = [weights[name] * value for name, value in values.items() if value is not None and not math.isnan(value)]
    return {
        "text": _text(table["completion"][row]),
        "reward": plain(sum(defined)) if defined else None,
        "advantage": plain(table["advantage"][row]) if "advantage" in table else None,
        "parts": {clean(name): plain(value) for name, value in values.items()} if len(values) > 1 else {},
    }


def _text(value: Any) -> str:
    text = clean(shown_as(value))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"
