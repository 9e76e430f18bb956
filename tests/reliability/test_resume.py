"""A run that was interrupted ends as the run that was not: weights, optimizer, completions and metrics, bit for bit."""

import dataclasses
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.errors import OutOfStep, RunStopped
from grpo_trl.reliability.checkpoints import Manifest, fault_of, last_checkpoint, write_manifest
from grpo_trl.reliability.run_state import RunState
from grpo_trl.reliability.signals import EXIT_CODE
from tests.helpers.models import make_model, make_tokenizer
from tests.helpers.training import checkpoints, completions_of, sampling_trainer, weights


PROMPTS = ["ab=", "f", "a", "cde12=", "x", "yz", "0=", "1=2"]
TIMED = re.compile("time|per_second|train_")
STEPS = 8
"""Of four epochs of two steps, where a step is a generation batch."""
CASES = {
    "a generation batch a step": {},
    "sequence level, with a reference": {"loss_level": "sequence", "beta": 0.1},
    "three iterations": {"num_iterations": 3, "beta": 0.1},
    "generation batches of two steps": {"steps_per_generation": 2, "per_device_train_batch_size": 8},
    "generation batches of two steps, of two micro-steps": {
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "num_iterations": 2,
    },
    "generation batches shorter than a step": {"steps_per_generation": 1, "gradient_accumulation_steps": 2},
    "adaptive entropy bonus": {
        "loss_type": "dapo",
        "use_adaptive_entropy": True,
        "entropy_coef_delta": 0.05,
        "entropy_target": 10.0,
        "top_entropy_quantile": 0.5,
        "num_iterations": 2,
    },
    "logged every third step": {"logging_steps": 3, "num_iterations": 2},
    "the reference moves": {
        "beta": 0.5,
        "sync_ref_model": True,
        "ref_model_sync_steps": 3,
        "ref_model_mixup_alpha": 0.7,
    },
    "dropout": {"attention_dropout": 0.3, "num_iterations": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "LoRA with dropout": {"lora_dropout": 0.3, "beta": 0.1, "num_iterations": 2},
    "rewards by chance": {"reward": "chance", "num_iterations": 2},
    "batch scale, small micro-batches": {
        "scale_rewards": "batch",
        "max_tokens_per_micro_batch": 40,
        "num_iterations": 2,
    },
}


def letters(completions):
    return [sum(letter < "n" for letter in text) / max(len(text), 1) for text in completions]


def chance(completions):
    return [random.random() + torch.rand(1).item() for _ in completions]


def make_trainer(
    folder, reward="letters", attention_dropout=0.0, lora_dropout=None, callbacks=None, eval_prompts=None, **options
):
    defaults = {
        "learning_rate": 0.01,
        "num_generations": 4,
        "per_device_train_batch_size": 16,
        "max_steps": STEPS,
        "max_completion_length": 6,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    adapter = LoraConfig(r=4, lora_dropout=lora_dropout, target_modules=["q_proj"], init_lora_weights=False)
    return GRPOTrainer(
        make_model(attention_dropout=attention_dropout),
        {"letters": letters, "chance": chance}.get(reward, reward),
        GRPOConfig(output_dir=str(folder), **(defaults | options)),
        Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=eval_prompts and Dataset.from_dict({"prompt": eval_prompts}),
        processing_class=make_tokenizer(),
        peft_config=None if lora_dropout is None else adapter,
        callbacks=callbacks,
    )


def run(folder, resume=None, **options):
    trainer = make_trainer(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def end_of(trainer):
    """All that must not depend on an interruption."""
    moments = trainer.optimizer.state_dict()["state"]
    log = [{k: v for k, v in entry.items() if not TIMED.search(k)} for entry in trainer.state.log_history]
    return {
        "weights": weights(trainer.model),
        "moments": {i: {k: torch.as_tensor(v) for k, v in state.items()} for i, state in moments.items()},
        "completions": [(c.prompt_ids, c.ids, c.sampler_logps, c.advantage) for c in completions_of(trainer)],
        "log": [entry for entry in log if "loss" in entry],
        "tokens": trainer.state.num_input_tokens_seen,
    }


def checkpoints_in(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_same(actual, expected):
    for name, value in expected["weights"].items():
        assert torch.equal(actual["weights"][name], value), name
    for i, state in expected["moments"].items():
        assert all(torch.equal(actual["moments"][i][k], v) for k, v in state.items())
    for name in ("completions", "log", "tokens"):
        assert actual[name] == expected[name]


QUICK = (
    "generation batches of two steps, of two micro-steps",
    "adaptive entropy bonus",
    "the reference moves",
)
"""Cases that hold most of what a checkpoint can hold; the others run with the slow tests."""


@pytest.mark.parametrize(
    "case, steps",
    [
        *((case, (3, 6)) for case in QUICK),
        *(pytest.param(case, (1, 2, 4, 5, 7), marks=pytest.mark.slow) for case in QUICK),
        *(pytest.param(case, range(1, 8), marks=pytest.mark.slow) for case in CASES if case not in QUICK),
    ],
    ids=str,
)
def test_resumed_after_any_step_a_run_ends_as_if_it_had_not_been_interrupted(case, steps, tmp_path):
    uninterrupted = end_of(run(tmp_path / "no saves", **CASES[case] | {"save_strategy": "no"}))
    saved = run(tmp_path / "saves", **CASES[case])
    assert_same(end_of(saved), uninterrupted)
    assert len({str(state) for state in uninterrupted["log"]}) == len(uninterrupted["log"]) > 1
    for step in steps:
        resumed = run(tmp_path / "resumed", str(tmp_path / "saves" / f"checkpoint-{step}"), **CASES[case])
        assert_same(end_of(resumed), uninterrupted)


# ---- Signals ----


class SendAt(TrainerCallback):
    """Sends this process a signal at the end of a step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def stopped(folder, **options):
    """A run that a signal stops."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    trainer = make_trainer(folder, **options)
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == EXIT_CODE
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    return trainer


@pytest.mark.parametrize(
    "number, options",
    [
        (signal.SIGTERM, {"num_iterations": 3}),
        (signal.SIGUSR1, {"logging_steps": 5}),
        pytest.param(signal.SIGTERM, {}, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, {"num_iterations": 3}, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_a_step_lets_it_end_saves_and_exits(number, options, tmp_path):
    uninterrupted = end_of(run(tmp_path / "whole", save_strategy="no", **options))
    callbacks = [SendAt(4, number)]
    trainer = stopped(tmp_path / "stopped", save_strategy="no", callbacks=callbacks, **options)
    assert trainer.state.global_step == 4
    assert checkpoints(tmp_path / "stopped") == ["checkpoint-4"]
    assert_same(end_of(run(tmp_path / "stopped", True, save_strategy="no", **options)), uninterrupted)


def test_a_signal_in_a_reward_function_ends_it_and_drops_the_generation_batch(tmp_path):
    calls = []

    def slow(completions):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(100)
        return letters(completions)

    uninterrupted = end_of(run(tmp_path / "whole", save_strategy="no", reward=slow_is_letters(slow)))
    calls.clear()
    stopped(tmp_path / "stopped", save_strategy="no", reward=slow)
    assert checkpoints(tmp_path / "stopped") == ["checkpoint-2"]
    assert_same(end_of(run(tmp_path / "stopped", True, save_strategy="no", reward=slow)), uninterrupted)


def slow_is_letters(slow):
    """Under the name of `slow`, which the log has."""

    def same_name(completions):
        return letters(completions)

    same_name.__name__ = slow.__name__
    return same_name


@pytest.mark.parametrize("kwargs", [{}, {"guidance_scale": 1.5}], ids=["by groups", "by generate"])
def test_a_signal_in_sampling_drops_the_generation_batch(kwargs, tmp_path, monkeypatch):
    options = {"save_strategy": "no", "generation_kwargs": kwargs}
    uninterrupted = end_of(run(tmp_path / "whole", **options))
    trainer = make_trainer(tmp_path / "stopped", **options)
    steps = []

    def check(check=trainer._signals.check):
        steps.append(0)
        if len(steps) == 20:  # six a generation batch
            os.kill(os.getpid(), signal.SIGTERM)
        check()

    monkeypatch.setattr(trainer._runner.engine, "check", check)
    with pytest.raises(SystemExit):
        trainer.train()
    assert checkpoints(tmp_path / "stopped") == ["checkpoint-3"]
    assert len(steps) == 20
    assert_same(end_of(run(tmp_path / "stopped", True, **options)), uninterrupted)


def test_a_signal_in_an_evaluation_ends_it(tmp_path):
    class StopEvaluation(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    options = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3}
    trainer = make_trainer(tmp_path, callbacks=[StopEvaluation()], eval_prompts=PROMPTS, **options)
    with pytest.raises(SystemExit):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    assert not any("eval_reward" in entry for entry in trainer.state.log_history)


def test_a_signal_before_the_first_step_saves_nothing(tmp_path):
    class AtOnce(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    stopped(tmp_path, callbacks=[AtOnce()])
    assert last_checkpoint(tmp_path) is None


def test_a_signal_right_after_a_save_does_not_save_again(tmp_path):
    trainer = stopped(tmp_path, callbacks=[SendAt(3)])
    written = (tmp_path / "checkpoint-3" / "grpo_state_0.pt").stat().st_mtime_ns
    assert trainer.state.global_step == 3
    assert written == max(path.stat().st_mtime_ns for path in tmp_path.glob("*/grpo_state_0.pt"))


# ---- Folders ----


def test_a_damaged_checkpoint_is_passed_over_or_refused_by_the_name_of_its_file(tmp_path, caplog):
    uninterrupted = end_of(run(tmp_path, max_steps=3))
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3' lacks optimizer\.pt"):
        run(tmp_path, str(tmp_path / "checkpoint-3"), max_steps=3)
    assert_same(end_of(run(tmp_path, True, max_steps=3)), uninterrupted)
    assert "checkpoint-3 lacks optimizer.pt; it is passed over" in caplog.text


def test_a_new_run_in_an_old_folder_keeps_its_own_and_is_the_one_that_is_resumed(tmp_path, caplog):
    run(tmp_path, max_steps=4, save_total_limit=2)
    assert "another run" not in caplog.text
    new = run(tmp_path, max_steps=3, save_total_limit=2, learning_rate=0.02)
    assert re.search(r"holds checkpoints of another run \(checkpoint-3, checkpoint-4\)", caplog.text)
    assert checkpoints_in(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-3.earlier", "checkpoint-4"]
    resumed = run(tmp_path, True, max_steps=3, save_total_limit=2, learning_rate=0.02)
    assert all(torch.equal(value, weights(resumed.model)[name]) for name, value in weights(new.model).items())


def test_the_folder_of_checkpoints_is_refused_with_those_in_it(tmp_path):
    run(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"folder of checkpoints \(checkpoint-1, checkpoint-2\); pass True"):
        run(tmp_path, str(tmp_path))


def test_a_run_that_ends_before_its_checkpoint_says_that_nothing_is_left(tmp_path, caplog):
    run(tmp_path, max_steps=3)
    assert run(tmp_path, True, max_steps=2).state.global_step == 3
    assert "The run is at step 3 and ends at step 2: nothing is left to do" in caplog.text


def test_what_resumes_with_other_options_names_those_that_have_an_effect(tmp_path, caplog):
    run(tmp_path, max_steps=2)
    run(tmp_path, True, max_steps=3, epsilon=0.3, learning_rate=0.5)
    (line,) = [record.message for record in caplog.records if "other options" in record.message]
    taken, kept = line.split("kept as they were: ")
    assert re.findall(r"(\w+)=", taken) == ["max_steps", "epsilon"]
    assert kept == "learning_rate=0.01 (given: 0.5)."


PAYLOAD = ""


class RunsCode:
    """Makes the folder PAYLOAD where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (PAYLOAD,)


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "grpo_state_0.pt", "training_args.bin", "pytorch_model.bin"],
)
def test_no_file_of_a_checkpoint_is_executed(name, tmp_path, monkeypatch):
    """Not even one that the manifest vouches for."""
    monkeypatch.setitem(globals(), "PAYLOAD", str(tmp_path / "executed"))
    run(tmp_path, max_steps=1)
    folder = tmp_path / "checkpoint-1"
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    torch.save({"state": RunsCode()}, folder / name)
    write_manifest(folder, "run", 1, True)
    if name == "training_args.bin":  # which nothing reads
        run(tmp_path, True, max_steps=2)
    else:
        with pytest.raises(ValueError, match="holds more than tensors and plain values"):
            run(tmp_path, True, max_steps=2)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "rmsprop"])
def test_the_state_of_another_optimizer_is_refused(optim, tmp_path):
    run(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=f"has the state of another optimizer than optim='{optim}'"):
        run(tmp_path, True, max_steps=2, optim=optim)


def test_another_model_is_another_run(tmp_path):
    run(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"trained parameters: \d+ of \d+ numbers then, \d+ of \d+ numbers now"):
        run(tmp_path, True, max_steps=2, lora_dropout=0.0)


def test_a_reference_can_be_added_to_a_run(tmp_path, caplog):
    run(tmp_path, max_steps=1)
    resumed = run(tmp_path, True, max_steps=2, beta=0.1)
    assert "in effect from here on: max_steps=2 (before: 1), beta=0.1 (before: 0.0)" in caplog.text
    assert "kl" in resumed.state.log_history[-2]


@pytest.mark.parametrize("path", [True, "true", Path, str])
def test_a_checkpoint_is_given_as_a_path_of_any_kind_or_as_the_last_one(path, tmp_path):
    run(tmp_path, max_steps=1)
    given = path(tmp_path / "checkpoint-1") if callable(path) else path
    assert run(tmp_path, given, max_steps=2).state.log_history[-1]["step"] == 2


@pytest.mark.parametrize("wrong", [3, 1, ["checkpoint-1"]])
def test_what_is_no_checkpoint_is_refused_by_its_type(wrong, tmp_path):
    with pytest.raises(TypeError, match=f"is a {type(wrong).__name__}; pass the path of a checkpoint, or True"):
        run(tmp_path, wrong, max_steps=1)


def test_the_option_that_transformers_does_not_read_says_so(tmp_path, caplog):
    run(tmp_path, max_steps=1, resume_from_checkpoint="somewhere")
    assert "resume_from_checkpoint='somewhere' of the options has no effect; pass it to train()" in caplog.text


@pytest.mark.parametrize("kind", ["a file", "below a file", "", "a\0b", "a" * 300])
def test_an_output_dir_that_can_be_no_folder_is_named_at_construction(kind, tmp_path):
    (tmp_path / "file").touch()
    output_dir = {"a file": str(tmp_path / "file"), "below a file": str(tmp_path / "file" / "out")}.get(kind, kind)
    with pytest.raises(ValueError, match=f"output_dir={re.escape(repr(output_dir))} can be no folder"):
        make_trainer(output_dir)


def test_a_relative_output_dir_is_that_of_the_construction(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    class Moves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            os.chdir(tmp_path / "elsewhere")

    trainer = make_trainer("out", max_steps=2, callbacks=[Moves()])
    monkeypatch.chdir("/")
    trainer.train()
    assert checkpoints_in(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]
    assert not os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize("left", ["file", "folder"])
def test_what_an_earlier_save_has_left_is_not_in_the_way(left, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.touch() if left == "file" else (unfinished / "checkpoint-1" / "optimizer.pt").mkdir(parents=True)
    run(tmp_path, max_steps=1)
    assert fault_of(tmp_path / "checkpoint-1") is None


def test_an_adapter_that_transformers_has_added_is_resumed(tmp_path):
    def added(folder, resume=None):
        torch.manual_seed(0)
        model = make_model()
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        trainer = sampling_trainer(folder, 16, model=model, save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    uninterrupted = added(tmp_path / "whole")
    resumed = added(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(value, weights(resumed.model)[n]) for n, value in weights(uninterrupted.model).items())


def test_the_best_of_an_adapter_that_transformers_has_added_is_loaded_at_the_end(tmp_path):
    def reward(completions, held_out=None, **kwargs):
        return [float(len(completion)) if held_out is None else 0.0 for completion in completions]

    model = make_model()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    rows = Dataset.from_dict({"prompt": ["ab="], "held_out": [True]})
    trainer = sampling_trainer(tmp_path, 16, model, reward, eval_dataset=rows, **best)
    trainer.train()
    assert trainer.state.best_global_step == 1
    saved = [load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 2)]
    loaded = [value for name, value in weights(trainer.model).items() if "lora_" in name]
    at_step = [all(any(torch.equal(v, w.double()) for w in file.values()) for v in loaded) for file in saved]
    assert at_step == [True, False]


def test_true_takes_the_last_checkpoint_and_starts_anew_where_there_is_none(tmp_path, caplog):
    fresh = run(tmp_path, True)
    assert "starts fresh" in caplog.text
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    (tmp_path / "unfinished" / "checkpoint-9").mkdir(parents=True)
    resumed = run(tmp_path, True, max_steps=STEPS + 2, callbacks=[Count()])
    assert steps == [STEPS + 1, STEPS + 2]
    assert fresh.state.global_step == STEPS
    assert resumed.state.global_step == STEPS + 2


def test_a_checkpoint_that_could_not_be_written_is_not_there(tmp_path, monkeypatch):
    save = RunState.save

    def full(self, folder, rank):
        save(self, folder, rank)
        if "checkpoint-3" in str(folder):
            raise OSError(28, "No space left on device")

    uninterrupted = end_of(run(tmp_path / "whole"))
    monkeypatch.setattr(RunState, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "full")
    monkeypatch.undo()
    names = {name for name in os.listdir(tmp_path / "full") if name.startswith("checkpoint")}
    assert names == {"checkpoint-1", "checkpoint-2"}
    assert_same(end_of(run(tmp_path / "full", True)), uninterrupted)


@pytest.mark.parametrize("ends_saved", [True, False])
def test_memory_that_runs_out_in_sampling_ends_a_run_saved_unless_others_wait(tmp_path, ends_saved):
    whole = end_of(run(tmp_path / "whole"))
    trainer = make_trainer(tmp_path / "short", save_strategy="no")
    rollout, calls = trainer._runner.engine.rollout, []

    def fail(request):
        calls.append(request)
        if len(calls) == 2:
            raise MemoryError("made up") if ends_saved else OutOfStep("made up")
        return rollout(request)

    trainer._runner.engine.rollout = fail
    with pytest.raises(RunStopped if ends_saved else OutOfStep, match="made up"):
        trainer.train()
    assert bool(checkpoints_in(tmp_path / "short")) == ends_saved
    if ends_saved:
        assert_same(end_of(run(tmp_path / "short", True)), whole)


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_prompts=PROMPTS,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss_of_mine",
        load_best_model_at_end=True,
        greater_is_better=False,
    )
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss_of_mine": abs(trainer.state.global_step - 3)}
    trainer.train()
    assert checkpoints_in(tmp_path) == ["checkpoint-3", f"checkpoint-{STEPS}"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    saved = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(tmp_path / "checkpoint-3")
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(value, weights(trainer.model)[name]) for name, value in weights(best).items())


def test_the_best_checkpoint_knows_its_own_name(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_prompts=PROMPTS,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_x",
        save_strategy="best",
    )
    trainer.evaluate = lambda *args, **kwargs: {"eval_x": -abs(trainer.state.global_step - 3)}
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(tmp_path / "checkpoint-3")


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run(tmp_path, num_iterations=2, max_steps=3)
    checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="num_iterations: 2 then, 3 now"):
        run(tmp_path, checkpoint, num_iterations=3)
    with pytest.raises(ValueError, match="completions of a micro-step: 16 then, 8 now"):
        run(tmp_path, checkpoint, num_iterations=2, per_device_train_batch_size=8)
    (tmp_path / "checkpoint-3" / "grpo_state_0.pt").unlink()
    with pytest.raises(ValueError, match=r"lacks grpo_state_0.pt"):
        run(tmp_path, checkpoint, num_iterations=2)


@pytest.mark.parametrize("step", [2, 3])
def test_another_number_of_ranks_may_go_on_between_generation_batches_alone(step, tmp_path):
    """Two ranks' shares, as one process reads them."""
    trainer = run(tmp_path, num_iterations=2, max_steps=step, logging_steps=100)
    folder = tmp_path / f"checkpoint-{step}"
    state = dataclasses.replace(RunState.load(folder, 0), world_size=2)
    for rank in range(2):
        state.save(folder, rank)
    write_manifest(folder, Manifest.read(folder).run, step, resumable=True)
    read = make_trainer(tmp_path, num_iterations=2)
    if step == 3:
        with pytest.raises(ValueError, match=r"inside generation batch 1.*2 ranks; there are 1 now"):
            read.train(resume_from_checkpoint=str(folder))
    else:
        read.train(resume_from_checkpoint=str(folder))
        assert read.state.global_step == STEPS
        assert trainer.state.global_step == 2


def test_what_reward_functions_note_survives(tmp_path):
    def noting(completions, log_extra, log_metric):
        log_extra("thing", [Path("x")] * len(completions))
        log_metric("mine", 3.0)
        return letters(completions)

    run(tmp_path, reward=noting, num_iterations=2, max_steps=1, logging_steps=2)
    state = RunState.load(tmp_path / "checkpoint-1", 0)
    assert set(state.generation_batch.table["thing"]) == {"x"}
    resumed = run(tmp_path, True, reward=noting, num_iterations=2, max_steps=2, logging_steps=2)
    assert [entry["mine"] for entry in resumed.state.log_history if "mine" in entry] == [3.0]


def test_a_step_of_several_generation_batches_that_a_signal_ends_leaves_no_trace(tmp_path):
    """Three generation batches a step, one in the second; the signal comes in the third one of the third step."""
    options = {"steps_per_generation": 1, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 8}
    options |= {"save_strategy": "no", "max_steps": 4, "logging_steps": 4}
    calls = []

    def signalled(completions):
        calls.append(0)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(100)
        return letters(completions)

    uninterrupted = end_of(run(tmp_path / "whole", reward=slow_is_letters(signalled), **options))
    stopped(tmp_path / "stopped", reward=signalled, **options)
    assert checkpoints(tmp_path / "stopped") == ["checkpoint-2"]
    assert_same(end_of(run(tmp_path / "stopped", True, reward=signalled, **options)), uninterrupted)


def test_a_finished_run_that_is_resumed_makes_no_further_step(tmp_path):
    """Its last step lies inside an epoch."""
    whole = run(tmp_path, max_steps=3)
    again = run(tmp_path, True, max_steps=3)
    assert again.state.global_step == 3
    assert all(torch.equal(value, weights(again.model)[name]) for name, value in weights(whole.model).items())
    assert not (tmp_path / "checkpoint-4").exists()


def test_what_a_signal_saves_can_be_resumed_even_where_checkpoints_hold_the_model_alone(tmp_path):
    uninterrupted = end_of(run(tmp_path / "whole", save_strategy="no"))
    stopped(tmp_path / "stopped", save_only_model=True, save_steps=3, callbacks=[SendAt(3)])
    assert_same(end_of(run(tmp_path / "stopped", True, save_strategy="no")), uninterrupted)


def test_other_prompts_or_another_seed_are_another_run(tmp_path, monkeypatch):
    run(tmp_path, max_steps=1)
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"seed of sampling: 42 then, 7 now"):
        run(tmp_path, checkpoint, seed=7, data_seed=42)
    monkeypatch.setattr(f"{__name__}.PROMPTS", [*PROMPTS[:-1], "other"])
    with pytest.raises(ValueError, match=r"\(prompts: "):
        run(tmp_path, checkpoint)


def test_a_signal_that_comes_too_late_is_forgotten(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[SendAt(2)])
    trainer.train()
    assert "eval_reward" in trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS}))


def test_a_step_of_several_generation_batches_that_is_dropped_is_not_counted_as_dead(tmp_path):
    calls = []

    def flat(completions):
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(100)
        return [0.5] * len(completions)

    options = {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    trainer = stopped(tmp_path, reward=flat, **options)
    assert trainer._dead_run.counts == {"no signal": 0, "cut off": 0}
