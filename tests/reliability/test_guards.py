"""A run that goes wrong says so, keeps its weights, and stops with a checkpoint."""

import functools
import logging
import math
import os
import signal
import threading
import time

import pytest
import torch
from transformers import TrainerCallback

from grpo_trl.distributed.collectives import run_on_all_ranks
from grpo_trl.errors import OutOfStep, RunStopped, StopRequested
from grpo_trl.reliability.guards import warn_of_drift
from grpo_trl.reliability.run_state import RunState
from grpo_trl.reliability.signals import StopSignals
from grpo_trl.reliability.watchdog import Watchdog
from grpo_trl.types import Ranks
from tests.helpers.models import make_model, make_tokenizer
from tests.helpers.training import (
    checkpoints,
    completion_of,
    completions_of,
    relative_error,
    sampling_trainer,
    train,
    weights,
)
from tests.helpers.worker_rewards import fails_on, none_for


PROMPTS = ["ab=", "f", "a", "cde12="]


class Snapshots(TrainerCallback):
    """The weights at the start and after each step."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights.append(weights(model))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append(weights(model))


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---- Updates that are not finite ----


def broken_in_step(kind, steps):
    """A model whose gradient, or loss, is not finite in `steps`."""
    model = make_model()
    calls = []

    def hook(gradient):
        calls.append(0)
        broken = len(calls) in steps and kind == "gradient"
        return gradient * math.inf if broken else gradient

    model.model.embed_tokens.weight.register_hook(hook)
    return model


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(optim, max_grad_norm):
    snapshots = Snapshots()
    options = {"optim": optim, "max_grad_norm": max_grad_norm, "max_steps": 4, "callbacks": [snapshots]}
    trainer = train(broken_in_step("gradient", {2}), PROMPTS, **options)
    moved = [not same(*pair) for pair in zip(snapshots.weights[:-1], snapshots.weights[1:], strict=True)]
    assert moved == [True, False, True, True]
    assert logged(trainer, "nonfinite_steps") == [1.0]
    assert all(value.isfinite().all() for value in weights(trainer.model).values())


def test_a_loss_that_is_not_finite_changes_nothing(monkeypatch):
    snapshots = Snapshots()
    trainer_class = train(make_model(), PROMPTS).__class__
    compute_loss = trainer_class.compute_loss

    def broken(self, model, inputs, **kwargs):
        loss = compute_loss(self, model, inputs, **kwargs)
        return loss + math.inf if self.state.global_step == 1 else loss  # a constant: its gradient is finite

    monkeypatch.setattr(trainer_class, "compute_loss", broken)
    trainer = train(make_model(), PROMPTS, max_steps=3, callbacks=[snapshots])
    moved = [not same(*pair) for pair in zip(snapshots.weights[:-1], snapshots.weights[1:], strict=True)]
    assert moved == [True, False, True]
    assert logged(trainer, "nonfinite_steps") == [1.0]


def test_too_many_in_a_row_stop_the_run(tmp_path):
    """One completion's tokens make a gradient that is not finite."""
    model = make_model()
    start = weights(model)
    bad = make_tokenizer()("f")["input_ids"]

    def break_it(module, args, kwargs, output):
        ids = kwargs["input_ids"]
        if torch.is_grad_enabled() and bad[0] in ids.flatten().tolist():
            output[0].register_hook(lambda gradient: gradient * math.nan)

    model.register_forward_hook(break_it, with_kwargs=True)
    with pytest.raises(RunStopped, match=r"max_nonfinite_steps=3.*checkpoint-3"):
        train(
            model,
            ["ab=", "f"],
            max_steps=9,
            max_nonfinite_steps=3,
            per_device_train_batch_size=8,
            output_dir=str(tmp_path),
        )
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    assert same(weights(model), start)
    assert RunState.load(tmp_path / "checkpoint-3", 0).parts["nonfinite"] == {"count": 0}  # so that it can be resumed


# ---- Dead runs ----


def flat(completions):
    return [0.25] * len(completions)


def test_a_run_that_learns_nothing_says_so_with_numbers(caplog):
    options = {"reward_funcs": flat, "rollout_func": None, "max_steps": 7, "dead_run_patience": 3}
    train(make_model(), PROMPTS, **options)
    said = [record.getMessage() for record in caplog.records if "No group" in record.getMessage()]
    assert ["last 3 generation batches" in said[0], "last 6 generation batches" in said[1], len(said)] == [
        True,
        True,
        2,
    ]
    assert "All rewards of the last one are 0.25" in said[0]
    assert "dead_run_patience=3" in said[0]


def test_a_run_that_learns_something_says_nothing(caplog):
    train(make_model(), PROMPTS, max_steps=6, dead_run_patience=2)
    assert "No group" not in caplog.text


@pytest.mark.parametrize(
    "prompts, patience, expected", [(["equal"], 2, True), (["equal", "ab="], 2, False), (["equal", "ab="], 1, True)]
)
def test_generation_batches_are_counted_in_a_row(prompts, patience, expected, caplog):
    train(make_model(), prompts, max_steps=6, dead_run_patience=patience)
    assert ("No group" in caplog.text) == expected


def test_a_dead_run_may_stop(tmp_path):
    with pytest.raises(
        RunStopped, match=r"No group of the last 2 generation batches.*on_dead_run='stop'.*checkpoint-1"
    ):
        train(
            make_model(),
            PROMPTS,
            reward_funcs=flat,
            max_steps=7,
            dead_run_patience=2,
            on_dead_run="stop",
            output_dir=str(tmp_path),
        )
    assert checkpoints(tmp_path) == ["checkpoint-1"]


def test_a_dead_run_that_is_resumed_stops_at_the_same_generation_batch_unless_something_was_changed(tmp_path):
    def resume(on_dead_run="stop"):
        options = {"dead_run_patience": 2, "on_dead_run": on_dead_run, "save_strategy": "no", "max_steps": 3}
        trainer = sampling_trainer(tmp_path, 8, reward_funcs=flat, num_iterations=1, beta=0.0, **options)
        trainer.train(resume_from_checkpoint=True)
        return trainer.state.global_step

    for _ in range(2):
        with pytest.raises(RunStopped, match=r"last 2 generation batches.* stops again if nothing was changed"):
            resume()
        assert checkpoints(tmp_path) == ["checkpoint-1"]
    assert resume(on_dead_run="warn") == 3


def test_completions_that_never_end_are_a_dead_run(caplog):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[1] = 0  # the end token becomes unlikely, not impossible
    model.generation_config.eos_token_id = None
    options = {"rollout_func": None, "max_steps": 4, "dead_run_patience": 2, "max_completion_length": 1}
    train(model, PROMPTS, reward_funcs=lambda completions: [float(len(c)) for c in completions], **options)
    assert "cut off at max_completion_length=1" in caplog.text


# ---- Rewards that fail ----


def length(completions):
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_completion_without_a_reward_trains_nothing_and_counts(workers):
    """The group's other three have the advantages of a group of three, and the loss is divided by four."""
    options = {"max_steps": 1, "reward_workers": workers, "learning_rate": 0.01}
    start = weights(make_model())
    _, second, _ = completion_of("ab=", 1)
    failed, undefined = (
        train(make_model(), ["ab="], reward_funcs=functools.partial(function, ids=second), **options)
        for function in (fails_on, none_for)
    )
    assert logged(failed, "rewards/fails_on/failures") == [1.0]
    assert logged(undefined, "rewards/none_for/failures") == [0.0]
    assert relative_error(start, weights(failed.model), weights(undefined.model)) < 1e-6
    assert completions_of(failed)[1].advantage == 0
    assert sum(c.advantage != 0 for c in completions_of(failed)) >= 2


def always_fails(completions):
    raise KeyError("made up")


def test_rewards_that_are_broken_stop_the_run_with_a_checkpoint(tmp_path, caplog):
    calls = []

    def breaks_later(completions):
        calls.append(0)
        return length(completions) if len(calls) < 3 else always_fails(completions)

    options = {"rollout_func": None, "max_steps": 5, "output_dir": str(tmp_path)}
    with pytest.raises(RunStopped, match=r"'breaks_later' failed on 4 of the 4 completions.*checkpoint-2"):
        train(make_model(), PROMPTS, reward_funcs=breaks_later, **options)
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert caplog.text.count("Traceback") == 1


def test_a_few_failures_do_not_stop_it():
    options = {"rollout_func": None, "max_steps": 3, "max_reward_failure_rate": 1.0}
    trainer = train(make_model(), PROMPTS, reward_funcs=[length, always_fails], **options)
    assert logged(trainer, "rewards/always_fails/failures") == [4.0] * 3
    assert logged(trainer, "frac_reward_zero_std") == [1.0] * 3
    assert not logged(trainer, "reward")


def test_a_failure_may_stop_the_run(tmp_path):
    options = {"max_steps": 3, "on_reward_error": "raise", "output_dir": str(tmp_path)}
    with pytest.raises(RunStopped, match=r"'always_fails' failed.*KeyError"):
        train(make_model(), PROMPTS, reward_funcs=always_fails, **options)


# ---- Memory ----


def with_room_for(model, tokens, only_training=False):
    """The model runs out of memory in micro-batches of more tokens; the sizes that it has seen."""
    sizes = []

    def hook(module, args, kwargs):
        if "logprob_request" in kwargs and (torch.is_grad_enabled() or not only_training):
            sizes.append(kwargs["input_ids"].numel())
            if sizes[-1] > tokens:
                raise torch.OutOfMemoryError("made up")

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return model, sizes


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "beta": 0.1}, {"gradient_accumulation_steps": 2}])
def test_a_step_that_does_not_fit_is_made_anew_in_smaller_micro_batches(options, shared_prefix, caplog):
    options = {"max_steps": 2, "per_device_train_batch_size": 8, "shared_prefix": shared_prefix} | options
    start = weights(make_model())
    model, sizes = with_room_for(make_model(), math.inf)
    plain = train(model, PROMPTS, learning_rate=0.01, **options)
    room = max(sizes) - 1
    model, sizes = with_room_for(make_model(), room)
    small = train(model, PROMPTS, learning_rate=0.01, **options)
    assert relative_error(start, weights(small.model), weights(plain.model)) < 1e-5
    failed = [place for place, size in enumerate(sizes) if size > room]
    assert failed
    assert failed[-1] < len(sizes) - 1
    assert "max_tokens_per_micro_batch=" in caplog.text
    for name in ("loss", "policy_signal", "entropy", "reward"):
        assert logged(small, name) == pytest.approx(logged(plain, name), rel=1e-4, abs=1e-6)


def test_later_steps_keep_to_the_size_that_fitted():
    model, sizes = with_room_for(make_model(), 30)
    trainer = train(model, PROMPTS, max_steps=6, per_device_train_batch_size=16, num_generations=4)
    assert sum(size > 30 for size in sizes) <= 3
    assert all(size <= 30 for size in sizes[-4:])
    assert trainer._evaluator.packer.max_tokens <= 30


def test_a_completion_that_does_not_fit_stops_the_run(tmp_path):
    model, _ = with_room_for(make_model(), 3, only_training=True)
    with pytest.raises(RunStopped, match=r"a single completion.*max_completion_length"):
        train(model, PROMPTS, max_steps=2, output_dir=str(tmp_path))


# ---- Long phases ----


def test_the_watchdog_names_phase_and_rank_and_goes_on_to_say_so(caplog):
    with Watchdog(0.05, rank=3).phase("sampling"):
        deadline = time.monotonic() + 20
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [record.getMessage() for record in caplog.records[:2]] == [
        "Rank 3: sampling has taken 0.05 s so far (phase_warning_seconds).",
        "Rank 3: sampling has taken 0.1 s so far (phase_warning_seconds).",
    ]


def test_the_watchdog_keeps_still_about_what_has_ended(caplog):
    for seconds in (0.05, None):
        with pytest.raises(KeyError), Watchdog(seconds, 0).phase("sampling"):
            raise KeyError
    time.sleep(0.2)
    assert not caplog.records


def test_a_slow_reward_function_is_named(caplog):
    def sleepy(completions):
        deadline = time.monotonic() + 20
        while "sleepy" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        return [float(len(c)) for c in completions]

    with caplog.at_level(logging.WARNING):
        train(make_model(), PROMPTS, reward_funcs=sleepy, rollout_func=None, phase_warning_seconds=0.05)
    assert any("Rank 0" in r.getMessage() and "sleepy" in r.getMessage() for r in caplog.records)


# ---- Ranks ----


def fails(error):
    def work():
        raise error

    return work


def test_what_works_is_returned():
    assert run_on_all_ranks(lambda: 7, Ranks(0, 2, lambda x: [*x, None])) == 7


@pytest.mark.parametrize(
    "own, others, expected, text",
    [
        (None, KeyError("k"), RuntimeError, "Rank 1: KeyError"),
        (None, RunStopped("why"), RunStopped, "why"),
        (None, StopRequested("SIGTERM"), StopRequested, "rank 1"),
        (KeyError("k"), None, KeyError, "k"),
        (KeyError("k"), StopRequested("SIGTERM"), KeyError, "k"),
        (StopRequested("SIGTERM"), KeyError("k"), RuntimeError, "Rank 1: KeyError"),
        (StopRequested("SIGTERM"), None, StopRequested, "SIGTERM"),
        (StopRequested("SIGTERM"), StopRequested("SIGUSR1"), StopRequested, "SIGTERM"),
        (RunStopped("why"), KeyError("k"), RuntimeError, "why"),
        (RunStopped("why"), RunStopped("too"), RunStopped, "why"),
    ],
)
def test_what_a_rank_meets_all_ranks_meet(own, others, expected, text):
    """Two ranks in two threads, each of which waits for the other."""
    slots, barrier, raised = [None, None], threading.Barrier(2, timeout=20), [None, None]

    def rank(number, error):
        def gather(values):
            slots[number] = values
            barrier.wait()
            return slots[0] + slots[1]

        try:
            run_on_all_ranks(fails(error) if error else lambda: None, Ranks(number, 2, gather))
        except BaseException as met:
            raised[number] = met

    threads = [threading.Thread(target=rank, args=pair) for pair in enumerate((own, others))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert type(raised[0]) is expected
    assert text in str(raised[0])
    assert raised[1] is not None


def test_a_rank_that_others_wait_for_in_a_forward_does_not_wait_for_them():
    with pytest.raises(OutOfStep, match="why"):
        run_on_all_ranks(fails(OutOfStep("why")), Ranks(0, 2, lambda reports: pytest.fail("others do not get here")))


def test_a_signal_breaks_into_what_may_be_broken_alone():
    signals = StopSignals()
    with signals.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == "SIGUSR1"
        with pytest.raises(StopRequested), signals.interruptible():
            pytest.fail("it was not asked to stop at once")
        signals.received = None
        with pytest.raises(StopRequested), signals.interruptible():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)


def test_what_another_thread_may_break_off_does_not_break_the_main_thread():
    """It samples ahead there; a signal must not end the update that the main thread is in."""
    signals, entered, leave = StopSignals(), threading.Event(), threading.Event()

    def sample():
        with signals.interruptible():
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=sample)
    with signals.listening():
        thread.start()
        entered.wait(20)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
        leave.set()
        thread.join(20)


def test_a_run_in_a_thread_does_not_listen():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def listen():
        with StopSignals().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(
    "difference, warns", [(None, False), (0.0, False), (0.05, False), (0.051, True), (math.nan, False)]
)
def test_a_sampler_that_drifts_from_the_trainer_is_warned_of(caplog, difference, warns):
    metrics = {} if difference is None else {"sampling/sampling_logp_difference/mean": difference}
    warn_of_drift(metrics, 0.05)
    lines = [record.getMessage() for record in caplog.records]
    assert ["0.051 nats on average, where rounding explains 0.05" in line for line in lines] == [True] * warns
