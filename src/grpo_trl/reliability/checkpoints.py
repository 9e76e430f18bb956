"""Folders of checkpoints: each is complete or absent, carries a manifest of its files, and belongs to a run."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..logging import get_logger


logger = get_logger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")

UNFINISHED = "unfinished"
"""The folder, beside the checkpoints, in which one is written and deleted."""
MANIFEST = "manifest.json"
LOCK = ".lock"
EDITABLE = ("README.md",)
"""Files of a checkpoint that a user may change: nothing is resumed from them."""


@dataclass(frozen=True)
class FileRecord:
    """What a file of a checkpoint was when it was saved."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return cls(path.stat().st_size, digest.hexdigest())


@dataclass(frozen=True)
class Manifest:
    """Describes a checkpoint: whose it is, and the files it must have."""

    run: str
    """Identifies the run, over all its interruptions."""
    step: int
    saved: float
    """Seconds since 1970."""
    resumable: bool
    """False where the model alone was saved."""
    files: dict[str, FileRecord]
    """By their path within the folder."""

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Return the manifest of a checkpoint; None where it has none that can be read."""
        try:
            values = json.loads((folder / MANIFEST).read_text())
            files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
            manifest = cls(files=files, **values | {"saved": float(values["saved"])})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return manifest if math.isfinite(manifest.saved) else None


def prepare_output_dir(output_dir: str) -> str:
    """Make the folder of a run, and return its absolute path, which no later change of the working directory moves.

    Raises:
        ValueError: It can be no folder.
    """
    try:
        if not output_dir:
            raise OSError(None, "it is empty")
        path = Path(output_dir).absolute()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"output_dir={output_dir!r} can be no folder ({reason}); choose another one.") from error
    return str(path)


def write_manifest(folder: Path, run: str, step: int, resumable: bool) -> None:
    """Write the manifest of a checkpoint that has all its files."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MANIFEST, *EDITABLE)]
    files = {path.relative_to(folder).as_posix(): FileRecord.of(path) for path in paths}
    manifest = Manifest(run, step, time.time(), resumable, files)
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))


def fault_of(folder: Path) -> str | None:
    """Describe why a run cannot resume from a checkpoint, with the file that is at fault; None if it can."""
    if not folder.is_dir():
        return "does not exist"
    manifest = Manifest.read(folder)
    if manifest is None:
        if (folder / MANIFEST).exists():
            return f"has a damaged {MANIFEST}"
        if names := [path.name for path in _checkpoints(folder)]:
            return (
                f"is a folder of checkpoints ({', '.join(names)}); pass True, which takes the last one, or one of them"
            )
        return f"has no {MANIFEST}: it is incomplete, or was saved by another trainer"
    for name, record in manifest.files.items():
        if fault := _fault_of_file(folder / name, record):
            return fault
    return None if manifest.resumable else "holds the model alone (save_only_model=True)"


def checkpoint_argument(given: Any) -> Path | bool | None:
    """Return what `resume_from_checkpoint` says: a path, True for the last one, or None to start fresh.

    Raises:
        TypeError: It is none of these.
    """
    if not given or given in ("False", "false"):  # as text: of a command line
        return None
    if given is True or given in ("True", "true"):
        return True
    if isinstance(given, (str, os.PathLike)):
        return Path(given)
    raise TypeError(
        f"resume_from_checkpoint={given!r} is a {type(given).__name__}; pass the path of a checkpoint, or True for the "
        "last one in output_dir."
    )


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the checkpoint that was saved last among those a run can resume from; None where there is none.

    Each later one that is passed over is named, with what is wrong with it.
    """
    for folder in reversed(_by_time(_checkpoints(output_dir))):
        fault = fault_of(folder)
        if fault is None:
            return folder
        logger.warning("%s %s; it is passed over.", folder, fault)
    return None


def warn_of_another_run(output_dir: Path) -> None:
    """Log which checkpoints of an earlier run a new one finds in its folder, and what becomes of them."""
    if names := [folder.name for folder in _checkpoints(output_dir)]:
        logger.warning(
            "output_dir=%r holds checkpoints of another run (%s), and this run starts at its beginning. They stay: "
            "save_total_limit counts this run's alone, and one whose name this run needs is renamed to NAME.earlier. To "
            "continue that run, pass resume_from_checkpoint=True; to keep runs apart, choose another output_dir.",
            str(output_dir),
            ", ".join(names),
        )


def finish_checkpoint(unfinished: Path, final: Path) -> None:
    """Give a checkpoint that is complete its name; a file system that fails later still has all of it, or none.

    An older one of that name is deleted if it is of the same run, and renamed otherwise.
    """
    for path in [*unfinished.rglob("*"), unfinished]:
        _to_disk(path)
    if final.exists() and _run_of(final) != _run_of(unfinished):
        final.rename(_free_name(final))
    discard_checkpoint(final)
    unfinished.rename(final)
    _to_disk(final.parent)


def remove(path: Path) -> None:
    """Delete a folder or a file, if it is there."""
    if path.is_file() or path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


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


def rotate_checkpoints(output_dir: Path, run: str, limit: int | None, best: str | None) -> None:
    """Delete the checkpoints of `run` that were saved first, beyond `limit`, but neither the last one nor the best."""
    found = _by_time([folder for folder in _checkpoints(output_dir) if _run_of(folder) == run])
    kept = {*found[-1:], *([Path(best)] if best else [])}
    spare = len(found) - max(limit or len(found), len(kept))
    for folder in [folder for folder in found if folder not in kept][: max(spare, 0)]:
        discard_checkpoint(folder)


@contextlib.contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Keep other processes out of the folder that a run saves its checkpoints in.

    Raises:
        ValueError: Another process is in it.
        OSError: It cannot be written.
    """
    lock = _acquire(output_dir)
    try:
        yield
    finally:
        (output_dir / LOCK).unlink(missing_ok=True)  # while it is held, so that nobody takes a file that goes away
        lock.release()


def _acquire(output_dir: Path) -> FileLock:
    lock = FileLock(output_dir / LOCK, timeout=0)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"output_dir={str(output_dir)!r} is in use by another process, whose checkpoints this run would replace. "
            "Choose another output_dir, or wait until that run has ended."
        ) from None
    except OSError as error:
        raise OSError(
            error.errno,
            f"output_dir={str(output_dir)!r} cannot be written ({error.strerror}), so no checkpoint could be saved; choose "
            "another one, or set save_strategy='no'",
        ) from error
    return lock


def _fault_of_file(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return f"lacks {path.name}"
    if path.stat().st_size != record.size:
        return f"is damaged: {path.name} has {path.stat().st_size} bytes of {record.size}"
    try:
        same = FileRecord.of(path) == record
    except OSError as error:
        return f"has {path.name}, which cannot be read ({error.strerror})"
    return None if same else f"is damaged: {path.name} is not what was saved"


def _checkpoints(output_dir: Path) -> list[Path]:
    return [path for path in sorted(output_dir.glob("*")) if CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def _by_time(folders: list[Path]) -> list[Path]:
    """Folders in the order in which they were saved."""

    def age(folder: Path) -> tuple[float, int]:
        manifest, match = Manifest.read(folder), CHECKPOINT.fullmatch(folder.name)
        assert match is not None
        return folder.stat().st_mtime if manifest is None else manifest.saved, int(match[1])

    return sorted(folders, key=age)


def _run_of(folder: Path) -> str | None:
    manifest = Manifest.read(folder)
    return None if manifest is None else manifest.run


def _free_name(folder: Path) -> Path:
    """A name beside `folder` that nothing has, and that is not a checkpoint's."""
    names = (f"{folder.name}.earlier{number}" for number in ("", *map(str, range(2, 10**6))))
    return next(path for name in names if not (path := folder.with_name(name)).exists())


def _to_disk(path: Path) -> None:
    """Wait until a file or a folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
