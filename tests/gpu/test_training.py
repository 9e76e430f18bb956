"""Whole runs on a GPU."""

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
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_sampling_and_training_agree_on_logprobs(tmp_path, level, precision):
    trainer, logged = train(tmp_path, loss_level=level, **precision)
    assert trainer.args.device.type == "cuda"
    found = max(entry["sampling/sampling_logp_difference/mean"] for entry in logged[::2])
    assert found < (0.05 if precision else 1e-3)


def test_an_adapter_is_trained(tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    train(tmp_path, make_model(), peft_config=adapter, bf16=True)


def test_the_quickstart_learns(tmp_path):
    command = [sys.executable, ROOT / "examples" / "quickstart.py", "--output_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = done.stdout.strip().splitlines()[-1]
    print(line)
    before, after = map(float, re.findall(r"([\d.]+)%", line))
    assert after - before >= 30
