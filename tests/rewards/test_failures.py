import logging
import math
import pickle

import pytest

from grpo_trl.rewards import RewardBatch, RewardError, RewardLogs
from grpo_trl.rewards.failures import FailureReport, RewardCall, RewardCallTracker
from grpo_trl.rewards.values import RewardResult
from grpo_trl.rewards.worker import CallRaised, WorkerDied


def make_tracker(
    count: int = 8, group: int = 4, retries: int = 0, on_error: str = "exclude", **options
) -> RewardCallTracker:
    batch = RewardBatch([""] * count, [f"c{i}" for i in range(count)], [[]] * count, {}, None, group)
    return RewardCallTracker("f", None, batch, retries, FailureReport(on_error), **options)


def result(values, wrong=None, logs=None) -> RewardResult:
    return RewardResult(list(values), wrong or {}, logs or RewardLogs())


def calls_until_done(tracker: RewardCallTracker, bad: set[int], parts: int = 1) -> list[list[int]]:
    """Play a function that fails on the rows in `bad` and gives the others their row as reward; the rows of each call."""
    queue, made = tracker.calls(parts), []
    while queue:
        call = queue.pop(0)
        made.append(list(call.rows))
        failed = bad & set(call.rows)
        queue += tracker.record(call, OSError("bad row") if failed else result(map(float, call.rows)))
    return made


@pytest.mark.parametrize(
    "count, group, parts, expected",
    [
        (8, 4, 1, [8]),
        (8, 4, 2, [4, 4]),
        (8, 4, 5, [4, 4]),
        (12, 4, 2, [8, 4]),
        (6, 1, 4, [2, 2, 2]),
        (7, 4, 2, [4, 3]),
        (0, 4, 2, []),
    ],
)
def test_a_batch_is_cut_between_groups(count, group, parts, expected):
    calls = make_tracker(count, group).calls(parts)
    assert [len(call.rows) for call in calls] == expected
    assert [row for call in calls for row in call.rows] == list(range(count))


def test_what_does_not_fail_is_called_once():
    tracker = make_tracker()
    assert calls_until_done(tracker, set()) == [list(range(8))]
    assert tracker.close()[0] == [float(row) for row in range(8)]
    assert tracker.failed == [False] * 8


def test_a_failure_is_looked_for_by_group_and_then_by_completion():
    tracker = make_tracker()
    assert calls_until_done(tracker, {5}) == [list(range(8)), [0, 1, 2, 3], [4, 5, 6, 7], [4], [5], [6], [7]]
    values, _ = tracker.close()
    assert [row for row, failed in enumerate(tracker.failed) if failed] == [5]
    assert math.isnan(values.pop(5))
    assert values == [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0]


def test_a_single_group_goes_straight_to_its_completions():
    assert calls_until_done(make_tracker(4, 4), {0}) == [[0, 1, 2, 3], [0], [1], [2], [3]]
    assert calls_until_done(make_tracker(2, 1), {0}) == [[0, 1], [0], [1]]
    assert calls_until_done(make_tracker(1, 1), {0}) == [[0]]


def test_whole_calls_and_single_completions_are_retried_groups_are_not():
    made = calls_until_done(make_tracker(4, 2, retries=2), {0})
    whole = [0, 1, 2, 3]
    assert sorted(made) == sorted([whole, whole, whole, [0, 1], [2, 3], [0], [0], [0], [1]])


def test_a_retry_that_succeeds_leaves_no_failure(caplog):
    tracker = make_tracker(retries=1)
    [call] = tracker.calls()
    assert call.retries == 1
    [again] = tracker.record(call, OSError("not yet"))
    assert again == RewardCall(call.rows, 0)
    assert tracker.record(again, result([1.0] * 8)) == []
    assert tracker.close()[0] == [1.0] * 8
    assert not any(tracker.failed)


def test_a_value_that_is_no_reward_fails_its_completion_without_another_call():
    tracker = make_tracker(4, 2)
    [call] = tracker.calls()
    assert tracker.record(call, result([1.0, math.nan, 3.0, math.nan], wrong={3: "returned 'x' (str)"})) == []
    assert tracker.failed == [False, False, False, True]


def test_the_place_in_a_part_is_turned_into_the_row():
    tracker = make_tracker(4, 2)
    first, second = tracker.calls(2)
    tracker.record(second, result([3.0, math.nan], wrong={1: "returned 'x' (str)"}))
    tracker.record(first, result([1.0, 2.0]))
    assert tracker.failed == [False, False, False, True]
    assert tracker.close()[0][:3] == [1.0, 2.0, 3.0]


def test_clearing_forgets_everything():
    tracker = make_tracker(2, 1)
    calls_until_done(tracker, {0, 1})
    tracker.clear()
    assert tracker.failed == [False, False]
    values, _ = tracker.close()
    assert all(map(math.isnan, values))


# ---- Notes ----
def logs(column=None, metric=None) -> RewardLogs:
    made = RewardLogs()
    if column is not None:
        made.log_extra("seen", column)
    if metric is not None:
        made.log_metric("m", metric)
    return made


def test_notes_stand_in_the_order_of_the_completions_with_none_where_there_is_none():
    tracker = make_tracker(6, 2)
    first, second, third = tracker.calls(3)
    tracker.record(third, result([1.0] * 2, logs=logs("ef", 3.0)))
    tracker.record(second, result([1.0] * 2))
    tracker.record(first, result([1.0] * 2, logs=logs("ab", 1.0)))
    _, merged = tracker.close()
    assert merged.columns == {"seen": ["a", "b", None, None, "e", "f"]}
    assert merged.metrics == {"m": [1.0, 3.0]}


# ---- Mistakes, and functions that only watch ----
def test_a_result_that_is_wrong_as_a_whole_stops_and_is_not_repeated():
    tracker = make_tracker(4, 2, retries=3)
    [call] = tracker.calls()
    with pytest.raises(ValueError, match="'f' returned 1 values for 4"):
        tracker.record(call, RewardResult.of([1.0], 4, RewardLogs(), "f"))


def test_a_function_that_watches_stops_nothing(caplog):
    tracker = make_tracker(4, 2, on_error="raise", watches=True)
    first, second = tracker.calls(2)
    assert tracker.record(first, RewardResult.of([1.0], 2, RewardLogs(), "f")) == []
    for single in tracker.record(second, OSError("bad row")):
        assert tracker.record(single, OSError("bad row")) == []
    assert tracker.failed == [True] * 4
    assert "'f' returned 1 values for 2" in caplog.text


def test_a_value_that_could_overflow_fails_its_completion():
    tracker = make_tracker(4, 4, largest=1e300)
    [call] = tracker.calls()
    tracker.record(call, result([1e300, 2e300, -2e300, math.nan]))
    values, _ = tracker.close()
    assert tracker.failed == [False, True, True, False]
    assert values[0] == 1e300


# ---- What is said ----
def test_the_first_failure_is_logged_once_with_its_completion_and_traceback(caplog):
    tracker = make_tracker(4, 2)
    calls_until_done(tracker, {1, 3})
    calls_until_done(RewardCallTracker("f", None, tracker.batch, 0, tracker.report), {0})
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "The reward function 'f' failed on a completion: OSError: bad row" in record.message
    assert "The completion: c1\n" in record.message
    assert "rewards/f/failures" in record.message


def test_each_function_has_a_first_failure(caplog):
    report = FailureReport("exclude")
    for name in "fgf":
        report.completion_failed(name, "c", "message", "")
    assert [record.message.split("'")[1] for record in caplog.records] == ["f", "g"]


def test_the_traceback_of_an_exception_is_logged(caplog):
    tracker = make_tracker(1, 1)
    try:
        raise KeyError("here")
    except KeyError as error:
        tracker.record(tracker.calls()[0], error)
    assert 'raise KeyError("here")' in caplog.text


def test_the_traceback_of_a_worker_is_logged_and_not_the_trainers_own(caplog):
    tracker = make_tracker(1, 1)
    tracker.record(tracker.calls()[0], CallRaised("KeyError: 'there'", "Traceback of the worker"))
    assert "failed on a completion: KeyError: 'there'" in caplog.text
    assert "Traceback of the worker" in caplog.text


def test_a_long_completion_is_cut(caplog):
    FailureReport("exclude").completion_failed("f", "x" * 501 + "end", "message", "")
    assert "x" * 500 + "...\n" in caplog.text
    assert "x" * 501 not in caplog.text


def test_messages_are_shown_as_they_are(caplog):
    FailureReport("exclude").completion_failed("f", [{"role": "assistant", "content": "hello"}], "message", "")
    assert "[{'role': 'assistant', 'content': 'hello'}]" in caplog.text


def test_what_fails_together_only_is_logged_and_is_no_failure(caplog):
    tracker = make_tracker(2, 2)
    [call] = tracker.calls()
    for single in tracker.record(call, WorkerDied("the worker process was ended by SIGKILL")):
        tracker.record(single, result([1.0]))
    assert tracker.close()[0] == [1.0, 1.0]
    assert not any(tracker.failed)
    assert (
        "failed on 2 completions together, on none of them alone: the worker process was ended by SIGKILL"
        in caplog.text
    )


def test_the_error_survives_the_way_to_another_rank():
    error = RewardError("f", "c", "message", "Traceback")
    back = pickle.loads(pickle.dumps(error))
    assert (back.name, back.completion, back.message, back.traceback) == ("f", "c", "message", "Traceback")
    assert str(back) == str(error)


def test_raise_stops_at_the_completion_that_is_to_blame(caplog):
    tracker = make_tracker(4, 2, on_error="raise")
    with pytest.raises(RewardError, match="'f' failed on a completion: OSError: bad row") as raised:
        calls_until_done(tracker, {2, 3})
    assert raised.value.name == "f"
    assert raised.value.completion == "c2"
    assert "OSError: bad row" in raised.value.traceback
    assert str(raised.value).endswith(raised.value.traceback.rstrip())
    assert not caplog.records
