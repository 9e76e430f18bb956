"""Configurations in the style of those that people run with TRL's GRPO scripts: option by option the same sets of names."""

import json

import pytest
import transformers
import yaml

from grpo_trl.cli.launch import LAUNCHED
from tests.cli.test_cli import run
from tests.helpers.models import make_model, make_tokenizer


COMMON = {
    "model_name_or_path": "model",
    "model_revision": "main",
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "dataset_name": "data",
    "bf16": True,
    "use_vllm": True,
    "vllm_gpu_memory_utilization": 0.5,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "learning_rate": "2e-06",
    "log_level": "info",
    "logging_steps": 1,
    "logging_strategy": "steps",
    "max_completion_length": 6,
    "num_generations": 4,
    "output_dir": "out",
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 4,
    "report_to": ["wandb"],
    "save_strategy": "steps",
    "save_total_limit": 1,
    "seed": 7,
    "warmup_ratio": 0.1,
}
OPEN_R1 = COMMON | {
    "do_eval": True,
    "hub_model_id": "someone/policy",
    "hub_strategy": "every_save",
    "log_completions": True,
    "logging_first_step": True,
    "max_steps": -1,
    "num_train_epochs": 1,
    "push_to_hub": True,
    "max_prompt_length": 128,
}
MATH = OPEN_R1 | {
    "dataset_configs": ["all"],
    "num_processes": 3,
    "vllm_device": "auto",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.2},
    "per_device_eval_batch_size": 4,
    "system_prompt": "Think first.",
    "reward_funcs": ["recipe_rewards.accuracy", "recipe_rewards.tag_count"],
    "reward_weights": [1.0, 0.25],
}
CODE = OPEN_R1 | {
    "dataset_prompt_column": "problem",
    "callbacks": ["push_to_hub_revision"],
    "benchmarks": ["lcb_v4"],
    "beta": 0.0,
    "loss_type": "dr_grpo",
    "scale_rewards": False,
    "eval_strategy": "no",
    "hub_model_revision": "v02.00",
    "lr_scheduler_type": "constant_with_warmup",
    "max_grad_norm": 0.2,
    "reward_funcs": ["recipe_rewards.tag_count"],
    "save_steps": 0.1,
    "temperature": 0.7,
    "wandb_entity": "someone",
    "wandb_project": "policies",
    "mask_truncated_completions": True,
    "code_language": "cpp",
    "code_eval_test_batch_size": 4,
}
ZERO = OPEN_R1 | {
    "chat_template": "{{ messages }}",
    "dataset_config": "default",
    "beta": 0.0,
    "num_iterations": 1,
    "reward_funcs": ["think_format_reward", "recipe_rewards.accuracy"],
    "reward_weights": [1, 1],
    "save_steps": 0.2,
    "temperature": 1.0,
    "top_k": None,
    "use_liger_kernel": True,
    "max_grad_norm": 0.2,
}
CALIBRATED = COMMON | {
    "run_name": "calibrated",
    "eval_strategy": "steps",
    "eval_on_start": False,
    "eval_steps": 50,
    "hub_strategy": "end",
    "max_prompt_length": 128,
    "num_train_epochs": 1,
    "push_to_hub": False,
    "reward_funcs": ["recipe_rewards.accuracy"],
    "reward_weights": [0.5],
    "scale_rewards": False,
    "vllm_device": "auto",
    "wandb_project": "calibrated",
    "sys_prompt_name": "long",
}
COUNTDOWN = COMMON | {
    "tf32": True,
    "dataset_id_or_path": "countdown",
    "max_steps": 5,
    "lr_scheduler_type": "cosine",
    "beta": 0.001,
    "max_prompt_length": 64,
    "vllm_device": "cuda:3",
    "log_completions": "True",
    "push_to_hub": True,
    "reward_funcs": ["recipe_rewards.accuracy"],
}
SCRIPT = {name: value for name, value in COMMON.items() if name not in ("use_vllm", "vllm_gpu_memory_utilization")} | {
    "dataset_config": "default",
    "dataset_train_split": "train",
    "do_train": True,
    "run_name": "local",
    "logging_dir": "logs",
    "max_prompt_length": 256,
    "top_p": 1.0,
    "beta": 0.001,
    "epsilon": 0.2,
    "loss_type": "bnpo",
    "steps_per_generation": 2,
    "scale_rewards": True,
    "shuffle_dataset": True,
    "reward_funcs": ["recipe_rewards.tag_count"],
}
RECIPES = {
    "math": (MATH, {"dataset_configs", "max_prompt_length"}),
    "code": (
        CODE,
        {"max_prompt_length", "dataset_prompt_column", "callbacks", "benchmarks", "hub_model_revision", "wandb_entity"}
        | {"wandb_project", "code_language", "code_eval_test_batch_size"},
    ),
    "zero": (ZERO, {"max_prompt_length", "chat_template"}),
    "calibrated": (CALIBRATED, {"max_prompt_length", "wandb_project", "sys_prompt_name"}),
    "countdown": (COUNTDOWN, {"dataset_id_or_path", "max_prompt_length", "vllm_device"}),
    "script": (SCRIPT, {"logging_dir", "max_prompt_length"}),
}
CONTRADICTIONS = [
    ("system_prompt", "set prompt_style: chat, and prompt_template: '{prompt}'", ["--prompt_template", "{problem}"]),
    ("use_liger_kernel", "use_liger_kernel=True cannot work", ["--use_liger_kernel", "false"]),
]
"""Options that are here, and cannot work as they are given: what the error says, and what mends it."""
HERE = [
    *("--use_cpu", "true", "--attn_implementation", "sdpa", "--use_vllm", "false", "--report_to", "none"),
    *("--tf32", "false", "--push_to_hub", "false", "--max_steps", "1"),
]
"""What this machine lacks: a GPU, kernels, vLLM and a tracker."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        json.dumps({"prompt": [{"role": "user", "content": f"{i}="}], "problem": f"{i}=", "solution": str(i)})
        for i in range(16)
    ]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(rows))
    (tmp_path / "recipe_rewards.py").write_text(
        "def accuracy(completions, solution, **kwargs):\n"
        "    return [float(s in str(c)) for c, s in zip(completions, solution)]\n\n\n"
        "def tag_count(completions, **kwargs):\n    return [len(str(c)) / 100 for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(LAUNCHED, "1")  # as in the processes that num_processes starts
    verbosity = transformers.logging.get_verbosity()
    yield tmp_path
    transformers.logging.set_verbosity(verbosity)  # which log_level has changed


def written(folder, options):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(options))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("name", RECIPES)
def test_each_option_that_is_refused_is_named(folder, name):
    options, refused = RECIPES[name]
    done = run("train", written(folder, options))
    assert done.exit_code == 2
    lines = done.output.removeprefix("Error: ").splitlines()
    assert {line.split("=")[0] for line in lines if " is no option; " in line} == refused


@pytest.mark.parametrize("name", RECIPES)
def test_without_them_the_recipe_trains(folder, name):
    options, refused = RECIPES[name]
    left = {option: value for option, value in options.items() if option not in refused}
    here = list(HERE)
    for option, message, mended in CONTRADICTIONS:
        if option in left:
            done = run("train", written(folder, left), *here)
            assert (done.exit_code, message in done.output) == (2, True)
            here += mended
    done = run("train", written(folder, left), *here)
    assert done.exit_code == 0, done.output
    assert (folder / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_without_them_the_recipe_is_planned_on_any_machine(folder, name):
    options, refused = RECIPES[name]
    left = {option: value for option, value in options.items() if option not in refused}
    mended = [word for option, _, words in CONTRADICTIONS if option in left for word in words]
    done = run("plan", written(folder, left), "--gpu", "H100", *mended)
    assert done.exit_code == 0, done.output
    assert f"on each of {left.get('num_processes', 1)} rank" in done.output
    assert ("vLLM 40.00" in done.output) == ("use_vllm" in left)
