"""What a user of `transformers.Trainer` expects of the trainer."""

import copy
import re
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from grpo_trl import GRPOConfig, GRPOTrainer
from tests.helpers.models import make_model, make_tokenizer
from tests.helpers.training import completions_of, injected, train, weights


PROMPTS = ["ab=", "f", "a", "cde12="]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def share_of_a(completions):
    return [text.count("a") / max(len(text), 1) for text in completions]


def share_of_early_letters(completions):
    """A reward that differs from the start."""
    return [sum(letter < "n" for letter in text) / max(len(text), 1) for text in completions]


def sample(model, prompts=PROMPTS, reward_funcs=share_of_early_letters, **options):
    """Train on completions that the trainer samples itself."""
    return train(model, prompts, reward_funcs=reward_funcs, rollout_func=None, **options)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---- Learning, sampling, determinism ----


@pytest.mark.parametrize("level, rate", [("token", 0.02), ("sequence", 0.01)])
def test_it_learns_from_its_own_completions(level, rate):
    options = {"per_device_train_batch_size": 32, "num_generations": 8, "max_steps": 25, "optim": "adamw_torch"}
    model = make_model(initializer_range=0.1)
    trainer = sample(model, reward_funcs=share_of_a, learning_rate=rate, loss_level=level, **options)
    rewards = logged(trainer, "reward")
    assert rewards[0] < 0.1
    assert sum(rewards[-3:]) / 3 > 0.5


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    runs = [sample(make_model(), max_steps=3, seed=seed) for seed in (1, 1, 2)]
    assert same(weights(runs[0].model), weights(runs[1].model))
    assert not same(weights(runs[0].model), weights(runs[2].model))


def test_train_can_be_called_twice():
    trainer = sample(make_model(), max_steps=2)
    trainer.train()
    assert len(logged(trainer, "reward")) == 2


def test_conversational_prompts_are_rendered_and_rewarded_as_messages():
    seen = {}

    def reward(prompts, completions, completion_ids):
        seen.update(prompts=prompts, completions=completions)
        return [float(len(ids)) for ids in completion_ids]

    prompts = [[{"role": "user", "content": text}] for text in ("ab", "c")]
    trainer = train(make_model(), prompts, reward_funcs=reward, rollout_func=None, per_device_train_batch_size=8)
    assert seen["prompts"][:4] == [prompts[0]] * 4
    assert [list(message) for message in seen["completions"]] == [[message[0]] for message in seen["completions"]]
    assert seen["completions"][0][0]["role"] == "assistant"
    generation_batch = trainer._generation_batch
    assert generation_batch.mini_batches[0][0].prompt_ids == make_tokenizer()("<user>ab<assistant>")["input_ids"]


def test_bf16_moves_the_weights_as_float32_does():
    model = make_model()
    before = weights(model)
    plain, mixed = (
        weights(train(copy.deepcopy(model), PROMPTS, per_device_train_batch_size=16, bf16=bf16, num_iterations=2).model)
        for bf16 in (False, True)
    )
    moves = [torch.cat([(after[n] - before[n]).flatten() for n in before]) for after in (plain, mixed)]
    assert torch.cosine_similarity(*moves, dim=0) > 0.98


def test_disable_dropout_reaches_modules_and_attention():
    model = make_model(attention_dropout=0.5)
    model.model.layers[0].mlp.dropout = torch.nn.Dropout(0.5)
    trainer = train(model, PROMPTS, disable_dropout=True)
    assert trainer.model.model.layers[0].mlp.dropout.p == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits)


def test_options_reach_the_rooms_that_they_are_for():
    seen = []

    def count(completions):
        seen.append(len(completions))
        return [1.0] * len(completions)

    prompts = [[{"role": "user", "content": text}] for text in ("ab", "c", "d", "ef")]
    options = {"reward_funcs": [count, count], "reward_weights": [2.0, 0.5], "rollout_func": None}
    template = {"chat_template_kwargs": {"chat_template": "{{ messages[0]['content'] }}="}}
    trainer = train(make_model(), prompts, **options, **template)
    assert logged(trainer, "reward") == [2.5]
    assert completions_of(trainer)[0].prompt_ids == make_tokenizer()("ab=")["input_ids"]


def test_the_order_of_prompts_follows_from_data_seed():
    def rows(**seeds):
        order = sample(make_model(), shuffle_dataset=True, **seeds)._order
        return [prompt.row for prompt in order.prompts(0, range(order.prompts_per_generation_batch))]

    orders = [rows(data_seed=seed) for seed in range(6)]
    assert orders[0] == rows(data_seed=0, seed=9)
    assert len(set(map(tuple, orders))) > 1


def test_an_environments_tokens_are_not_trained_on():
    def masked(prompts, trainer):
        """The model's second token and all from the fourth on come from an environment."""
        output = injected(prompts, trainer)
        masks = [[int(t not in (1, 3, 4, 5, 6)) for t in range(len(ids))] for ids in output["completion_ids"]]
        return output | {"env_mask": masks}

    trainer = train(make_model(), PROMPTS, rollout_func=masked)
    kept = [sum(c.mask) for c in completions_of(trainer)]
    assert logged(trainer, "completions/mean_length") == [sum(kept) / len(kept)]
    assert max(kept) == 2
    assert not same(weights(make_model()), weights(trainer.model))


def test_ending_an_epoch_early_does_not_train_on_a_generation_batch_twice():
    class Impatient(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    generation_batches = []

    def reward(prompts):
        generation_batches.append(prompts[0])
        return [1.0] * len(prompts)

    options = {"max_steps": -1, "num_train_epochs": 3, "rollout_func": None}
    train(make_model(), PROMPTS, reward_funcs=reward, callbacks=[Impatient()], **options)
    assert generation_batches == PROMPTS[:3]


# ---- What the log says ----


def test_the_log_has_trls_metrics_and_the_time_of_each_phase():
    trainer = sample(make_model(), beta=0.1, max_steps=1)
    names = set(trainer.state.log_history[0])
    assert names >= {
        "loss", "grad_norm", "learning_rate", "num_tokens", "step_time", "kl", "entropy", "policy_signal",
        "reward", "reward_std", "frac_reward_zero_std", "rewards/share_of_early_letters/mean",
        "rewards/share_of_early_letters/std",
        "completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio",
        "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
        "clip_ratio/region_mean", "time/sampling", "time/rewards", "time/logprobs", "time/update",
    }  # fmt: skip


def test_the_phases_add_up_to_the_step():
    entry = sample(make_model(), beta=0.1, max_steps=1, logging_steps=1).state.log_history[0]
    phases = [entry[f"time/{phase}"] for phase in ("sampling", "rewards", "logprobs", "update")]
    assert all(seconds > 0 for seconds in phases)
    assert sum(phases) <= entry["step_time"]


def test_tokens_are_counted_with_their_prompt():
    trainer = train(make_model(), PROMPTS, max_steps=2)
    expected = sum(len(c.prompt_ids) + len(c.ids) for c in completions_of(trainer))
    assert logged(trainer, "num_tokens")[1] - logged(trainer, "num_tokens")[0] == expected


def test_the_samplers_log_probabilities_are_compared_with_the_trainers():
    def with_logprobs(prompts, trainer):
        output = injected(prompts, trainer)
        return output | {"logprobs": [[-100.0] * len(ids) for ids in output["completion_ids"]]}

    entry = train(make_model(), PROMPTS, rollout_func=with_logprobs).state.log_history[0]
    assert 80 < entry["sampling/sampling_logp_difference/mean"] <= entry["sampling/sampling_logp_difference/max"] <= 100


def test_completions_are_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def reward(completions, log_extra, log_metric):
        log_extra("note", [f"note {i}" for i in range(len(completions))])
        log_metric("notes", len(completions))
        return [float(i) for i in range(len(completions))]

    options = {"per_device_train_batch_size": 8, "max_steps": 2, "output_dir": str(tmp_path), "log_completions": True}
    trainer = train(make_model(), PROMPTS, reward_funcs=reward, rollout_func=None, **options)
    assert "note 7" in capsys.readouterr().out
    assert logged(trainer, "notes") == [8, 8]
    table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert list(table) == ["step", "group", "prompt", "completion", "reward", "note", "advantage"]
    assert table["reward"].tolist() == list(range(8))
    assert table["prompt"].tolist() == ["a"] * 4 + ["cde12="] * 4


def test_unique_prompts_are_printed_once(tmp_path, capsys):
    options = {"per_device_train_batch_size": 8, "output_dir": str(tmp_path), "log_completions": True}
    train(make_model(), ["first", "second"], log_unique_prompts=True, **options)
    assert len(re.findall("first", capsys.readouterr().out)) == 1


# ---- Evaluation ----


EVAL = Dataset.from_dict({"prompt": ["x", "yz", "12="], "answer": ["1", "2", "3"]})


class Evaluating(TrainerCallback):
    """Evaluates in the middle of training."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = True


def make_trainer(model, callbacks=None, reward_funcs=share_of_early_letters, **options):
    args = GRPOConfig(
        **{
            "optim": "sgd",
            "learning_rate": 0.1,
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_completion_length": 8,
            "max_steps": 3,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "output_dir": str(Path(tempfile.gettempdir()) / "grpo_trl-tests"),
            "use_cpu": True,
            "disable_tqdm": True,
        }
        | options
    )
    data = Dataset.from_dict({"prompt": PROMPTS})
    return GRPOTrainer(model, reward_funcs, args, data, EVAL, make_tokenizer(), callbacks=callbacks)


def test_evaluation_changes_nothing_of_training():
    plain = make_trainer(make_model(attention_dropout=0.2))
    plain.train()
    evaluated = make_trainer(make_model(attention_dropout=0.2), callbacks=[Evaluating()], per_device_eval_batch_size=3)
    evaluated.evaluate()
    evaluated.train()
    assert same(weights(plain.model), weights(evaluated.model))
    timed = ("time", "runtime", "per_second", "train_")
    logs = [
        [{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in trainer.state.log_history]
        for trainer in (plain, evaluated)
    ]
    assert [e for e in logs[0] if "loss" in e] == [e for e in logs[1] if "loss" in e]
    assert len([e for e in logs[1] if "eval_reward" in e]) == 3


def test_a_rollout_func_evaluates_in_evaluation_mode():
    modes = []

    def watch(prompts, trainer):
        modes.append(trainer.model.training)
        return injected(prompts, trainer)

    trainer = train(make_model(), PROMPTS, rollout_func=watch)
    trainer.model.train()
    trainer.evaluate(EVAL)
    assert modes[-1] is False
    assert trainer.model.training


def test_the_batches_of_an_evaluation_change_nothing_in_it(monkeypatch):
    written = []
    for batch_size in (1, 2, 64):
        trainer = make_trainer(make_model().double(), num_generations_eval=2, per_device_eval_batch_size=batch_size)
        rollout = trainer._runner.engine.rollout
        rollouts = []
        monkeypatch.setattr(
            trainer._runner.engine, "rollout", lambda r, to=rollouts, do=rollout: to.append(do(r)) or to[-1]
        )
        trainer.evaluate()
        written.append([c.ids for r in rollouts for c in r.completions])
    assert written[0] == written[1] == written[2]
    assert len({tuple(ids) for ids in written[0]}) > 3


def test_evaluation_has_its_own_number_of_completions_and_repeats(monkeypatch):
    trainer = make_trainer(make_model(), num_generations_eval=1, per_device_eval_batch_size=2)
    requests = []
    rollout = trainer._runner.engine.rollout
    monkeypatch.setattr(trainer._runner.engine, "rollout", lambda request: requests.append(request) or rollout(request))
    first, second = trainer.evaluate(), trainer.evaluate()
    assert [prompt for request in requests[:1] for prompt in request.prompts] == ["x", "yz", "12="]
    assert {request.num_generations for request in requests} == {1}
    assert first["eval_reward"] == second["eval_reward"]


def test_several_evaluation_sets_get_a_prefix_each():
    trainer = make_trainer(make_model())
    metrics = trainer.evaluate({"easy": EVAL, "hard": EVAL.select([0])}, metric_key_prefix="test")
    assert {"test_easy_reward", "test_hard_reward"} <= set(metrics)


def test_the_best_model_by_eval_reward_is_loaded_at_the_end(tmp_path):
    def peak(completions, trainer_state):
        return [-abs(trainer_state.global_step - 2.0)] * len(completions)

    trainer = make_trainer(
        make_model(),
        reward_funcs=[share_of_early_letters, peak],
        reward_weights=[1.0, 100.0],
        output_dir=str(tmp_path),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert same(weights(trainer.model), weights(best))


# ---- Saving and resuming ----


@pytest.mark.parametrize(
    "options", [{}, {"num_iterations": 2, "beta": 0.1}, {"steps_per_generation": 2, "per_device_train_batch_size": 4}]
)
def test_a_run_resumed_between_generation_batches_is_the_uninterrupted_run(tmp_path, options):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "optim": "adamw_torch"} | options
    whole = make_trainer(make_model(), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer(make_model(), output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(whole.model), weights(resumed.model))
    assert logged(whole, "reward") == logged(resumed, "reward")


def test_a_run_resumed_inside_a_generation_batch_goes_on_with_its_prompts(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "num_iterations": 2, "beta": 0.0}
    make_trainer(make_model(), output_dir=str(tmp_path / "whole"), **options).train()
    resumed = make_trainer(make_model(), output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 4
    assert resumed._generation_batch.index == 1


def test_tokens_are_counted_over_a_resume(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "logging_steps": 4}
    whole = make_trainer(make_model(), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer(make_model(), output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(resumed, "num_tokens") == logged(whole, "num_tokens")


def test_a_saved_model_loads(tmp_path):
    trainer = train(make_model(), PROMPTS)
    trainer.save_model(tmp_path)
    assert same(weights(trainer.model), weights(AutoModelForCausalLM.from_pretrained(tmp_path)))


def test_a_path_is_loaded_with_its_tokenizer(tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    args = GRPOConfig(use_cpu=True, report_to="none", num_generations=2, max_completion_length=8)
    trainer = GRPOTrainer(str(tmp_path), share_of_a, args, Dataset.from_dict({"prompt": PROMPTS}))
    assert trainer.model.dtype == torch.float32
    assert trainer.processing_class.get_vocab() == make_tokenizer().get_vocab()


# ---- Adapters and references ----


def test_a_frozen_base_has_the_precision_that_the_policy_computes_in(tmp_path):
    make_model().save_pretrained(tmp_path)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    for options, expected in ({"bf16": True}, torch.bfloat16), ({}, torch.float32):
        model = train(str(tmp_path), PROMPTS, peft_config=lora, **options).model
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {expected}
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    chosen = {"bf16": True, "model_init_kwargs": {"dtype": "float32"}}
    model = train(str(tmp_path), PROMPTS, peft_config=lora, **chosen).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_lora_leaves_the_base_weights_as_they_were(tmp_path, beta, checkpointing):
    base = make_model()
    before = weights(base)
    options = {"gradient_checkpointing": checkpointing is not None, "gradient_checkpointing_kwargs": checkpointing}
    trainer = train(base, PROMPTS, peft_config=LORA, beta=beta, max_steps=2, **options)
    after = weights(trainer.model)
    assert any(value.any() for name, value in after.items() if "lora_B" in name)
    assert logged(trainer, "grad_norm")[0] > 0
    assert all(
        torch.equal(before[name.removeprefix("base_model.model.").replace(".base_layer", "")], value)
        for name, value in after.items()
        if "lora" not in name
    )
    trainer.save_model(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert same({n: w for n, w in after.items() if "lora" in n}, weights(loaded))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_a_continued_adapter_is_its_own_reference():
    adapted = get_peft_model(make_model(), LORA)
    before = {name: value for name, value in weights(adapted).items() if "lora" in name}
    trainer = train(adapted, PROMPTS, beta=0.1, max_steps=2)
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "kl")[1] > 1e-4
    assert not same(before, weights(trainer.model))
    with trainer._reference.evaluating(trainer.model) as reference:
        assert same(before, weights(reference))


def test_the_reference_moves_when_it_is_synced():
    model = make_model()
    start = weights(model)
    options = {"beta": 0.1, "max_steps": 2, "sync_ref_model": True, "ref_model_sync_steps": 2}
    trainer = train(model, PROMPTS, ref_model_mixup_alpha=0.25, **options)
    end, reference = weights(trainer.model), weights(trainer._reference.model)
    for name in start:
        torch.testing.assert_close(reference[name], 0.75 * start[name] + 0.25 * end[name], rtol=1e-5, atol=1e-6)


# ---- Input that cannot work ----


def letters(completions):
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"per_device_train_batch_size": 64, "reward_funcs": letters},
            r"train_dataset has 4 prompts and a generation batch needs 16.*generation_batch_size",
        ),
        ({"max_completion_length": 128}, r"max_completion_length=128 leaves no room.*context of 128.*at most 127"),
        ({"max_completion_length": 124}, r"prompts of train_dataset leave no room.*max_completion_length=124"),
        ({"reward_funcs": lambda nobody_has: [1.0]}, r"'<lambda>' takes nobody_has"),
        ({"reward_timeout": 1.0}, r"reward_timeout=1.0 needs reward_workers=1"),
        ({"reward_funcs": []}, "reward_funcs is empty"),
        ({"beta": 0.1, "sync_ref_model": True, "peft_config": LORA}, "sync_ref_model=True"),
    ],
)
def test_what_cannot_work_says_what_would(options, message):
    options = {"rollout_func": None} | options
    with pytest.raises(ValueError, match=message):
        train(make_model(), PROMPTS, **options)


def test_an_adapter_that_was_loaded_frozen_is_refused(tmp_path):
    get_peft_model(make_model(), LORA).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no trainable parameter.*is_trainable=True"):
        train(PeftModel.from_pretrained(make_model(), tmp_path), PROMPTS)


@pytest.mark.parametrize("prompts", [[["a"], None], [1, 2], [None, None]])
def test_prompts_that_are_no_text_are_refused(prompts):
    with pytest.raises(ValueError, match=r"train_dataset has the prompt .*all prompts must be strings"):
        train(make_model(), prompts)


@pytest.mark.parametrize("name", ["loss", "reward", "num_tokens"])
def test_log_metric_does_not_take_the_name_of_another_metric(name):
    def reward(completions, log_metric):
        log_metric(name, 1.0)
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match=rf"log_metric\('{name}', ...\) names a metric that the log has"):
        train(make_model(), PROMPTS, reward_funcs=reward)


def test_several_gpus_in_one_process_are_refused_with_the_launch_command(monkeypatch):
    monkeypatch.setattr(GRPOConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"n_gpu=2.*torchrun --nproc_per_node 2"):
        train(make_model(), PROMPTS)


@pytest.mark.parametrize("method", ["train", "evaluate"])
def test_without_a_dataset_it_says_which_is_missing(method):
    args = GRPOConfig(use_cpu=True, report_to="none", max_completion_length=8)
    trainer = GRPOTrainer(make_model(), share_of_a, args, processing_class=make_tokenizer())
    with pytest.raises(ValueError, match=r"(train|eval)_dataset=None"):
        getattr(trainer, method)()


def test_overflowing_prompts_are_dropped_or_cut(caplog):
    long = "a" * 126
    for policy, rows in (("drop", 4), ("truncate_left", 5)):
        trainer = sample(make_model(), [*PROMPTS, long], prompt_overflow=policy)
        assert len(trainer._order.source) == rows
        assert "1 of 5 prompts" in caplog.text
        caplog.clear()
    assert trainer._order.source.prompts([4])[0].ids == make_tokenizer()("a" * 120)["input_ids"]
