"""Whole runs on a GPU."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

from tests.helpers.models import make_model
from tests.helpers.training import sampling_trainer, weights


ROOT = Path(__file__).parents[2]


def train(folder, model=None, **options):
    trainer = sampling_trainer(folder, 8, model, use_cpu=False, logging_steps=1, save_strategy="no", **options)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    assert any((before[name] != after[name]).any() for name in before)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 6
    assert all(math.isfinite(entry["loss"]) for entry in logged)
    return trainer, logged


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_sampling_and_training_agree_on_logprobs(tmp_path, level, bf16):
    trainer, logged = train(tmp_path, loss_level=level, bf16=bf16)
    assert trainer.args.device.type == "cuda"
    found = max(entry["sampling/sampling_logp_difference/mean"] for entry in logged[::2])
    assert found < (0.05 if bf16 else 1e-3)


def test_an_adapter_is_trained(tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    train(tmp_path, make_model(), peft_config=adapter, bf16=True)


def run(*command, timeout=240):
    """The lines that a process of its own prints."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()


def test_a_run_is_repeated_and_resumed_bit_for_bit(tmp_path):
    found = json.loads(run("-m", "tests.gpu.runs", "determinism", tmp_path)[-1])
    assert found == {"repeated": True, "resumed": True, "handed over": None}


@pytest.mark.parametrize("name, wrapper", [("ddp", "Qwen2ForCausalLM"), ("zero3", "DeepSpeedEngine")])
def test_a_launched_run_trains(name, wrapper, tmp_path):
    if name == "zero3":
        pytest.importorskip("deepspeed")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "tests.gpu.runs"]
    found = json.loads(run(*launch, name, tmp_path)[-1])
    assert found["wrapped"] == wrapper  # accelerate wraps nothing in DDP for a single rank
    assert found["handed over"] is None
    assert all(map(math.isfinite, found["losses"]))
    assert found["difference"] < 0.05


def test_the_quickstart_learns(tmp_path):
    line = run("examples/quickstart.py", "--output_dir", tmp_path)[-1]
    print(line)
    before, after = map(float, re.findall(r"([\d.]+)%", line))
    assert after - before >= 30
