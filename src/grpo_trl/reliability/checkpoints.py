"""Folders of checkpoints that are complete or absent."""

import os
import re
import shutil
from pathlib import Path


CHECKPOINT = re.compile(r"checkpoint-(\d+)")


UNFINISHED = "unfinished"
"""The folder, beside the checkpoints, in which one is written and deleted."""


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


def _to_disk(path: Path) -> None:
    """Wait until a file or a folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
