"""What a run leaves and shows, whatever `report_to` says and whatever fails meanwhile."""

import io
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from grpo_trl.errors import RunStopped
from grpo_trl.report import Run
from grpo_trl.report.log import completion_files, evaluation_files, step_of
from grpo_trl.report.run import read_completions
from grpo_trl.trainer.callbacks import EVENTS, reason_of, tolerate_reporting
from tests.conftest import make_model
from tests.helpers.training import sampling_trainer, train


PROMPTS = ["ab=", "f", "a", "cde12=", "x", "yz", "0=", "1=2"]


def test_every_run_leaves_its_log_options_versions_and_plan(tmp_path):
    trainer = train(make_model(), PROMPTS, output_dir=str(tmp_path), max_steps=3, beta=0.1)
    run = Run.read(tmp_path)
    assert (run.max_steps, run.ended, run.step) == (3, True, 3)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("loss", "reward", "kl", "step_time"):
        assert run.series(name)[1] == [entry[name] for entry in logged]
    assert run.config["beta"] == 0.1
    assert run.environment["versions"].keys() >= {"python", "torch", "transformers", "grpo_trl"}
    assert run.environment["hardware"]["ranks"] == 1
    assert run.plan["summary"]["peak memory (GiB)"] > 0
    assert run.last("memory/peak_gib") > 0


def test_a_sample_of_completions_is_kept_without_asking(tmp_path):
    train(make_model(), PROMPTS, output_dir=str(tmp_path), max_steps=2)
    first, _ = completion_files(tmp_path)
    table = read_completions(first)
    assert table.keys() >= {"step", "group", "prompt", "completion", "score", "advantage"}
    assert table["group"] == [0] * 4


def test_the_first_and_the_last_evaluation_are_kept_prompt_by_prompt(tmp_path):
    trainer = sampling_trainer(
        tmp_path,
        4,
        eval_dataset=Dataset.from_dict({"prompt": ["ab=", "x"]}),
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        num_generations_eval=2,
        per_device_eval_batch_size=2,
        save_strategy="no",
    )
    trainer.train()
    first, last = evaluation_files(tmp_path)["eval"]
    assert (step_of(first), step_of(last)) == (0, 6)
    table = read_completions(last)
    assert (table["prompt"], table["group"]) == (["ab=", "ab=", "x", "x"], [0, 0, 1, 1])
    (logged,) = [entry for entry in trainer.state.log_history if "eval_reward" in entry and entry["step"] == 6]
    assert sum(table["length"]) / 4 == pytest.approx(logged["eval_reward"])


def test_a_resumed_run_continues_its_log(tmp_path):
    sampling_trainer(tmp_path, 4, max_steps=6, logging_steps=1).train()
    uninterrupted = Run.read(tmp_path).series("reward")
    sampling_trainer(tmp_path, 4, max_steps=6, logging_steps=1).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    run = Run.read(tmp_path)
    assert run.series("reward") == uninterrupted
    assert run.ended


def test_the_plan_of_a_trainer_is_printed_where_progress_is_shown(tmp_path, capsys):
    trainer = train(make_model(), PROMPTS, output_dir=str(tmp_path), disable_tqdm=False)
    lines = trainer.plan().lines()
    assert "\n".join(lines) in capsys.readouterr().out
    assert len(lines) <= 10
    assert "1 prompts x 4 = 4 completions" in lines[1]
    assert "8 prompts = 8 optimizer steps" in lines[4]
    assert "H100" in trainer.plan(gpu="H100").lines()[-1]
    with pytest.raises(ValueError, match="gpu='H10' is unknown"):
        trainer.plan(gpu="H10")


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr("grpo_trl.report.tolerant._reported", set())
    caplog.set_level(logging.WARNING)
    return caplog


class FolderLost(TrainerCallback):
    """Replaces the output folder by a file once the run has started."""

    def on_step_begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir)
        if folder.is_dir():
            shutil.rmtree(folder)
            folder.write_text("")


def test_an_output_folder_that_cannot_be_written_is_one_warning_for_each_thing(tmp_path, warnings):
    trainer = train(make_model(), PROMPTS, output_dir=str(tmp_path / "out"), max_steps=3, callbacks=[FolderLost()])
    assert trainer.state.global_step == 3
    told = [message for message in warnings.messages if "training continues" in message]
    assert len(told) == len(set(told)) == 2
    assert "log.jsonl" in "".join(told)
    assert "completions" in "".join(told)


class Broken(TrainerCallback):
    """A tracker whose every event fails."""


for event in EVENTS:
    setattr(Broken, event, lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("unreachable")))


def test_a_tracker_that_fails_is_one_warning(tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(Broken, "__module__", "transformers.integrations.integration_utils")
    broken = Broken()
    tolerate_reporting([broken])
    trainer = train(make_model(), PROMPTS, output_dir=str(tmp_path), callbacks=[broken], max_steps=3)
    assert trainer.state.global_step == 3
    assert [message for message in warnings.messages if "unreachable" in message] == [
        "Broken failed (ConnectionError: unreachable); training continues, and this is reported once."
    ]


def test_a_callback_of_the_user_that_fails_ends_the_run(tmp_path):
    with pytest.raises(ConnectionError):
        train(make_model(), PROMPTS, output_dir=str(tmp_path), callbacks=[Broken()])


def test_a_closed_output_does_not_end_a_run_that_prints(tmp_path, monkeypatch, warnings):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    trainer = train(make_model(), PROMPTS, output_dir=str(tmp_path), max_steps=2, log_completions=True)
    assert trainer.state.global_step == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_one_live_view(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    trainer = train(make_model(), PROMPTS, output_dir=str(tmp_path), max_steps=2, disable_tqdm=False)
    assert trainer.state.global_step == 2
    assert "step 2 of 2" in terminal.getvalue()
    assert "best completion" in terminal.getvalue()
    assert terminal.getvalue().count("\x1b[?25h") >= 1  # the cursor is back


def test_a_live_view_has_no_bar_beside_it(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    sampling_trainer(tmp_path, 4, max_steps=2, save_strategy="no", disable_tqdm=False).train()
    assert "completion/s" not in terminal.getvalue() + capfd.readouterr().err


def test_without_a_terminal_a_log_is_a_line_and_there_is_no_bar(tmp_path, capfd):
    sampling_trainer(tmp_path, 4, max_steps=2, logging_steps=1, save_strategy="no", disable_tqdm=False).train()
    out, err = capfd.readouterr()
    assert len([line for line in out.splitlines() if line.startswith("{'loss'")]) == 2
    assert "completion/s" not in err


@pytest.mark.parametrize(
    "error, reason",
    [
        (SystemExit(75), "a signal; it is saved, start it again to resume"),
        (RunStopped("dead run\nmore"), "dead run"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ValueError("no \x1b[2J"), "ValueError: no \x1b[2J"),
    ],
)
def test_why_a_run_has_stopped_is_one_line(error, reason):
    assert reason_of(error) == reason


def test_a_run_that_an_error_ends_is_logged_as_stopped(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ConnectionError("unreachable")

    with pytest.raises(ConnectionError):
        train(make_model(), PROMPTS, output_dir=str(tmp_path), callbacks=[Fails()])
    assert Run.read(tmp_path).over == "stopped: ConnectionError: unreachable"


def test_what_is_written_is_json(tmp_path):
    train(make_model(), PROMPTS, output_dir=str(tmp_path))
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    for name in ("run_config.json", "environment.json", "plan.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
