import math
from types import SimpleNamespace

import pytest
import torch

from grpo_trl.metrics import MetricLog
from grpo_trl.rewards import RewardLogs, Rewards, RewardTable
from grpo_trl.rollout.base import Rollout
from grpo_trl.seeds import derive_seed
from grpo_trl.trainer.ahead import SampledRollout
from grpo_trl.trainer.runner import RewardedRollout, RolloutRunner
from grpo_trl.types import Completion, Prompt


NAN = math.nan
IDS = [[7, 1], [7, 7, 2], [], [7, 7, 7, 7], [1], [7, 1, 7, 7]]  # the last two-thirds: empty, cut off, ended, cut off
VALUES = torch.tensor(
    [[1.0, NAN], [3.0, 10.0], [2.0, NAN], [0.5, NAN], [NAN, NAN], [0.5, NAN]], dtype=torch.float64
)  # of six completions, two functions
FAILED = torch.zeros(6, 2, dtype=torch.bool)
FAILED[4, 0] = True
TOTAL = torch.tensor([1.0, 13.0, 2.0, 0.5, NAN, 0.5], dtype=torch.float64)


def make_round(notes: RewardLogs | None = None, total=TOTAL, num_generations: int = 3) -> RewardedRollout:
    return RewardedRollout(
        num_generations=num_generations,
        prompts=["a"] * 3 + ["b"] * 3,
        completions=[Completion([5, 6], ids, [True] * len(ids), ended=ids[-1:] in ([1], [2])) for ids in IDS],
        texts=["t0", "t1", "t2", "t3", "t4", "t5"],
        rewards=RewardTable(["f", "g"], VALUES, total, notes or RewardLogs(), FAILED),
    )


def values(sampled: RewardedRollout) -> dict[str, float]:
    return {name: metric.value for name, metric in sampled.metrics().items()}


def std(numbers: list[float]) -> float:
    mean = sum(numbers) / len(numbers)
    return math.sqrt(sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1))


def test_reward_metrics_are_those_of_the_defined_rewards():
    metrics = values(make_round())
    assert metrics["reward"] == pytest.approx((1 + 13 + 2 + 0.5 + 0.5) / 5)
    assert metrics["reward_std"] == pytest.approx(std([1, 13, 2, 0.5, 0.5]))
    assert metrics["rewards/f/mean"] == pytest.approx((1 + 3 + 2 + 0.5 + 0.5) / 5)
    assert metrics["rewards/f/std"] == pytest.approx(std([1, 3, 2, 0.5, 0.5]))
    assert metrics["rewards/g/mean"] == 10.0
    assert metrics["rewards/g/std"] is None
    assert (metrics["rewards/f/failures"], metrics["rewards/g/failures"]) == (1, 0)


@pytest.mark.parametrize(
    "total, share",
    [
        ([1, 13, 2, 0.5, NAN, 0.5], 0.5),
        ([0.7] * 6, 1.0),
        ([NAN] * 6, 1.0),
        ([NAN, NAN, 1.0, -1.0, NAN, -1.0], 1.0),
        ([0.0, 0.0, 1e-9, -1.0, NAN, -2.0], 0.0),
    ],
)
def test_frac_reward_zero_std_is_the_share_of_groups_that_teach_nothing(total, share):
    assert values(make_round(total=torch.tensor(total, dtype=torch.float64)))["frac_reward_zero_std"] == share


def test_length_metrics_tell_ended_completions_from_those_cut_off():
    metrics = values(make_round())
    assert metrics["completions/mean_length"] == pytest.approx((2 + 3 + 0 + 4 + 1 + 4) / 6)
    assert metrics["completions/min_length"] == 0
    assert metrics["completions/max_length"] == 4
    assert metrics["completions/mean_terminated_length"] == pytest.approx((2 + 3 + 1) / 3)
    assert metrics["completions/min_terminated_length"] == 1
    assert metrics["completions/max_terminated_length"] == 3
    assert metrics["completions/clipped_ratio"] == pytest.approx(3 / 6)


def test_lengths_count_the_tokens_that_the_model_wrote():
    completions = [
        Completion([5], [7, 8, 1], [True, False, True]),
        Completion([5], [7, 8], [False, False], ended=False),
    ]
    table = RewardTable(["f"], torch.zeros(2, 1), torch.zeros(2), RewardLogs(), torch.zeros(2, 1, dtype=torch.bool))
    metrics = values(RewardedRollout(2, ["a"] * 2, completions, ["", ""], table))
    assert metrics["completions/mean_length"] == 1.0
    assert metrics["completions/mean_terminated_length"] == 2.0


def test_where_nothing_ended_there_is_no_terminated_length():
    completions = [Completion([5], [token], [True], ended=False) for token in (7, 8)]
    table = RewardTable(["f"], torch.zeros(2, 1), torch.zeros(2), RewardLogs(), torch.zeros(2, 1, dtype=torch.bool))
    metrics = values(RewardedRollout(2, ["a"] * 2, completions, ["", ""], table))
    assert metrics["completions/clipped_ratio"] == 1.0
    assert [metrics[f"completions/{kind}_terminated_length"] for kind in ("mean", "min", "max")] == [None] * 3


def test_metrics_of_two_rounds_add_up():
    log = MetricLog()
    log.add_all(make_round().metrics())
    log.add_all(make_round(total=torch.tensor([5.0] * 6, dtype=torch.float64)).metrics())
    reduced = log.reduce(lambda parts: parts)
    assert reduced["reward"] == pytest.approx((17 + 30) / 11)
    assert reduced["reward_std"] == pytest.approx(std([1, 13, 2, 0.5, 0.5] + [5] * 6))
    assert reduced["frac_reward_zero_std"] == 0.75


def test_notes_become_metrics_and_columns():
    notes = RewardLogs()
    notes.log_metric("accuracy", 0.25)
    notes.log_metric("accuracy", 0.5)
    notes.log_extra("parsed", list("uvwxyz"))
    sampled = make_round(notes)
    assert values(sampled)["accuracy"] == 0.375
    assert sampled.table()["parsed"] == list("uvwxyz")


def test_the_table_has_one_entry_per_completion():
    table = make_round().table()
    assert list(table) == ["prompt", "completion", "f", "g"]
    assert table["prompt"] == ["a"] * 3 + ["b"] * 3
    assert table["completion"] == ["t0", "t1", "t2", "t3", "t4", "t5"]
    assert [str(x) for x in table["f"]] == ["1.0", "3.0", "2.0", "0.5", "nan", "0.5"]
    assert [str(x) for x in table["g"]] == ["nan", "10.0", "nan", "nan", "nan", "nan"]


@pytest.mark.parametrize("count", [5, 12])
def test_log_extra_with_another_number_of_values_than_completions_is_refused(count):
    notes = RewardLogs()
    notes.log_extra("parsed", ["x"] * count)
    with pytest.raises(ValueError, match=rf"log_extra\('parsed', ...\) got {count} values for 6 completions"):
        make_round(notes).table()


def test_a_round_knows_its_groups_and_its_tokens():
    sampled = make_round()
    assert sampled.total_PG.shape == (2, 3)
    assert torch.equal(sampled.total_PG.flatten().nan_to_num(-1), TOTAL.nan_to_num(-1))
    assert sampled.num_tokens == 6 * 2 + (2 + 3 + 0 + 4 + 1 + 4)


# ---- The runner ----
class FakeEngine:
    """Writes the digit of the row; remembers what it was asked for."""

    computed_tokens = None

    def __init__(self, **columns):
        self.columns = columns

    def rollout(self, request):
        self.request = request
        rows = [ids for ids in request.prompt_ids for _ in range(request.num_generations)]
        completions = [Completion(ids, [5 + row, 1], [True, True]) for row, ids in enumerate(rows)]
        return Rollout(completions, self.columns, self.computed_tokens)


def run(tokenizer, prompts, reward, engine=None, num_generations=2, state=None, metrics=None):
    runner = RolloutRunner(engine or FakeEngine(), Rewards(reward), tokenizer)
    return runner.run(prompts, num_generations, 11, state, metrics or MetricLog())


def zeros(completions):
    return [0.0] * len(completions)


def test_rewards_see_every_column_repeated_in_the_order_of_the_completions(tokenizer):
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        return [float(text) for text in kwargs["completions"]]

    prompts = [
        Prompt({"prompt": "a=", "answer": "x", "completion": "hidden"}, [15, 42], 7),
        Prompt({"prompt": "b=", "answer": "y", "completion": "hidden"}, [16, 42], 9),
    ]
    state, engine = SimpleNamespace(global_step=3), FakeEngine(turns=[1, 2, 3, 4])
    sampled = run(tokenizer, prompts, reward, engine, state=state)
    assert (engine.request.prompts, engine.request.prompt_ids) == (["a=", "b="], [[15, 42], [16, 42]])
    assert (engine.request.num_generations, engine.request.seeds) == (2, [derive_seed(11, 7), derive_seed(11, 9)])
    assert seen["prompts"] == sampled.prompts == ["a=", "a=", "b=", "b="]
    assert seen["completions"] == sampled.texts == ["0", "1", "2", "3"]  # without the end token
    assert seen["completion_ids"] == [[5, 1], [6, 1], [7, 1], [8, 1]]
    assert seen["answer"] == ["x", "x", "y", "y"]
    assert seen["turns"] == [1, 2, 3, 4]
    assert seen["trainer_state"] == state
    assert set(seen) == {
        *("prompts", "completions", "completion_ids", "answer", "turns"),
        *("trainer_state", "log_extra", "log_metric"),
    }
    assert sampled.total_PG.tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_a_column_of_the_rollout_replaces_one_of_the_dataset(tokenizer):
    def reward(answer):
        return answer

    sampled = run(tokenizer, [Prompt({"prompt": "a", "answer": 0.0}, [15], 7)], reward, FakeEngine(answer=[3.0, 4.0]))
    assert sampled.rewards.total_B.tolist() == [3.0, 4.0]


def test_a_conversational_prompt_is_answered_by_a_message(tokenizer):
    messages = [{"role": "user", "content": "a"}]
    prompts = [Prompt({"prompt": messages}, [15], 7), Prompt({"prompt": "plain"}, [16], 7)]
    sampled = run(tokenizer, prompts, zeros, num_generations=1)
    assert sampled.prompts == [messages, "plain"]
    assert sampled.texts == [[{"role": "assistant", "content": "0"}], "1"]


def test_both_phases_are_timed_without_counting_a_step(tokenizer):
    metrics = MetricLog()
    run(tokenizer, [Prompt({"prompt": "a"}, [15], 7)], zeros, metrics=metrics)
    assert {name: metric.count for name, metric in metrics._metrics.items()} == {
        "time/sampling": 0.0,
        "time/rewards": 0.0,
        "sampling/tokens_per_second": pytest.approx(metrics._metrics["time/sampling"].total),
    }


@pytest.mark.parametrize("computed", [None, 20])
def test_the_share_of_useful_decoding_is_written_against_computed_tokens(tokenizer, computed):
    metrics, engine = MetricLog(), FakeEngine()
    engine.computed_tokens = computed
    run(tokenizer, [Prompt({"prompt": "a"}, [15], 7), Prompt({"prompt": "b"}, [16], 8)], zeros, engine, metrics=metrics)
    reduced = metrics.reduce(lambda parts: parts)
    assert reduced.get("sampling/useful_share") == (None if computed is None else 2 * 2 * 2 / 20)


def test_nothing_is_rewarded_where_a_rank_has_no_group(tokenizer):
    runner = RolloutRunner(FakeEngine(), Rewards([none_is_called, none_is_called]), tokenizer)
    sampled = SampledRollout(Rollout([]), 1.0, None)
    rewarded = runner.reward([], 4, sampled, 11, None, MetricLog())
    assert rewarded.total_PG.shape == (0, 4)
    assert rewarded.has_signal_P.tolist() == []
    assert rewarded.table() == {"prompt": [], "completion": [], "none_is_called": [], "none_is_called_2": []}


def none_is_called(completions):
    raise AssertionError


@pytest.mark.parametrize("name", ["prompt", "completion", "f", "advantage", "step"])
def test_log_extra_does_not_take_the_name_of_another_column(name):
    notes = RewardLogs()
    notes.log_extra(name, list("uvwxyz"))
    with pytest.raises(ValueError, match=rf"log_extra\('{name}', ...\) names a column that the table has"):
        make_round(notes).table()
