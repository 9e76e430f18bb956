"""A run as it was logged: read from its folder, of this process or of another."""

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet

from .log import CONFIG, ENVIRONMENT, LOG, PLAN, completion_files


LOOKED_AT = 8
"""Files of completions, the newest, of which one is shown."""


@dataclass
class Run:
    """What a run has logged so far."""

    name: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    """The metrics of each log, with "time" and "step"; numbers are floats."""
    max_steps: int = 0
    started: float = 0.0
    """Time of the first start, in seconds since 1970."""
    ended: bool = False
    stopped: str = ""
    """Why it stopped before its end; empty if it did not."""
    process: tuple[str, int] = ("", 0)
    """Host and number of the process that started or resumed it last."""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """Read the log of a run; an unfinished line at its end is left out.

        Raises:
            ValueError: The folder holds no log of a run.
        """
        path = Path(folder)
        if not (path / LOG).is_file():
            raise ValueError(f"{str(path)!r} holds no {LOG}; give the output_dir of a run of grpo_trl.")
        run = cls(path.resolve().name)
        for line in (path / LOG).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                run.add(json.loads(line))
            except json.JSONDecodeError:
                continue
        run.config, run.environment, run.plan = (_content(path / name) for name in (CONFIG, ENVIRONMENT, PLAN))
        return run

    def add(self, entry: dict[str, Any]) -> None:
        """Add a line of the log. Where a run resumes, lines of later steps are superseded."""
        event = entry.get("event")
        if event == "start":
            self.entries = [e for e in self.entries if e["step"] <= entry["step"] and entry["step"] > 0]
            self.max_steps, self.ended, self.stopped = entry["max_steps"], False, ""
            self.process = (str(entry.get("host", "")), int(entry.get("pid", 0)))
            self.started = self.started if self.entries else entry["time"]
        elif event == "end":
            self.ended = True
        elif event == "stop":
            self.stopped = str(entry["reason"])
        else:
            self.entries.append({name: _number(value) for name, value in entry.items()})

    @property
    def over(self) -> str:
        """Say in a phrase how the run ended; empty while it seems to be running."""
        if self.ended or self.stopped:
            return "ended" if self.ended else f"stopped: {self.stopped}"
        host, number = self.process
        here = host == platform.node() and number > 0
        return "" if not here or psutil.pid_exists(number) else "stopped: its process is gone"

    @property
    def step(self) -> int:
        """The last optimizer step in the log."""
        return int(self.entries[-1]["step"]) if self.entries else 0

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Read the steps and values of a metric, where it is logged."""
        points = [(int(e["step"]), e[name]) for e in self.entries if isinstance(e.get(name), float)]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, name: str) -> float | None:
        """Read the newest value of a metric."""
        _, values = self.series(name)
        return values[-1] if values else None


def read_completions(file: Path) -> dict[str, list[Any]]:
    """Read the columns of a file of completions."""
    return pyarrow.parquet.read_table(file).to_pydict()


def newest_completions(
    folder: Path, wanted: Callable[[dict[str, list[Any]]], bool] = lambda table: True
) -> dict[str, list[Any]]:
    """Read the newest file of completions that is complete and as `wanted`; empty if none of the last few is."""
    for file in reversed(completion_files(folder)[-LOOKED_AT:]):
        try:
            table = read_completions(file)
        except (OSError, ValueError):
            continue  # another process is writing it
        if wanted(table):
            return table
    return {}


def _content(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _number(value: Any) -> Any:
    """Numbers as floats, also those that JSON has no word for."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, float)) or value in ("nan", "inf", "-inf"):
        return float(value)
    return value
