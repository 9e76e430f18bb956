"""Which checkpoints are found, kept and refused."""

import json
import os
import re
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_trl.reliability.checkpoints import (
    FileRecord,
    fault_of,
    finish_checkpoint,
    last_checkpoint,
    locked,
    rotate_checkpoints,
    write_manifest,
)


FILES = ("optimizer.pt", "global_step3/shard.pt")


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    with mock.patch("grpo_trl.reliability.checkpoints._to_disk"):
        yield


def save(output_dir: Path, run: str, step: int, resumable: bool = True) -> Path:
    """Save as a trainer does: aside, with a manifest, then by its name."""
    unfinished, final = output_dir / "unfinished" / f"checkpoint-{step}", output_dir / f"checkpoint-{step}"
    for name in FILES:
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).write_text(f"{name} of {run} at {step}")
    write_manifest(unfinished, run, step, resumable)
    finish_checkpoint(unfinished, final)
    return final


def content(folder: Path) -> str:
    return (folder / FILES[0]).read_text()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(1, 4),
    damages=st.dictionaries(
        st.integers(1, 4), st.tuples(st.sampled_from([Path.unlink, truncate, change]), st.sampled_from(FILES))
    ),
)
def test_the_last_whole_checkpoint_is_taken_and_a_fault_names_its_file(count, damages):
    with tempfile.TemporaryDirectory() as name:
        output_dir = Path(name)
        folders = {step: save(output_dir, "run", step) for step in range(1, count + 1)}
        for step in damages.keys() & folders.keys():
            damage, file = damages[step]
            damage(folders[step] / file)
            assert Path(file).name in fault_of(folders[step])
        whole = sorted(folders.keys() - damages.keys())
        assert all(fault_of(folders[step]) is None for step in whole)
        assert last_checkpoint(output_dir) == (folders[whole[-1]] if whole else None)


@settings(max_examples=12, deadline=None)
@given(
    saves=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 5)), min_size=1, max_size=6),
    limit=st.sampled_from([None, 1, 2, 3]),
)
def test_a_run_keeps_its_newest_and_loses_nothing_to_another(saves, limit):
    """Each save is one of run a or b; nothing of b is ever deleted by a, and the other way round."""
    with tempfile.TemporaryDirectory() as name:
        output_dir = Path(name)
        own: dict[str, list[int]] = {"a": [], "b": []}
        for run, step in saves:
            save(output_dir, run, step)
            rotate_checkpoints(output_dir, run, limit, best=None)
            before = [other for other in own[run] if other != step]
            own[run] = [*before, step][-limit if limit else 0 :]
        found = {content(folder) for folder in output_dir.glob("checkpoint-*")}
        assert {f"{FILES[0]} of {run} at {step}" for run, steps in own.items() for step in steps} <= found
        newest = f"{FILES[0]} of {saves[-1][0]} at {saves[-1][1]}"
        assert content(last_checkpoint(output_dir)) == newest


def test_the_best_checkpoint_stays(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, "run", step)
        rotate_checkpoints(tmp_path, "run", 1, best=str(tmp_path / "checkpoint-1"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_text("of another trainer")


def damaged_manifest(folder: Path) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"run": ')


def model_alone(folder: Path) -> None:
    save(folder.parent, "run", 9, resumable=False)


@pytest.mark.parametrize(
    "make, fault",
    [
        (Path.mkdir, "has no manifest.json"),
        (foreign, "saved by another trainer"),
        (damaged_manifest, "damaged manifest.json"),
        (model_alone, "save_only_model=True"),
    ],
)
def test_what_cannot_be_resumed_is_passed_over_with_a_line(make, fault, tmp_path, caplog):
    whole = save(tmp_path, "run", 1)
    make(tmp_path / "checkpoint-9")
    assert last_checkpoint(tmp_path) == whole
    assert fault in caplog.text
    assert "checkpoint-9" in caplog.text


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path):
    folder = save(tmp_path, "a", 1)
    with mock.patch.object(FileRecord, "of", side_effect=PermissionError(13, "Permission denied")):
        assert fault_of(folder) == "has shard.pt, which cannot be read (Permission denied)"


@pytest.mark.parametrize("saved", ["yesterday", None, "NaN", []])
def test_a_manifest_without_a_time_is_damaged(saved, tmp_path):
    folder = save(tmp_path, "a", 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"saved": saved}))
    assert fault_of(folder) == "has a damaged manifest.json"
    assert last_checkpoint(tmp_path) is None


def test_what_is_no_checkpoint_of_this_run_is_renamed_and_stays(tmp_path):
    (tmp_path / "checkpoint-1").write_text("notes")
    save(tmp_path, "a", 1)
    assert (tmp_path / "checkpoint-1.earlier").read_text() == "notes"
    assert fault_of(tmp_path / "checkpoint-1") is None


def test_a_readme_may_be_changed_and_files_may_be_added(tmp_path):
    folder = save(tmp_path, "run", 1)
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    assert fault_of(folder) is None


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path):
    folder = tmp_path / "out"
    message = re.escape(f"output_dir={str(folder)!r} is in use")
    with locked(folder), pytest.raises(ValueError, match=message), locked(folder):
        pass
    with locked(folder):
        pass
    assert os.listdir(folder) == []


def test_a_folder_that_cannot_be_written_is_refused_at_the_start_by_a_run_that_saves(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written .*save_strategy='no'"), locked(tmp_path / "file"):
        pass
