"""Scripts that were written for TRL's trainer find its arguments, attributes and methods."""

import inspect
import math
import re

import pandas as pd
import pytest
import torch
import trl
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

import grpo_trl
from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.trainer.arguments import config_of
from tests.helpers.models import make_model, make_tokenizer
from tests.helpers.training import ROWS, length, make_trainer


def refusal(folder, kinds=(TypeError, ValueError), **options) -> str:
    with pytest.raises(kinds) as raised:
        make_trainer(folder, **options)
    return str(raised.value)


# ---- Arguments ----
def test_the_arguments_are_trls_in_trls_order():
    theirs = list(inspect.signature(trl.GRPOTrainer.__init__).parameters)
    ours = list(inspect.signature(GRPOTrainer.__init__).parameters)
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize(
    "name, hint", [("tokenizer", "processing_class"), ("reward_func", "reward_funcs"), ("xyz", "it takes model, ")]
)
def test_an_argument_that_does_not_exist_is_refused_with_the_nearest(name, hint):
    with pytest.raises(TypeError, match=rf"{name} is no argument of GRPOTrainer; (use )?{hint}"):
        GRPOTrainer(make_model(), length, **{name: None})


@pytest.mark.parametrize("name", ["tools", "environment_factory"])
def test_what_is_not_available_says_what_to_do(tmp_path, name):
    assert f"{name} is not available; call tools" in refusal(tmp_path, **{name: [length]})


@pytest.mark.parametrize("kind", [trl.GRPOConfig, TrainingArguments])
def test_options_of_another_class_are_refused(tmp_path, kind):
    args = kind(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False)
    assert "pass a grpo_trl.GRPOConfig" in refusal(tmp_path, TypeError, args=args)


@pytest.mark.parametrize(
    "name, value", [("model", type(make_model())), ("peft_config", LoraConfig), ("args", GRPOConfig)]
)
def test_a_class_instead_of_an_instance_is_refused(tmp_path, name, value):
    assert f"{name} is the class {value.__name__}; pass an instance" in refusal(tmp_path, TypeError, **{name: value})


def test_a_path_may_be_an_object(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path, model=tmp_path / "model")
    assert type(trainer.model) is type(make_model())


def test_a_column_that_rewards_cannot_see_is_named(tmp_path, caplog):
    make_trainer(tmp_path, data=Dataset.from_list([{"prompt": "1=", "completions": "1"}] * 2))
    assert "train_dataset has the column 'completions', which reward functions do not see" in caplog.text


def test_a_rollout_func_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"rollout_func is LoraConfig.*; pass a function"):
        GRPOTrainer(make_model(), length, rollout_func=LoraConfig())


def test_without_reward_functions_one_is_asked_for(tmp_path):
    assert "reward_funcs is empty; pass at least one" in refusal(tmp_path, reward_funcs=None)


@pytest.mark.parametrize("path, folder", [("Qwen/Small-1B", "Small-1B-GRPO"), ("./models/mine/", "mine-GRPO")])
def test_the_folder_is_named_after_the_model_by_default(path, folder):
    assert config_of(None, path).output_dir == folder
    model = make_model()
    model.config._name_or_path = path
    assert config_of(None, model).output_dir == folder
    assert config_of(None, make_model()).output_dir == "Qwen2ForCausalLM-GRPO"


def test_a_quantization_config_that_is_given_twice_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    args = GRPOConfig(str(tmp_path), use_cpu=True, report_to="none", model_init_kwargs={"quantization_config": {}})
    with pytest.raises(ValueError, match="pass the argument alone"):
        GRPOTrainer(str(tmp_path), length, args, quantization_config={"load_in_4bit": True})


# ---- Datasets ----
def test_a_list_of_dicts_is_a_dataset(tmp_path):
    plain, lists = (
        make_trainer(tmp_path, data=data, eval_dataset={"a": data}) for data in (Dataset.from_list(ROWS), ROWS)
    )
    for trainer in (plain, lists):
        trainer.train()
    assert plain.state.log_history[0]["reward"] == lists.state.log_history[0]["reward"]
    assert plain.evaluate()["eval_a_reward"] == lists.evaluate()["eval_a_reward"]


@pytest.mark.parametrize(
    "data, message",
    [
        (DatasetDict({"train": Dataset.from_list(ROWS)}), r"train_dataset is a DatasetDict; .*\['train'\]"),
        (pd.DataFrame(ROWS), r"train_dataset is a DataFrame; pass datasets\.Dataset\.from_pandas"),
        ("openai/gsm8k", r"train_dataset='openai/gsm8k' is a name; pass datasets\.load_dataset\('openai/gsm8k'"),
        (["ab="], r"train_dataset\[0\] is a str; a row is a dict"),
        ([], "train_dataset is an empty list"),
    ],
)
def test_other_kinds_of_data_are_refused_with_what_to_pass(tmp_path, data, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_trainer(tmp_path, data=data)


def test_a_prompt_with_a_token_beyond_the_embedding_is_named(tmp_path):
    message = refusal(tmp_path, model=make_model(vocab_size=40))
    assert "train_dataset[0]['prompt'] has token 42, and the model has embeddings for 40 tokens" in message
    assert "resize_token_embeddings(43)" in message


# ---- Attributes and the model card ----
def test_scripts_find_the_attributes_of_trls_trainer(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.1, reward_funcs=[length, length], reward_weights=[1.0, 0.5], epsilon=0.1)
    assert trainer.reward_funcs == [length, length]
    assert trainer.reward_func_names == ["length", "length_2"]
    assert trainer.reward_weights.tolist() == [1.0, 0.5]
    assert trainer.reward_processing_classes == [None, None]
    assert isinstance(trainer.ref_model, type(trainer.model))
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    assert (trainer.num_generations, trainer.num_generations_eval, trainer.max_completion_length) == (2, 2, 4)
    assert (trainer.beta, trainer.epsilon_low, trainer.epsilon_high, trainer.temperature) == (0.1, 0.1, 0.1, 1.0)
    assert make_trainer(tmp_path).ref_model is None


ABSENT = {
    *("async_loop_ready_event", "aux_loss_enabled", "chat_template", "commit_scheduler", "continuous_batching_config"),
    *("environment_factories", "environments", "generation_config", "log_multimodal", "max_tool_calling_iterations"),
    *("pad_to_multiple_of", "router_aux_loss_coef", "tools", "use_transformers_continuous_batching", "vllm_generation"),
    "rollout_func",
}
"""Attributes of what is not here, or is made in another way."""


def test_each_attribute_of_trls_trainer_is_one_here_or_has_no_meaning(tmp_path):
    source = inspect.getsource(trl.GRPOTrainer.__init__)
    theirs = set(re.findall(r"self\.([a-z]\w*)(?:: [^=\n]+)? =", source))
    trainer = make_trainer(tmp_path, entropy_coef=0.1)
    assert {name for name in theirs if not hasattr(trainer, name)} == ABSENT
    assert (trainer.entropy_coef, trainer.eos_token_ids, trainer.use_vllm) == (0.1, [1], False)


def test_the_model_card_names_model_dataset_tags_and_objective(tmp_path):
    trainer = make_trainer(tmp_path, loss_level="sequence")
    for arguments in (
        (("small", "openai/gsm8k", ["mine"]), {}),
        ((), {"dataset_name": "openai/gsm8k", "tags": "mine"}),
    ):
        trainer.create_model_card(*arguments[0], **arguments[1])
        card = (tmp_path / "README.md").read_text()
        assert "datasets:\n- openai/gsm8k" in card
        assert "- mine" in card
        assert "language:" not in card
        assert 'loss_level="sequence"' in card
        assert "arxiv.org/abs/2412.19437" in card
        (tmp_path / "README.md").unlink()


def test_what_is_pushed_has_the_card_that_was_asked_for(tmp_path, monkeypatch):
    uploads = []

    class Hub:
        def upload_folder(self, **arguments):
            uploads.append(arguments)

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = make_trainer(tmp_path)
    trainer.hub_model_id = "me/small"
    trainer.push_to_hub(dataset_name="openai/gsm8k", tags=["mine"])
    assert uploads[0]["repo_id"] == "me/small"
    assert "openai/gsm8k" in (tmp_path / "README.md").read_text()


def test_scripts_import_trls_own_names_from_here():
    for name in ("ModelConfig", "ScriptArguments", "get_dataset", "get_peft_config", "get_quantization_config"):
        assert getattr(grpo_trl, name) is getattr(trl, name)
    assert not hasattr(grpo_trl, "DPOTrainer")


# ---- Evaluation and its metric ----
SETS = {"easy": ROWS[:2], "hard": ROWS[2:]}


def test_the_reward_of_several_sets_is_their_mean_and_callbacks_hear_it_once(tmp_path):
    heard = []

    class Listening(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            heard.append(metrics)

    trainer = make_trainer(tmp_path, eval_dataset=SETS, callbacks=[Listening()])
    metrics = trainer.evaluate()
    assert heard == [metrics]
    assert metrics["eval_reward"] == (metrics["eval_easy_reward"] + metrics["eval_hard_reward"]) / 2
    assert {"eval_reward": metrics["eval_reward"]}.items() <= trainer.state.log_history[-1].items()
    only = make_trainer(tmp_path, eval_dataset={"easy": ROWS}).evaluate()
    assert only["eval_reward"] == only["eval_easy_reward"]


def test_a_set_that_does_not_exist_is_answered_with_those_that_do(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=SETS)
    assert "eval_reward" in trainer.evaluate("easy")
    with pytest.raises(ValueError, match="eval_dataset='b' is no dataset of the trainer's; it has 'easy', 'hard'"):
        trainer.evaluate("b")


def test_compute_metrics_gets_completions_and_rewards_in_the_order_of_the_dataset(tmp_path):
    seen = []

    def metrics(evaluated):
        seen.append(evaluated)
        return {"longest": max(map(len, evaluated.completions))}

    trainer = make_trainer(tmp_path, eval_dataset=ROWS, compute_metrics=metrics, reward_funcs=[length, length])
    result = trainer.evaluate()
    (evaluated,) = seen
    assert evaluated.prompts == [row["prompt"] for row in ROWS for _ in range(2)]
    assert evaluated.rewards_per_func == {
        name: list(map(len, evaluated.completions)) for name in ("length", "length_2")
    }
    assert evaluated.rewards == [2 * len(text) for text in evaluated.completions]
    assert result["eval_longest"] == max(map(len, evaluated.completions))


@pytest.mark.parametrize(
    "metrics, error, message",
    [
        ({"share": "high"}, TypeError, "compute_metrics returned 'high' for 'share'; it must be a number"),
        ({"share": {"high": 1.0}}, TypeError, "for 'share'; it must be a number"),
        ({"reward": 1.0}, ValueError, "compute_metrics returned 'reward', which the evaluation has itself"),
    ],
)
def test_compute_metrics_returns_numbers_that_the_evaluation_does_not_have(metrics, error, message, tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=ROWS, compute_metrics=lambda evaluated: metrics)
    with pytest.raises(error, match=message):
        trainer.evaluate()


def test_compute_metrics_returns_a_dict(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=ROWS, compute_metrics=lambda evaluated: 3.0)
    with pytest.raises(TypeError, match="compute_metrics returned a float; it must return a dict"):
        trainer.evaluate()


def test_predict_says_what_to_use(tmp_path):
    with pytest.raises(ValueError, match=r"use evaluate\(dataset\)"):
        make_trainer(tmp_path).predict(ROWS)


class Rising:
    """A reward that is better at each evaluation, or worse."""

    __name__ = "rising"

    def __init__(self, slope=1.0):
        self.slope = slope

    def __call__(self, completions, trainer_state):
        return [self.slope * trainer_state.global_step + 0.01 * i for i in range(len(completions))]


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}


@pytest.mark.parametrize("eval_dataset", [ROWS, SETS], ids=["one set", "several sets"])
@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_a_plateau_lowers_the_rate_only_where_the_reward_does_not_rise(tmp_path, eval_dataset, slope):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}}
    trainer = make_trainer(tmp_path, eval_dataset=eval_dataset, reward_funcs=Rising(slope), **EVALUATED, **plateau)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert (rates[-1] < rates[0]) == (slope < 0)


@pytest.mark.parametrize("eval_dataset", [ROWS, SETS], ids=["one set", "several sets"])
def test_early_stopping_follows_the_reward_without_further_options(tmp_path, eval_dataset):
    for slope, steps in ((1.0, 4), (-1.0, 2)):
        stopping = [EarlyStoppingCallback(1)]
        options = {"eval_dataset": eval_dataset, "callbacks": stopping, "reward_funcs": Rising(slope)}
        trainer = make_trainer(tmp_path, **EVALUATED, **options)
        trainer.train()
        assert trainer.state.global_step == steps


def test_early_stopping_may_be_passed_as_a_class(tmp_path):
    options = {"eval_dataset": ROWS, "callbacks": [EarlyStoppingCallback], "reward_funcs": Rising(-1.0)}
    trainer = make_trainer(tmp_path, **EVALUATED, **options)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_best_checkpoint_is_that_with_the_highest_mean_reward(tmp_path):
    options = {"eval_dataset": SETS, "save_strategy": "best", "reward_funcs": Rising(-1.0)}
    trainer = make_trainer(tmp_path, **EVALUATED, **options)
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert math.isclose(trainer.state.best_metric, -1.0, abs_tol=0.1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_loss_is_no_metric_of_an_evaluation(tmp_path):
    options = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_dataset": ROWS}
    assert "use 'eval_reward'" in refusal(tmp_path, metric_for_best_model="eval_loss", **EVALUATED, **options)


def adds(completions, log_metric):
    log_metric("accuracy", 1.0)
    return length(completions)


@pytest.mark.parametrize("eval_dataset", [ROWS, SETS], ids=["one set", "several sets"])
def test_every_metric_of_an_evaluation_may_choose_the_best_model(eval_dataset, tmp_path, caplog):
    trainer = make_trainer(tmp_path, eval_dataset=eval_dataset)
    for name in trainer.evaluate().keys() - {"epoch"}:
        make_trainer(tmp_path, eval_dataset=eval_dataset, metric_for_best_model=name, **EVALUATED)
    assert "metric_for_best_model" not in "".join(line for line in caplog.messages if "is the mean of" not in line)


@pytest.mark.parametrize(
    "metric, options, nearest",
    [
        ("accuracy", {}, "'eval_"),
        ("accuracy", {"reward_funcs": adds}, None),
        ("accuracy", {"compute_metrics": lambda evaluated: {"accuracy": 1.0}}, None),
        ("eval_rewards", {"reward_funcs": adds}, "'eval_reward'"),
        ("reward/length/mean", {}, "'eval_rewards/length/mean'"),
        ("hard_reward", {}, "'eval_reward'"),
        ("hard_reward", {"eval_strategy": "no"}, None),
    ],
)
def test_a_metric_that_no_evaluation_computes_is_warned_of_at_construction(metric, options, nearest, tmp_path, caplog):
    sets = {"easy": ROWS} if "hard" in metric else ROWS
    make_trainer(tmp_path, eval_dataset=sets, metric_for_best_model=metric, **(EVALUATED | options))
    lines = [line for line in caplog.messages if "is no metric of an evaluation" in line]
    assert len(lines) == (nearest is not None)
    assert nearest is None or f"the nearest is {nearest}" in lines[0]


def test_what_the_reward_of_several_sets_is_stands_in_the_log(tmp_path, caplog):
    make_trainer(tmp_path, eval_dataset=SETS, save_strategy="best", **EVALUATED)
    assert "'eval_reward' is the mean of eval_easy_reward, eval_hard_reward" in caplog.text


def test_a_missing_pad_token_trains(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    trainer = make_trainer(tmp_path, tokenizer=tokenizer)
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))


def test_the_masks_of_trls_trainer_are_those_of_the_objective(tmp_path):
    trainer = make_trainer(tmp_path)
    entropies = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.8, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert trainer.get_high_entropy_mask(entropies, mask, 0.8).tolist() == [[False] * 4, [True, True, False, False]]
    assert trainer.get_high_entropy_mask(entropies, mask, 0.0).tolist() == mask.bool().tolist()
    logps = torch.tensor([[-2.0, -2.0], [-0.5, 50.0], [-2.0, -2.0]])
    advantages, mask = torch.tensor([[1.0], [-1.0], [-1.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    kept = trainer.get_off_policy_mask(advantages, logps, torch.zeros_like(logps), mask, 1.0)
    assert kept.tolist() == [[1.0], [1.0], [0.0]]


@pytest.mark.parametrize("ratios", [None, torch.tensor([[1.5, 0.5], [2.0, 1.0]])], ids=["old policy", "sampler"])
def test_the_weights_of_vespo_are_those_of_trls_trainer(ratios):
    arguments = (torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.3, -0.2], [0.4, 9.0]]), torch.tensor([[1, 1], [1, 0]]))
    theirs = trl.GRPOTrainer.get_gamma_weights(*arguments, ratios, 2.0, 3.0, 3.0, 2.0)
    torch.testing.assert_close(GRPOTrainer.get_gamma_weights(*arguments, ratios), theirs)


def test_the_end_of_a_run_logs_the_steps_since_the_last_log(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, logging_steps=2)
    trainer.train()
    _, end = trainer.state.log_history
    assert end.keys() >= {"train_loss", "reward", "rewards/length/mean", "num_tokens"}
    assert "loss" not in end
    trainer = make_trainer(tmp_path, max_steps=2, logging_steps=2)
    trainer.train()
    assert "reward" not in trainer.state.log_history[-1]
