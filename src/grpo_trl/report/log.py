"""What every run leaves in its output directory, whatever `report_to` says.

    log.jsonl           a line per log, and one where the run starts or resumes
    run_config.json     the options
    environment.json    versions and hardware
    plan.json           what the run was planned to do and to cost
    completions/        parquet files, one per log: a sample of groups, or all completions with `log_completions`
    evaluations/        parquet files of the first and the last evaluation, or of all with `log_completions`

Nothing here ends a run: what cannot be written is one warning.
"""

import itertools
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from .completions import write_completions
from .tolerant import clean, str_of, tolerated


LOG, CONFIG, ENVIRONMENT, PLAN, COMPLETIONS, EVALUATIONS = (
    "log.jsonl",
    "run_config.json",
    "environment.json",
    "plan.json",
    "completions",
    "evaluations",
)
SAMPLED_GROUPS = 8
"""Groups of a generation batch that are kept at a log."""
SAMPLED_FILES = 128
"""Logs of which a sample is kept; above that, every second one goes."""


class RunLog:
    """Writes the log of a run; one process does.

    Args:
        folder: The output directory.
        keeps_all: Keep all completions of all logs, not a bounded sample.
    """

    def __init__(self, folder: Path, keeps_all: bool = False):
        self.folder = folder
        self.keeps_all = keeps_all
        self._logs, self._stride = 0, 1

    def start(self, step: int, max_steps: int, facts: Mapping[str, Any]) -> None:
        """Note that the run starts, or resumes, after optimizer step `step`.

        Args:
            step: Lines of later steps in the log are superseded, and their completions deleted.
            max_steps: Optimizer steps of the whole run.
            facts: Contents of further files by name, e.g. `{"run_config.json": {...}}`.
        """
        if step == 0:
            self._set_aside()
        else:
            self._delete_after(step)
        for name, content in facts.items():
            with tolerated(f"Writing {self.folder / name}"):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_text(json.dumps(plain(content), indent=2) + "\n", encoding="utf-8")
        process = {"host": platform.node(), "pid": os.getpid()}
        self._append({"event": "start", "step": step, "max_steps": max_steps} | process)

    def entry(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a line with the metrics of a log."""
        self._append({"step": step} | dict(metrics))

    def end(self, step: int) -> None:
        """Note that training has ended."""
        self._append({"event": "end", "step": step})

    def stop(self, step: int, reason: str) -> None:
        """Note that the run has stopped before its end, and why."""
        self._append({"event": "stop", "step": step, "reason": reason})

    def completions(self, step: int, table: dict[str, list[Any]], num_generations: int) -> None:
        """Keep the completions of a generation batch, group after group.

        Args:
            step: The optimizer step.
            table: Columns of equal length.
            num_generations: Completions of a group, which stand together.
        """
        self._logs += 1
        if not self.keeps_all and (self._logs - 1) % self._stride:
            return
        with tolerated(f"Keeping completions in {self.folder / COMPLETIONS}"):
            count = None if self.keeps_all else SAMPLED_GROUPS * num_generations
            kept = {name: column[:count] for name, column in table.items()}
            file = self.folder / COMPLETIONS / f"completions_{step:05d}.parquet"
            write_completions(_places(step, kept, num_generations) | kept, file)
            self._thin_out()

    def evaluation(self, step: int, name: str, table: dict[str, list[Any]], num_generations: int) -> None:
        """Keep the completions of an evaluation; of an earlier one only if it was the first, or all are kept.

        Args:
            step: The optimizer step.
            name: Of what was evaluated.
            table: Columns of equal length, group after group.
            num_generations: Completions of a group.
        """
        with tolerated(f"Keeping completions in {self.folder / EVALUATIONS}"):
            file = self.folder / EVALUATIONS / f"{quote(name, safe='')}_{step:05d}.parquet"
            write_completions(_places(step, table, num_generations) | table, file)
            if not self.keeps_all:
                self._delete(evaluation_files(self.folder)[name][1:-1])

    def _set_aside(self) -> None:
        """Rename what an earlier run has left here: log.1.jsonl, completions.1, or the next number that is free."""
        with tolerated(f"Renaming the log of an earlier run in {self.folder}"):
            taken = [self.folder / name for name in (LOG, COMPLETIONS, EVALUATIONS) if (self.folder / name).exists()]
            number = next(n for n in itertools.count(1) if not any(_numbered(path, n).exists() for path in taken))
            for path in taken:
                path.rename(_numbered(path, number))

    def _delete_after(self, step: int) -> None:
        with tolerated(f"Deleting completions of later steps in {self.folder}"):
            files = [*completion_files(self.folder), *itertools.chain(*evaluation_files(self.folder).values())]
            self._delete([file for file in files if step_of(file) > step])

    def _thin_out(self) -> None:
        files = completion_files(self.folder)
        if not self.keeps_all and len(files) > SAMPLED_FILES:
            self._stride *= 2
            self._delete(files[1::2])

    def _delete(self, files: list[Path]) -> None:
        with tolerated(f"Deleting older completions in {self.folder}"):
            for file in files:
                file.unlink(missing_ok=True)

    def _append(self, entry: dict[str, Any]) -> None:
        with tolerated(f"Writing {self.folder / LOG}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"time": round(time.time(), 3)} | plain(entry), allow_nan=False)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _places(step: int, table: dict[str, list[Any]], num_generations: int) -> dict[str, list[Any]]:
    """The columns that say where completions belong."""
    rows = range(len(table["prompt"]))
    return {"step": [step for _ in rows], "group": [row // num_generations for row in rows]}


def completion_files(folder: Path) -> list[Path]:
    """List the files of completions of a run, by optimizer step."""
    return sorted((folder / COMPLETIONS).glob("completions_*.parquet"), key=step_of)


def evaluation_files(folder: Path) -> dict[str, list[Path]]:
    """List the files of evaluations of a run by what was evaluated, each by optimizer step."""
    files = sorted((folder / EVALUATIONS).glob("*_*.parquet"), key=step_of)
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(unquote(file.stem.rpartition("_")[0]), []).append(file)
    return found


def step_of(file: Path) -> int:
    """Read the optimizer step in the name of a file of completions."""
    return int(file.stem.rpartition("_")[2])


def plain(value: Any) -> Any:
    """Convert any object to what JSON has; numbers that are not finite become their names: "nan", "inf", "-inf"."""
    if isinstance(value, Mapping):
        return {clean(str_of(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item())
    return clean(str_of(value))
