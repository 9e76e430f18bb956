"""Files of completions go to a dataset of the hub while a run trains; a hub that fails ends no run."""

import fnmatch
import logging
from concurrent.futures import Future
from pathlib import Path
from threading import Lock

import pytest

from grpo_trl import GRPOConfig
from grpo_trl.report import hub, log
from tests.helpers.training import sampling_trainer
from tests.test_config import refusal


class FakeScheduler:
    """Keeps what would be uploaded, by name."""

    made: list["FakeScheduler"] = []  # noqa: RUF012 - cleared by the fixture

    def __init__(self, *, repo_id, folder_path, allow_patterns, **options):
        self.repo_id, self.folder, self.patterns, self.options = f"me/{repo_id}", folder_path, allow_patterns, options
        self.lock, self.uploaded, self.stopped = Lock(), {}, False
        self.made.append(self)

    def trigger(self):
        done: Future[None] = Future()
        with self.lock:
            for file in Path(self.folder).iterdir():
                if any(fnmatch.fnmatch(file.name, pattern) for pattern in self.patterns):
                    self.uploaded[file.name] = file.read_bytes()
        done.set_result(None)
        return done

    def stop(self):
        self.stopped = True


@pytest.fixture
def cards(monkeypatch):
    pushed = []
    FakeScheduler.made.clear()
    monkeypatch.setattr(hub, "CommitScheduler", FakeScheduler)
    monkeypatch.setattr(
        hub.DatasetCard, "push_to_hub", lambda card, repo, token=None: pushed.append((repo, card.data.tags))
    )
    return pushed


def run(folder):
    options = {
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "hub_private_repo": True,
        "hub_token": "secret",
    }
    trainer = sampling_trainer(
        folder, 8, log_completions=True, log_completions_hub_repo="sums", num_completions_to_print=0, **options
    )
    trainer.train()
    return trainer


def test_all_files_are_uploaded_by_the_end_of_the_run(tmp_path, cards):
    run(tmp_path)
    (scheduler,) = FakeScheduler.made
    files = {file.name: file.read_bytes() for file in (tmp_path / "completions").iterdir()}
    assert len(files) == 2
    assert scheduler.uploaded == files
    assert scheduler.stopped
    assert scheduler.options == {"repo_type": "dataset", "every": 2, "private": True, "token": "secret"}
    assert cards == [("me/sums", ["grpo_trl", "completions"])]


def test_no_file_is_uploaded_while_it_is_written(tmp_path, cards, monkeypatch):
    held = []
    write = log.write_completions

    def spy(*args, **kwargs):
        held.append(FakeScheduler.made[0].lock.locked())
        return write(*args, **kwargs)

    monkeypatch.setattr(log, "write_completions", spy)
    run(tmp_path)
    assert held == [True, True]


@pytest.mark.parametrize("fails", ["made", "pushed"])
def test_a_hub_that_fails_is_one_warning(tmp_path, cards, monkeypatch, caplog, fails):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("grpo_trl.report.tolerant._reported", set())
    if fails == "made":
        monkeypatch.setattr(hub, "CommitScheduler", fail)
    else:
        monkeypatch.setattr(FakeScheduler, "trigger", fail)
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path).state.global_step == 2
    assert caplog.text.count("Uploading completions to sums failed (ConnectionError: no network)") == 1


def test_an_upload_needs_log_completions():
    assert "needs log_completions=True" in refusal(log_completions_hub_repo="sums")
    config = GRPOConfig("unused", use_cpu=True, log_completions=True, log_completions_hub_repo="sums")
    assert config.log_completions_hub_repo == "sums"
