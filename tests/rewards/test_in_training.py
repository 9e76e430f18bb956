"""What reward functions do, and do not do, to a run."""

import math
import os

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.errors import RunStopped
from tests.helpers.models import make_model, make_tokenizer
from tests.helpers.training import weights
from tests.helpers.worker_rewards import described, seen


ROWS = [{"prompt": [{"role": "user", "content": f"{i}="}], "meta": {"answer": i, "tests": ["a"]}} for i in range(4)]


def make_trainer(
    tmp_path, reward_funcs, eval_dataset=None, rows=ROWS, data=None, rollout_func=None, **options
) -> GRPOTrainer:
    defaults = {
        "output_dir": str(tmp_path),
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return GRPOTrainer(
        make_model(),
        reward_funcs,
        GRPOConfig(**(defaults | options)),
        data or Dataset.from_list(rows),
        eval_dataset,
        processing_class=make_tokenizer(),
        rollout_func=rollout_func,
    )


def letters(completions, **kwargs):
    return [float(sum(map(ord, completion[0]["content"])) % 7) for completion in completions]


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def vandal(completions, prompts, completion_ids, meta, trainer_state, **kwargs):
    rewards = letters(completions)
    for completion, prompt, ids, row in zip(completions, prompts, completion_ids, meta, strict=True):
        prompt.append(completion[0] | {"content": "vandal"})
        completion[0]["content"] = ""
        ids.sort()
        assert row.pop("answer") >= 0
        row["tests"].clear()
    trainer_state.global_step = trainer_state.max_steps = 100
    trainer_state.log_history.clear()
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    np.random.seed(0)
    os.chdir("/")
    return rewards


vandal.__name__ = letters.__name__


def test_a_function_that_changes_everything_changes_nothing_of_the_run(tmp_path):
    plain, changed = (make_trainer(tmp_path, function) for function in (letters, vandal))
    for trainer in (plain, changed):
        trainer.train()
    assert changed.state.global_step == 2
    assert same(weights(plain.model), weights(changed.model))
    assert not same(weights(plain.model), weights(make_model()))
    assert [h["reward"] for h in plain.state.log_history if "reward" in h] == [
        h["reward"] for h in changed.state.log_history if "reward" in h
    ]
    for table in (plain._generation_batch.table, changed._generation_batch.table):
        assert all(len(prompt) == 1 for prompt in table["prompt"])
    assert plain._generation_batch.table["completion"] == changed._generation_batch.table["completion"]


def test_columns_are_checked_for_training_and_for_every_evaluation_set(tmp_path):
    def judged(completions, meta):
        return letters(completions)

    without = Dataset.from_list([{"prompt": ROWS[0]["prompt"]}])
    with pytest.raises(ValueError, match="'judged' takes meta, which neither train_dataset nor"):
        make_trainer(tmp_path, judged, rows=[{"prompt": ROWS[0]["prompt"]}] * 4)
    with pytest.raises(ValueError, match=r"'judged' takes meta, which neither eval_dataset\['hard'\] nor"):
        make_trainer(tmp_path, judged, {"easy": Dataset.from_list(ROWS), "hard": without})
    with pytest.raises(ValueError, match="'judged' takes meta, which neither eval_dataset nor"):
        make_trainer(tmp_path, judged).evaluate(without)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("streams", [False, True])
def test_a_function_gets_columns_of_every_kind_as_they_are_in_the_dataset(tmp_path, caplog, streams, workers):
    """Nested ones, missing values, long texts, and images, which a model of text does not see."""
    rows = [
        {
            "prompt": f"{i}=",
            "meta": {"tests": [{"input": str(i), "output": None}], "source": None if i % 2 else "book"},
            "hint": None,
            "text": "x" * 100_000 * (i + 1),
            "image": Image.new("RGB", (2, 3), (10 * i, 0, 0)),
        }
        for i in range(4)
    ]
    data = Dataset.from_list(rows)
    trainer = make_trainer(tmp_path, seen, data=data.to_iterable_dataset() if streams else data, reward_workers=workers)
    trainer.train()
    table = trainer._generation_batch.table
    assert sorted(set(table["columns"])) <= sorted(described(**row) for row in rows)
    assert len(set(table["columns"])) == 2
    assert "train_dataset has the column 'image', which only reward functions see" in caplog.text


def test_images_are_the_business_of_a_rollout_func(tmp_path, caplog):
    def sees_all(prompts, trainer):
        return {"prompt_ids": [[3]] * len(prompts), "completion_ids": [[4]] * len(prompts), "logprobs": None}

    data = Dataset.from_list([{"prompt": "a", "images": [Image.new("RGB", (2, 2))]}] * 4)
    trainer = make_trainer(tmp_path, lambda completions, images: [1.0] * len(images), data=data, rollout_func=sees_all)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "has the column" not in caplog.text


def test_an_evaluation_without_rewards_is_no_improvement(tmp_path, caplog):
    def known(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1 and len(completions) <= 4:  # the first evaluation: one group
            raise OSError("the judge is out")
        return letters(completions)

    trainer = make_trainer(
        tmp_path,
        known,
        Dataset.from_list(ROWS[:1]),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    rewards = [h["eval_reward"] for h in trainer.state.log_history if "eval_reward" in h]
    assert [math.isnan(reward) for reward in rewards] == [True, False]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert "No completion of the evaluation on eval_dataset has a reward" in caplog.text


def test_a_function_without_weight_that_always_fails_stops_nothing(tmp_path):
    def broken(completions, **kwargs):
        raise OSError("no judge")

    trainer = make_trainer(tmp_path, [letters, broken], reward_weights=[1.0, 0.0], on_reward_error="raise")
    trainer.train()
    assert [h["rewards/broken/failures"] for h in trainer.state.log_history if "rewards/broken/failures" in h] == [8, 8]
    with pytest.raises(RunStopped, match="'broken' failed on 8 of the 8"):
        make_trainer(tmp_path, [letters, broken]).train()


def test_the_largest_rewards_still_teach(tmp_path):
    def huge(completions, **kwargs):
        return [1.7e308 * (-1) ** i for i in range(len(completions))]

    trainer = make_trainer(tmp_path, huge, max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    assert all(math.isfinite(h["loss"]) for h in trainer.state.log_history if "loss" in h)
    assert not same(before, weights(trainer.model))
    assert set(map(round, trainer._generation_batch.table["advantage"])) == {-1, 1}
