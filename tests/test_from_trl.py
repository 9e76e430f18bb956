"""Public scripts for TRL, rebuilt small: what they import, set and call is theirs, models and data are tiny."""

import json
import re
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import ModelConfig, TrlParser, get_peft_config
from trl.rewards import think_format_reward

from grpo_trl import GRPOConfig, GRPOTrainer
from tests.helpers.models import make_model, make_tokenizer


SMALL = {"use_cpu": True, "disable_tqdm": True, "max_steps": 2, "max_completion_length": 6, "logging_steps": 1}
QUESTIONS = [{"question": f"{i}=", "answer": str(i)} for i in range(8)]


@pytest.fixture
def model_path(tmp_path) -> str:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_example_runs_on_a_local_model_and_a_local_folder(tmp_path, model_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}="}) for i in range(8)))
    paths = {"output_dir": tmp_path / "out", "model_name_or_path": model_path, "dataset_name": tmp_path / "data"}
    options = paths | SMALL | {"num_generations": 4, "per_device_train_batch_size": 4, "use_peft": True}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["from_trl.py", *arguments, "--lora_target_modules", "q_proj", "v_proj"])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "from_trl.py"), run_name="__main__")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert str(tmp_path / "data") in (tmp_path / "out" / "README.md").read_text()


# ---- A gist with five rewards on arithmetic, which most notebooks started from ----
def extract(text: str) -> str:
    return text.split("=")[-1].strip()


def correctness_reward(prompts, completions, answer, **kwargs) -> list[float]:
    responses = [completion[0]["content"] for completion in completions]
    assert prompts[0][-1]["role"] == "user"
    return [2.0 if extract(response) == right else 0.0 for response, right in zip(responses, answer, strict=True)]


def digits_reward(completions, **kwargs) -> list[float]:
    return [0.5 if extract(completion[0]["content"]).isdigit() else 0.0 for completion in completions]


def pattern_reward(completions, **kwargs) -> list[float]:
    return [0.5 if re.match(r"[a-z]+", completion[0]["content"]) else 0.0 for completion in completions]


def test_a_loaded_model_with_several_rewards_of_a_chat(tmp_path, model_path):
    chats = Dataset.from_list(QUESTIONS).map(
        lambda row: {"prompt": [{"role": "system", "content": "add"}, {"role": "user", "content": row["question"]}]}
    )
    args = GRPOConfig(
        output_dir=str(tmp_path / "out"), run_name="arithmetic", learning_rate=5e-6, adam_beta1=0.9, adam_beta2=0.99,
        weight_decay=0.1, warmup_ratio=0.1, lr_scheduler_type="cosine", bf16=False, per_device_train_batch_size=1,
        gradient_accumulation_steps=4, num_generations=4, num_train_epochs=1, save_steps=100, max_grad_norm=0.1,
        report_to="none", log_on_each_node=False, **SMALL,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        processing_class=tokenizer,
        reward_funcs=[pattern_reward, digits_reward, correctness_reward],
        args=args,
        train_dataset=chats,
    )
    trainer.train()
    assert {"rewards/correctness_reward/mean", "completions/mean_length"} <= set(trainer.state.log_history[0])
    assert args.warmup_steps == 0.1


# ---- A reproduction with a recipe in YAML, a config class of its own, and a long end of the script ----
@dataclass
class RecipeConfig(GRPOConfig):
    benchmarks: list[str] = field(default_factory=list)
    system_prompt: str | None = None


RECIPE = """
bf16: false
use_cpu: true
disable_tqdm: true
do_eval: true
eval_strategy: steps
eval_steps: 2
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
learning_rate: 1e-6
log_completions: true
log_level: info
logging_first_step: true
logging_steps: 1
logging_strategy: steps
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
warmup_steps: 0.1
max_completion_length: 6
max_steps: 2
num_generations: 4
per_device_train_batch_size: 2
per_device_eval_batch_size: 4
save_strategy: steps
save_steps: 1
save_total_limit: 1
seed: 42
temperature: 0.7
beta: 1e-3
loss_type: dr_grpo
scale_rewards: false
mask_truncated_completions: true
max_grad_norm: 0.2
reward_weights: [1.0, 0.5]
report_to: [none]
system_prompt: add
"""


def test_a_recipe_with_its_own_config_evaluation_and_card(tmp_path, model_path, monkeypatch):
    saves = []

    class Pushing(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saves.append((state.global_step, args.benchmarks))

    monkeypatch.setattr(sys, "argv", ["grpo.py"])
    (tmp_path / "recipe.yaml").write_text(f"{RECIPE}output_dir: {tmp_path / 'out'}\n")
    (args,) = TrlParser(RecipeConfig).parse_args_and_config(["--config", str(tmp_path / "recipe.yaml")])
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row["question"]}]} | row for row in QUESTIONS])
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path, use_cache=False),
        reward_funcs=[correctness_reward, think_format_reward],
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        callbacks=[Pushing()],
        processing_class=AutoTokenizer.from_pretrained(model_path),
    )
    result = trainer.train(resume_from_checkpoint=None)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics | {"train_samples": len(data)})
    trainer.save_state()
    trainer.save_model(args.output_dir)
    trainer.create_model_card(dataset_name="someone/sums", tags=["open-r1"])
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    assert [step for step, _ in saves] == [1, 2]
    assert "eval_reward" in metrics
    assert "someone/sums" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "train_results.json").exists()


# ---- A tutorial that renders its prompts itself and may train an adapter ----
def starts_with_a_thought(completions, **kwargs):
    return [float(text.startswith("think")) for text in completions]


def equation_reward(completions, target, nums, **kwargs):
    return [float(str(one) in text) for text, one in zip(completions, target, strict=True)]


def test_rendered_prompts_a_model_path_and_a_peft_config_of_trl(tmp_path, model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def render(row):
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": "let"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        return {"prompt": text, "target": int(row["answer"]), "nums": [1, 2]}

    args = GRPOConfig(
        output_dir=str(tmp_path / "out"), learning_rate=5e-7, lr_scheduler_type="cosine", warmup_ratio=0.03, beta=0.001,
        per_device_train_batch_size=1, gradient_accumulation_steps=8, num_generations=8, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, report_to="none", use_vllm=False, tf32=None, **SMALL,
    )  # fmt: skip
    data = Dataset.from_list(QUESTIONS).map(render)
    trainer = GRPOTrainer(
        model=model_path,
        reward_funcs=[starts_with_a_thought, equation_reward],
        args=args,
        train_dataset=data,
        eval_dataset=data.select([0]),
        peft_config=get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["q_proj", "v_proj"])),
    )
    trainer.train()
    assert trainer.ref_model is None
    assert trainer._order.source.prompts([0])[0].ids.count(tokenizer.convert_tokens_to_ids("<user>")) == 1
