"""What survives a restart: the window in flight and all that counts over steps, in checkpoints that are whole or absent."""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .data import Schedule
from .metrics import MetricLog
from .policy import Completion


CHECKPOINT = re.compile(r"checkpoint-(\d+)")
UNFINISHED = "unfinished"
"""The folder, beside the checkpoints, in which one is written and deleted."""


@dataclass(frozen=True)
class Window:
    """This rank's share of the window in use."""

    index: int
    """From the start of the run."""
    parts: Sequence[Sequence[Completion]]
    """What each optimizer step that the window lasts trains on."""
    table: dict[str, list[Any]]
    """What `log_completions` shows of the completions that this rank has sampled, by column."""
    tokens: int
    """Of the window on all ranks, each prompt counted with each of its completions."""


@dataclass(frozen=True)
class StepShare:
    """What this rank trains on in an optimizer step."""

    completions: Sequence[Completion]
    num_completions: int
    """Of the whole step on all ranks."""


@dataclass
class RunState:
    """What a rank's share of a run is in the middle of, besides what Trainer saves."""

    schedule: dict[str, Any]
    """See `fingerprint`."""
    world_size: int
    window: Window | None
    """None where the next optimizer step begins a new one."""
    metrics: dict[str, list[Any]]
    """What was not logged yet: `MetricLog.state`."""
    scoring: dict[str, Any]
    """How completions are cut into pieces: `Scorer.state`."""
    guards: dict[str, Any]
    """How often in a row each has met what it looks out for."""
    reference: dict[str, Any] | None
    """Weights of a reference that moves; in the first rank's share."""

    def save(self, folder: Path, rank: int) -> None:
        """Write this rank's file into a checkpoint."""
        values = vars(self) | {"window": None if self.window is None else _plain_window(self.window)}
        torch.save(values, _file(folder, rank))

    @classmethod
    def load(cls, folder: Path, rank: int) -> "RunState":
        """Read a rank's file of a checkpoint.

        Raises:
            ValueError: There is none.
        """
        path = _file(folder, rank)
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint={str(folder)!r} has no {path.name}: it was saved with save_only_model=True, or by "
                "another trainer. To start from its weights, pass it as model."
            )
        values = torch.load(path, map_location="cpu", weights_only=True)
        window = values.pop("window")
        if window is not None:
            window["parts"] = [[Completion(**completion) for completion in part] for part in window["parts"]]
            window = Window(**window)
        return cls(window=window, **values)


def resumed_state(folder: Path, rank: int, world_size: int, expected: dict[str, Any]) -> RunState:
    """This rank's share of the run that a checkpoint holds.

    Between two windows the number of ranks may change: the first rank takes over what was not logged yet. `expected` is the
    `fingerprint` of the run that goes on.

    Raises:
        ValueError: The checkpoint is none of this trainer; the run that it holds has other prompts, windows or steps; or
            it stands inside a window, which is dealt to another number of ranks.
    """
    first = RunState.load(folder, 0)
    old, new = first.schedule, expected
    if old != new:
        changed = {name: (old.get(name), new.get(name)) for name in old | new if old.get(name) != new.get(name)}
        if changed.keys() & {"ranks", "completions of a micro-step"}:
            changed["ranks"] = first.world_size, world_size
        told = ", ".join(f"{name}: {then} then, {now} now" for name, (then, now) in changed.items() if then != now)
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} holds a run that cannot go on like this ({told}). Use the options, "
            "the dataset, the engine and the ranks that it was started with. To start a new run from its weights, pass it "
            "as model."
        )
    if first.world_size == world_size:
        return replace(RunState.load(folder, rank), reference=first.reference)
    if first.window is not None:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} stands inside window {first.window.index}, whose completions were "
            f"dealt to {first.world_size} ranks; there are {world_size} now. Resume with {first.world_size} ranks, or from "
            "a checkpoint at a window's end."
        )
    waiting = MetricLog()
    for other in range(first.world_size if rank == 0 else 0):
        waiting.load_state(RunState.load(folder, other).metrics)
    first.metrics = waiting.state()
    return first


def fingerprint(schedule: Schedule, prompts: str, noise: int, engine: str) -> dict[str, Any]:
    """What must be the same for a run to go on: its windows and steps over all ranks, its prompts, its noise, its engine.

    Args:
        schedule: Of the run.
        prompts: `PromptSet.digest`.
        noise: The seed of sampling.
        engine: `sharding.engine_of`; those of DeepSpeed have a shard of each rank in a checkpoint.
    """
    values = vars(schedule) | {"prompts": prompts, "seed of sampling": noise, "engine": engine}
    ranks = values.pop("world_size")
    values["completions of a micro-step"] = values.pop("batch_size") * ranks
    return values | ({"ranks": ranks} if engine.startswith("ZeRO") else {})


# ---- Folders ----
def last_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint of most steps; None where there is none."""
    found = _checkpoints(output_dir)
    return found[-1] if found else None


def finish_checkpoint(unfinished: Path, final: Path) -> None:
    """Give a checkpoint that is complete its name; a file system that fails later still has all of it, or none."""
    for path in [*unfinished.rglob("*"), unfinished]:
        _to_disk(path)
    discard_checkpoint(final)
    unfinished.rename(final)
    _to_disk(final.parent)


def discard_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, if it is there, without leaving half of it under its name."""
    trash = folder.parent / UNFINISHED / f"deleted-{folder.name}"
    shutil.rmtree(trash, ignore_errors=True)
    trash.parent.mkdir(exist_ok=True)
    try:
        folder.rename(trash)
    except FileNotFoundError:
        return
    shutil.rmtree(trash, ignore_errors=True)


def rotate_checkpoints(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, but neither the last one nor the best."""
    found = _checkpoints(output_dir)
    kept = {found[-1], *([Path(best)] if best else [])}
    spare = len(found) - max(limit or len(found), len(kept))
    for folder in [folder for folder in found if folder not in kept][: max(spare, 0)]:
        discard_checkpoint(folder)


def _checkpoints(output_dir: Path) -> list[Path]:
    numbered = {
        int(match[1]): path
        for path in output_dir.glob("*")
        if (match := CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    }
    return [numbered[step] for step in sorted(numbered)]


def _file(folder: Path, rank: int) -> Path:
    return folder / f"grpo_state_{rank}.pt"


def _to_disk(path: Path) -> None:
    """Wait until a file or a folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain_window(window: Window) -> dict[str, Any]:
    """A window in types that can be loaded without running code."""
    return {
        "index": window.index,
        "parts": [[dict(vars(completion)) for completion in part] for part in window.parts],
        "table": {name: [_plain(value) for value in values] for name, values in window.table.items()},
        "tokens": window.tokens,
    }


def _plain(value: Any) -> Any:
    """What reward functions note may be anything; what is not plain becomes text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(value)
