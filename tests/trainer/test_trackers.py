"""Completions reach trackers as tables: the trackers themselves, where they are installed, as `make trackers` does."""

import json
import sqlite3

import pytest

from grpo_trl.report.log import completion_files
from grpo_trl.report.run import read_completions
from tests.helpers.models import make_model
from tests.helpers.training import train


COLUMNS = ("prompt", "completion", "score", "advantage")


def kept_by(tracker, folder):
    """Train for two steps with a tracker; return the rows of each step that the run keeps in its own folder."""
    options = {"max_steps": 2, "log_completions": True, "num_completions_to_print": 0, "run_name": "run"}
    train(make_model(), ["a", "b"], output_dir=str(folder), report_to=tracker, project="project", **options)
    tables = [read_completions(file) for file in completion_files(folder)]
    return [list(zip(*(table[name] for name in COLUMNS), strict=True)) for table in tables]


def test_wandb_has_the_tables_of_the_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    kept = kept_by("wandb", tmp_path / "run")
    wandb.finish()
    files = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/*.json"), key=lambda file: file.stat().st_mtime)
    tables = [json.loads(file.read_text()) for file in files]
    places = [[table["columns"].index(name) for name in COLUMNS] for table in tables]
    assert [[tuple(row[i] for i in at) for row in t["data"]] for t, at in zip(tables, places, strict=True)] == kept


def test_trackio_has_the_tables_of_the_run(tmp_path, monkeypatch):
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path)  # which it has read from the environment when it was imported
    kept = kept_by("trackio", tmp_path / "run")
    with sqlite3.connect(tmp_path / "project.db") as database:
        logged = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
    tables = [entry["completions"] for entry in logged if "completions" in entry]
    assert {table["_type"] for table in tables} == {"trackio.table"}
    assert [[tuple(row[name] for name in COLUMNS) for row in table["_value"]] for table in tables] == kept


def test_tensorboard_has_the_tables_of_the_run_and_renders_no_markup(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kept = kept_by("tensorboard", tmp_path)
    (folder,) = (tmp_path / "runs").glob("completions")
    events = EventAccumulator(str(folder)).Reload().Tensors("completions/text_summary")
    assert [event.step for event in events] == [1, 2]
    for event, rows in zip(events, kept, strict=True):
        head, _, *lines = event.tensor_proto.string_val[0].decode().split("\n")
        names = head.strip("|").split("|")
        cells = [line[1:-1].split("|") for line in lines]
        assert [row[names.index("prompt")] for row in cells] == [row[0] for row in rows]
        assert not any(set("`*_[]<>") & set(line.replace("<br>", "")) for line in lines)
