"""Faults of reward functions, in a pool: each leaves the right table or a clear error, and nothing hangs."""

import functools
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_trl.rewards import RewardBatch, RewardError, Rewards, RewardTable
from grpo_trl.rewards import pool as module

from ..helpers import reward_faults as faults


MEMORY = 256 * 1024**2


@pytest.fixture
def make_rewards():
    made = []

    def make(functions, workers: int = 2, **options) -> Rewards:
        made.append(Rewards(functions, workers=workers, **options))
        return made[-1]

    yield make
    for rewards in made:
        rewards.close()


def make_batch(count: int = 8, bad=(), group: int = 4, **columns) -> RewardBatch:
    """Completions of `row` characters; those in `bad` hold an x."""
    texts = [("x" if row in bad else "a") + "a" * row for row in range(count)]
    return RewardBatch(["p"] * count, texts, [[1]] * count, columns, None, group)


def check(table: RewardTable, batch: RewardBatch, bad) -> None:
    """The rows in `bad` failed; the others have the length of their text; a second function has its own everywhere."""
    bad_B = torch.tensor([row in bad for row in range(len(batch.completions))])
    length_B = torch.tensor([float(len(text)) for text in batch.completions], dtype=torch.float64)
    assert table.failed_BF[:, 0].tolist() == bad_B.tolist()
    assert not table.failed_BF[:, 1:].any()
    assert table.values_BF[:, 0].isnan().tolist() == bad_B.tolist()
    assert table.total_B.isnan().tolist() == bad_B.tolist()
    assert table.values_BF[~bad_B, 0].tolist() == length_B[~bad_B].tolist()
    assert table.values_BF[:, 1].tolist() == length_B.tolist()
    assert table.total_B[~bad_B].tolist() == (2 * length_B[~bad_B]).tolist()


def check_fault(make_rewards, fault, batch, bad, **options):
    rewards = make_rewards([functools.partial(faults.faulty, fault=fault), faults.lengths], **options)
    check(rewards(batch), batch, bad)


@pytest.mark.parametrize("fault", ["throw", "unpicklable", "hang", "vanish"])  # further ones: test_worker.py
def test_a_fault_in_one_of_a_hundred_completions(make_rewards, fault):
    # Time runs out for functions that hang only; the others must be found to have ended without it.
    timeout = 0.3 if fault == "hang" else None
    check_fault(make_rewards, fault, make_batch(100, {37}), {37}, timeout=timeout)


@pytest.mark.parametrize("fault, count", [("throw", 100), ("hang", 4), ("vanish", 6)])
def test_a_fault_in_all_completions(make_rewards, fault, count):
    check_fault(make_rewards, fault, make_batch(count, range(count), group=2), range(count), timeout=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hang", "vanish"])
def test_a_fault_in_all_of_a_hundred_completions(make_rewards, fault):
    check_fault(make_rewards, fault, make_batch(100, range(100)), range(100), timeout=0.3)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is enforced on Linux")
def test_memory_without_end(make_rewards):
    check_fault(make_rewards, "devour", make_batch(8, {5}), {5}, memory_limit=MEMORY)


def test_a_value_that_is_no_reward(make_rewards):
    batch = make_batch(100, {37})
    for kind in faults.BAD_VALUES:
        for workers in (0, 2):
            rewards = make_rewards([functools.partial(faults.bad_value, kind=kind), faults.lengths], workers)
            check(rewards(batch), batch, {37})
            rewards.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "function, message",
    [
        (functools.partial(faults.wrong_count, change=-1), "'wrong_count' returned {fewer} values for {count}"),
        (functools.partial(faults.wrong_count, change=1), "'wrong_count' returned {more} values for {count}"),
        (faults.wrong_type, "'wrong_type' returned float; it must return a list"),
        (faults.noted_too_few, r"'noted_too_few' calls log_extra\('seen', ...\) with {fewer} values for {count}"),
    ],
)
def test_a_mistake_stops_and_is_not_repeated_on_parts(make_rewards, function, message, workers):
    count = 100 // max(workers, 1)
    with pytest.raises(ValueError, match=message.format(count=count, fewer=count - 1, more=count + 1)):
        make_rewards([function, faults.lengths], workers, retries=2)(make_batch(100, {37}, group=50))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_of_a_function_without_weight_stops_nothing(make_rewards, workers):
    table = make_rewards([faults.noted_too_few, faults.lengths], workers, weights=[0.0, 1.0])(make_batch(4))
    assert table.failed_BF.tolist() == [[True, False]] * 4
    assert table.total_B.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_the_failing_completion_is_named_with_the_workers_traceback(make_rewards, caplog):
    make_rewards(functools.partial(faults.faulty, fault="throw"))(make_batch(8, {5}))
    [record] = caplog.records
    assert "'faulty' failed on a completion: KeyError: 'no xaaaaa'" in record.message
    assert "The completion: xaaaaa\n" in record.message
    assert 'raise KeyError(f"no {text}")' in record.message


@pytest.mark.parametrize("fault", ["throw", "vanish"])
def test_raise_stops_with_the_function_and_the_completion(make_rewards, fault):
    function = functools.partial(faults.faulty, fault=fault)
    rewards = make_rewards([function, faults.lengths], timeout=0.4, on_error="raise")
    with pytest.raises(RewardError) as raised:
        rewards(make_batch(8, {5}))
    assert (raised.value.name, raised.value.completion) == ("faulty", "xaaaaa")
    assert ("KeyError" in raised.value.traceback) == (fault == "throw")
    batch = make_batch(4)
    check(rewards(batch), batch, ())


# ---- How calls are made ----
def calls_in(folder: Path) -> list[int]:
    return sorted(len(file.read_text().splitlines()) for file in folder.iterdir())


def test_a_function_is_called_on_about_one_part_for_each_worker(make_rewards, tmp_path):
    make_rewards(functools.partial(faults.counted, folder=str(tmp_path)))(make_batch(24, group=4))
    assert calls_in(tmp_path) == [12, 12]


def test_a_failing_part_is_called_by_group_and_then_by_completion(make_rewards, tmp_path):
    make_rewards(functools.partial(faults.counted, folder=str(tmp_path)))(make_batch(24, {7}, group=4))
    assert calls_in(tmp_path) == sorted([12, 12, 4, 4, 4, 1, 1, 1, 1])


def test_retries_repeat_a_call_as_it_is(make_rewards, tmp_path):
    function = functools.partial(faults.fails_first, folder=str(tmp_path))
    rewards = make_rewards([function, faults.lengths], workers=1, retries=1)
    batch = make_batch(4)
    check(rewards(batch), batch, ())


def test_what_works_on_one_completion_at_a_time_is_no_failure(make_rewards, caplog):
    batch = make_batch(8)
    check(make_rewards([faults.only_alone, faults.lengths])(batch), batch, ())
    assert "failed on 4 completions together, on none of them alone: ValueError: one at a time" in caplog.text


def test_processes_stay_and_share_the_work(make_rewards):
    rewards = make_rewards(faults.process)
    batch = make_batch(8)
    pids = [set(rewards(batch).total_B.tolist()) for _ in range(3)]
    assert len(pids[0]) == 2
    assert os.getpid() not in pids[0]
    assert pids[0] == pids[1] == pids[2]


def test_only_workers_that_hang_are_replaced(make_rewards):
    rewards = make_rewards(faults.process_or_hang, timeout=0.3)
    before, during, after = (set(rewards(make_batch(8, bad)).total_B.tolist()) for bad in ((), {0}, ()))
    assert len(before) == len(after) == 2
    assert before & during & after
    assert before != after


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is enforced on Linux")
def test_a_worker_that_has_filled_its_memory_is_replaced(make_rewards):
    rewards = make_rewards(faults.process_or_devour, workers=1, memory_limit=MEMORY)
    before, _, after = (rewards(make_batch(1, bad, group=1)).total_B.item() for bad in ((), {0}, ()))
    assert before != after


def test_functions_run_at_the_same_time(make_rewards, tmp_path):
    rewards = make_rewards([functools.partial(faults.meets, folder=str(tmp_path), own=own) for own in "ab"], timeout=20)
    assert rewards(make_batch(1, group=1)).total_B.tolist() == [2.0]


def test_closing_ends_the_workers_and_a_later_call_starts_others(make_rewards):
    rewards = make_rewards(faults.process)
    pids = rewards(make_batch(8)).total_B.tolist()
    rewards.close()
    for pid in set(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert not set(rewards(make_batch(8)).total_B.tolist()) & set(pids)


def test_what_a_signal_handler_raises_leaves_no_stale_answer(make_rewards):
    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    rewards = make_rewards([functools.partial(faults.faulty, fault="hang"), faults.lengths])
    batch = make_batch(8)
    check(rewards(batch), batch, ())
    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(Stop):
            rewards(make_batch(8, {1, 6}))
    finally:
        signal.signal(signal.SIGALRM, previous)
    check(rewards(batch), batch, ())


# ---- What functions get and note ----
def test_columns_reach_the_rows_they_belong_to(make_rewards):
    batch = make_batch(8, answer=["a" * (row + 1) if row % 3 else "no" for row in range(8)])
    table = make_rewards(faults.matches)(batch)
    assert table.total_B.tolist() == [float(row % 3 > 0) for row in range(8)]


def test_the_state_of_the_trainer_reaches_functions_that_take_it(make_rewards):
    state = SimpleNamespace(global_step=3, log_history=[{}] * 5)
    batch = RewardBatch(["p"] * 4, list("abcd"), [[1]] * 4, {"answer": list("abcd")}, state, 2)
    table = make_rewards([faults.with_state, faults.with_kwargs])(batch)
    assert table.values_BF.tolist() == [[8.0, 5.0]] * 4  # each of two calls has two answers
    assert not table.failed_BF.any()


def test_notes_of_parts_are_put_together_and_those_of_failed_calls_dropped(make_rewards):
    batch = make_batch(8, {5})
    logs = make_rewards(faults.noted)(batch).logs
    expected = [text.upper() for text in batch.completions]
    expected[5] = None
    assert logs.columns == {"seen": expected}
    assert logs.metrics == {"calls": [4.0, 1.0, 1.0, 1.0]}


def test_what_an_instance_holds_here_is_what_it_holds_there(make_rewards):
    scaled = faults.Scaled(2.0)
    rewards = make_rewards([scaled, faults.Scaled(3.0).method])
    batch = make_batch(2)
    assert rewards(batch).values_BF.tolist() == [[2.0, 3.0], [4.0, 6.0]]
    scaled.scale = 5.0
    assert rewards(batch).values_BF.tolist() == [[5.0, 3.0], [10.0, 6.0]]
    assert scaled.calls == 0


# ---- What stays in the training process ----
async def async_process(completions):
    return faults.process(completions)


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda completions: faults.process(completions), "it cannot be pickled"),
        (async_process, "it is async"),
        (faults.NotLoadable(), "a worker cannot load it: ImportError: no such module here"),
    ],
)
def test_what_workers_cannot_call_is_called_here_and_said_once(make_rewards, function, reason, caplog):
    rewards = make_rewards([function, faults.lengths])
    for _ in range(2):
        table = rewards(make_batch(4))
        assert not table.failed_BF.any()
        own = [1.0, 2.0, 3.0, 4.0] if isinstance(function, faults.NotLoadable) else [float(os.getpid())] * 4
        assert table.values_BF[:, 0].tolist() == own
    [record] = caplog.records
    assert f"{rewards.names[0]!r} is called in the training process, not by reward_workers: {reason}" in record.message


def test_a_model_stays_here(make_rewards, tokenizer, caplog):
    from .test_call import make_reward_model

    table = make_rewards([make_reward_model(), faults.lengths], processing_classes=[tokenizer, None])(make_batch(4))
    assert not table.failed_BF.any()
    assert not table.values_BF.isnan().any()
    assert "it is a model" in caplog.text


def test_what_carries_too_much_stays_here(make_rewards, monkeypatch, caplog):
    monkeypatch.setattr(module, "LARGEST_FUNCTION", 2**20)
    batch = make_batch(2)
    scaled = faults.Scaled(1.0)
    scaled.ballast = bytes(2**21)
    assert make_rewards(scaled)(batch).total_B.tolist() == [1.0, 2.0]
    assert "pickled it has 2 MiB" in caplog.text
    assert scaled.calls == 1


def test_arguments_that_cannot_be_pickled_keep_the_function_here(make_rewards, caplog):
    batch = make_batch(8, answer=[lambda: None] * 8)
    table = make_rewards([faults.matches, faults.lengths])(batch)
    assert table.values_BF[:, 0].tolist() == [0.0] * 8
    assert "its arguments cannot be pickled" in caplog.text


def test_a_function_that_stays_here_fails_like_one_in_a_worker(make_rewards):
    batch = make_batch(8, {5})
    rewards = make_rewards([lambda completions: faults.faulty(completions, "throw"), faults.lengths])
    check(rewards(batch), batch, {5})


def test_an_async_function_has_the_time_limit_too(make_rewards):
    async def patient(completions):
        import asyncio

        await asyncio.sleep(60 if any("x" in text for text in completions) else 0)
        return faults.lengths(completions)

    batch = make_batch(8, {5})
    check(make_rewards([patient, faults.lengths], timeout=0.4)(batch), batch, {5})


def test_a_wait_is_watched_under_the_names_of_its_functions(make_rewards):
    entered = []

    class Watch:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            entered.append(self.name)

        def __exit__(self, *_):
            entered.append("end")

    functions = [faults.lengths, faults.process, async_process, lambda completions: [1.0] * len(completions)]
    make_rewards(functions)(make_batch(4), phase=Watch)
    assert entered == ["lengths, process", "end", "<lambda>", "end", "async_process", "end"]


def test_notes_do_not_depend_on_who_answers_first(make_rewards):
    batch = make_batch(16)
    logs = make_rewards(faults.noted_slowly)(batch).logs  # of two calls, the first takes longer
    assert logs.metrics == {"first": [1.0, 9.0]}
