"""The GSM8K example: its rewards, and what it does with the real data and a small model that was trained on it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


EXAMPLE = Path(__file__).parents[1] / "examples" / "gsm8k.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("gsm8k", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gsm8k"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gsm8k"]


def run(*arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)


def run_here(shared, output, *arguments):
    """Train on the shared files; the log of training."""
    result = run(
        *("--dataset", shared / "gsm8k", "--model_name_or_path", shared / "models" / "gsm8k-mini"),
        *("--prompt_style", "plain", "--output_dir", output, "--save_strategy", "no", "--report_to", "none"),
        *("--use_cpu", "true", "--gradient_checkpointing", "false", "--logging_steps", "1", "--disable_tqdm", "true"),
        *arguments,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    log = [
        {name: float(value) for name, value in re.findall(r"'([^']+)': '?([-\d.e]+)", line)}
        for line in result.stdout.splitlines()
        if line.startswith("{")
    ]
    return [entry for entry in log if "reward" in entry]


# ---- Rewards ----


def test_the_exact_answer_is_found_as_a_number(example):
    completions = [
        "so\n#### 1,000",
        "so\n#### 1000.0",
        "#### 999",
        "nothing",
        [{"role": "assistant", "content": "#### 1000"}],
    ]
    assert example.exact(completions, ["x\n#### 1,000"] * 5) == [1, 1, 0, 0, 1]


def test_the_form_asks_for_a_last_line_with_the_number_alone(example):
    assert example.answer_format(["a\n#### 5", "a\n#### -1,250.5\n", "a #### 5", "a\n#### five", "a\n#### 5\nb"]) == [
        1,
        1,
        0,
        0,
        0,
    ]


def test_arithmetic_is_the_share_of_right_calculations(example):
    assert example.arithmetic(["<<48/2=24>> <<2*(3+1)=9>>", "none", "<<-2+5=3>>", "<<0.1*3=0.3>>"]) == [0.5, 0, 1, 1]


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "9**9**9",
        "1/0",
        "f()",
        "a",
        "'a'*9",
        "(" * 500,
        "1 if 1 else 2",
        "",
        "1,2",
        "1e999*0",
        "True",
        "\0",
    ],
)
def test_what_is_not_arithmetic_is_wrong_and_harmless(example, expression):
    assert example.arithmetic([f"<<{expression}=1>>"]) == [0]


@pytest.mark.parametrize("result", ["nan", "inf", "", "x", "1e400"])
def test_results_that_are_no_number_are_wrong(example, result):
    assert example.arithmetic([f"<<1+1={result}>>"]) == [0]


def test_all_annotations_of_the_published_solutions_are_right(example, shared):
    with (shared / "gsm8k" / "test.jsonl").open() as file:
        solutions = [json.loads(line)["answer"] for line in file]
    rewards = example.arithmetic(solutions)
    assert sum(rewards) / sum("<<" in s for s in solutions) > 0.99
    assert example.exact(solutions[:50], solutions[:50]) == [1] * 50


# ---- Without a hub ----


@pytest.mark.slow
def test_without_a_hub_it_says_what_to_pass(shared, tmp_path):
    no_data = run("--output_dir", tmp_path)
    assert no_data.returncode != 0
    assert "--dataset PATH" in no_data.stderr
    no_model = run("--output_dir", tmp_path, "--dataset", shared / "gsm8k", "--use_cpu", "true")
    assert no_model.returncode != 0
    assert "--model_name_or_path PATH" in no_model.stderr


# ---- Training ----


@pytest.mark.slow
@pytest.mark.parametrize("level, steps", [("token", 40), ("sequence", 30)])  # fewer do where rounding is kind
def test_the_share_of_right_arithmetic_rises_above_four_fifths(shared, tmp_path, level, steps):
    log = run_here(
        shared,
        tmp_path,
        *("--loss_level", level, "--rewards", "arithmetic", "--learning_rate", "3e-4", "--max_steps", steps),
        *(
            "--lr_scheduler_type",
            "constant",
            "--per_device_train_batch_size",
            "16",
            "--gradient_accumulation_steps",
            "4",
        ),
        *("--max_completion_length", "200"),
    )
    rewards = [entry["reward"] for entry in log]
    print(level, rewards)
    assert len(rewards) == steps
    assert rewards[0] < 0.1
    assert max(sum(rewards[i : i + 3]) / 3 for i in range(steps - 2)) > 0.8
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.num_parameters() > 5e6
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_twenty_steps_with_lora_log_every_reward_and_leave_the_base_alone(shared, tmp_path):
    log = run_here(
        shared,
        tmp_path,
        *("--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "1e-3", "--beta", "0.04"),
        *("--max_steps", "20", "--per_device_train_batch_size", "16", "--max_completion_length", "100"),
    )
    assert len(log) == 20
    for name in ("exact", "answer_format", "arithmetic"):
        assert all(0 <= entry[f"rewards/{name}/mean"] <= 1 for entry in log)
    base = AutoModelForCausalLM.from_pretrained(shared / "models" / "gsm8k-mini", dtype="float32")
    before = {name: value.clone() for name, value in base.named_parameters()}
    adapted = PeftModel.from_pretrained(base, tmp_path)
    changed = [name for name, value in adapted.named_parameters() if "lora_B" in name and value.abs().sum() > 0]
    assert len(changed) == 12
    for name, value in adapted.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(before[name.replace(".base_layer", "")], value)
