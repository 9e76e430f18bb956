"""The benchmarks run; what they measure is no matter of tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


def run(script, *options):
    """What a benchmark prints."""
    command = [sys.executable, ROOT / "benchmarks" / script, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_update_benchmark_prints_its_table():
    options = ["--group_sizes", "2", "--rounds", "1", "--steps", "1"]
    done = run("update.py", "--models", "5m", "--systems", "padded", "packed", *options)
    assert re.search(r"^padded +\d+\.\d+ .*\n^packed +\d+\.\d+ .* 1\.00 +1\.00$", done, re.MULTILINE)
    assert "machine's matrix rate" in done


@pytest.mark.slow
def test_the_sampling_benchmark_prints_its_table():
    done = run(
        "sampling.py",
        "--models",
        "5m",
        "--systems",
        "generate",
        "group",
        "--rounds",
        "1",
        "--calls",
        "1",
        "--cases",
        "tiny",
    )
    assert re.search(r"^generate +\d+ .*\n^group +\d+ .* 1\.00 +1\.00$", done, re.MULTILINE)


@pytest.mark.slow
def test_the_step_benchmark_prints_its_table():
    done = run("step.py", "--models", "5m", "--systems", "grpo_trl", "--rounds", "1", "--steps", "1", "--cases", "tiny")
    assert re.search(r"^grpo_trl +\d+\.\d+ .* 1\.00 +1\.00 +sampling \d+%, .*update \d+%$", done, re.MULTILINE)


@pytest.mark.slow
def test_the_evaluation_benchmark_prints_its_speedup():
    done = run("evaluation.py", "--prompts", "3", "--one_by_one", "1")
    assert re.search(r"^speedup \d+\.\d+$", done, re.MULTILINE)


@pytest.mark.slow
def test_time_to_reward_prints_its_table(shared):
    options = ["--model", shared / "models" / "gsm8k-mini", "--dataset", shared / "gsm8k", "--systems", "grpo_trl"]
    done = run("time_to_reward.py", *options, "--seeds", "3", "--max_steps", "1", "--batch_size", "8")
    assert re.search(r"^ +3 grpo_trl .* 1 +0\.\d+ to 0\.\d+  not reached$", done, re.MULTILINE)


@pytest.mark.slow
def test_what_sampling_ahead_saves_is_printed():
    done = run("ahead.py", "--completions", "8", "--steps", "4", "--delay", "0.1")
    assert re.search(r"^0 +\d+\.\d+ .*\n^1 +\d+\.\d+ .*\nof the time: \d+%$", done, re.MULTILINE)
