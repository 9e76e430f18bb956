"""What a run leaves, read back."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_trl.report import Run, RunLog
from grpo_trl.report.log import SAMPLED_FILES, SAMPLED_GROUPS, completion_files, evaluation_files, plain, step_of
from grpo_trl.report.run import newest_completions, read_completions

from .test_tolerant import OBJECTS


def table(groups, size=4):
    rows = groups * size
    return {"prompt": [f"p{row // size}" for row in range(rows)], "completion": ["c"] * rows, "right": [1.0] * rows}


def test_metrics_come_back_as_they_were(tmp_path):
    log = RunLog(tmp_path / "run")
    log.start(0, 9, {"run_config.json": {"a": 1}, "environment.json": {}, "plan.json": {}})
    log.entry(1, {"reward": 0.5, "loss": math.inf, "count": 3})
    log.entry(2, {"reward": 0.75, "loss": math.nan})
    log.end(2)
    run = Run.read(tmp_path / "run")
    assert (run.name, run.step, run.max_steps, run.ended, run.config) == ("run", 2, 9, True, {"a": 1})
    assert run.series("reward") == ([1, 2], [0.5, 0.75])
    assert run.series("loss")[1][0] == math.inf
    assert math.isnan(run.last("loss"))
    assert run.last("absent") is None


def test_every_line_is_json_whatever_the_metrics_are(tmp_path):
    log = RunLog(tmp_path)
    log.entry(1, {"a": object(), "b": float("nan"), "\ud800": {1: (2, b"x")}})
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["step"] == 1


@given(OBJECTS)
def test_any_object_becomes_json(value):
    json.loads(json.dumps(plain(value), allow_nan=False))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_a_resumed_run_has_each_step_once(tmp_path_factory, lengths):
    """Each part of the run starts at some step that the one before has reached, and goes further."""
    folder, start = tmp_path_factory.mktemp("resumed"), 0
    log = RunLog(folder)
    for part, length in enumerate(lengths):
        log.start(start, 99, {})
        for step in range(start + 1, start + length + 1):
            log.entry(step, {"part": part})
        begun = start
        start += length // 2
    steps, _ = Run.read(folder).series("part")
    assert steps == list(range(1, begun + lengths[-1] + 1))


def test_an_unfinished_line_is_left_out(tmp_path):
    RunLog(tmp_path).entry(1, {"reward": 1.0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert Run.read(tmp_path).step == 1


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no log\.jsonl"):
        Run.read(tmp_path)


def test_a_sample_has_the_first_groups_and_names_them(tmp_path):
    log = RunLog(tmp_path)
    log.completions(3, table(groups=SAMPLED_GROUPS + 5), num_generations=4)
    (file,) = completion_files(tmp_path)
    kept = read_completions(file)
    assert kept["group"] == [row // 4 for row in range(4 * SAMPLED_GROUPS)]
    assert set(kept["step"]) == {3}
    assert newest_completions(tmp_path) == kept


def test_the_files_of_samples_are_bounded_and_spread_over_the_run(tmp_path):
    log = RunLog(tmp_path)
    last = 5 * SAMPLED_FILES
    for step in range(1, last + 1):
        log.completions(step, table(1), 4)
    steps = [int(file.stem.split("_")[1]) for file in completion_files(tmp_path)]
    assert SAMPLED_FILES / 2 <= len(steps) <= SAMPLED_FILES
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert steps[0] == 1
    assert max(gaps) <= 2 * min(gaps)
    assert last - steps[-1] < 2 * max(gaps)


def test_all_completions_are_kept_on_request(tmp_path):
    log = RunLog(tmp_path, keeps_all=True)
    for step in range(1, SAMPLED_FILES + 10):
        log.completions(step, table(SAMPLED_GROUPS + 2), 4)
    files = completion_files(tmp_path)
    assert len(files) == SAMPLED_FILES + 9
    assert len(read_completions(files[0])["prompt"]) == 4 * (SAMPLED_GROUPS + 2)


@pytest.mark.parametrize("keeps_all, kept", [(False, [0, 30]), (True, [0, 10, 20, 30])])
def test_the_first_and_the_last_evaluation_of_each_dataset_are_kept(tmp_path, keeps_all, kept):
    log = RunLog(tmp_path, keeps_all)
    for step in (0, 10, 20, 30):
        for name in ("eval", "eval_a/b c_7"):
            log.evaluation(step, name, table(2), 4)
    files = evaluation_files(tmp_path)
    assert {name: [step_of(file) for file in of_name] for name, of_name in files.items()} == {
        "eval": kept,
        "eval_a/b c_7": kept,
    }
    assert read_completions(files["eval"][-1])["group"] == [0] * 4 + [1] * 4


def test_completions_of_steps_that_are_done_again_are_deleted(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.completions(step, table(1), 4)
        log.evaluation(step, "eval", table(1), 4)
    (tmp_path / "completions" / "completions_mine.parquet").touch()
    log.start(2, 9, {})
    (tmp_path / "completions" / "completions_mine.parquet").unlink()
    log.start(2, 9, {})
    assert [step_of(file) for file in completion_files(tmp_path)] == [1, 2]
    assert [step_of(file) for file in evaluation_files(tmp_path)["eval"]] == [1]


def test_a_new_run_in_an_old_folder_sets_the_old_log_aside(tmp_path):
    for number in range(3):
        log = RunLog(tmp_path)
        log.start(0, 9, {})
        log.entry(1, {"number": number})
        log.completions(1, table(1), 4)
        RunLog(tmp_path).start(1, 9, {})  # resumed: continues the same log
    assert Run.read(tmp_path).series("number") == ([1], [2.0])
    assert len(completion_files(tmp_path)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        *("log.jsonl", "log.1.jsonl", "log.2.jsonl"),
        *("completions", "completions.1", "completions.2"),
    }
