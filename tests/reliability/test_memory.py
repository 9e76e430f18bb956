"""Runs on a CPU whose completions grow, in processes whose memory the system limits; see tests/helpers/growing.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
LIMIT = 500
"""MiB that a process may take besides what it has before training."""

pytestmark = pytest.mark.slow


def grow(folder, *options):
    """What a run of three steps, of completions of 50, 500 and 2,000 tokens, has needed and logged."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "tests.helpers.growing", str(report), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(report.read_text())


def test_a_run_whose_completions_grow_stays_within_its_memory_without_an_option(tmp_path):
    """Which it would not without a budget: a micro-batch of all completions takes more than there is."""
    run = grow(tmp_path, "--limit", str(LIMIT))
    assert run["steps"] == 3
    assert run["max_tokens"] < run["wanted"]
    assert run["peak"] <= run["free"] <= LIMIT * 2**20
    assert not [line for line in run["lines"] if "Memory ran out" in line]


def test_a_run_that_is_told_to_take_more_than_there_is_shrinks_and_goes_on(tmp_path):
    free = grow(tmp_path)
    assert not [line for line in free["lines"] if "Memory ran out" in line]
    options = ["max_tokens_per_micro_batch=100000", "gradient_checkpointing=false"]
    run = grow(tmp_path, "--limit", str(LIMIT), *options)
    assert run["steps"] == 3
    assert [line for line in run["lines"] if "Memory ran out" in line]
    assert run["grad_norm"] == pytest.approx(free["grad_norm"], rel=1e-3)
