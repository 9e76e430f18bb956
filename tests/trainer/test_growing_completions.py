"""Runs on a CPU whose completions grow, in processes whose memory the system limits; see tests/helpers/growing.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.growing import LENGTHS


ROOT = Path(__file__).parents[2]
LIMIT = 500
"""MiB that a process may take besides what it has before training; all completions in a micro-batch take more."""
pytestmark = pytest.mark.slow


def grow(report, *options):
    """What a run within `LIMIT` has needed and logged."""
    command = [sys.executable, "-m", "tests.helpers.growing", str(report), "--limit", str(LIMIT), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def without_an_option(tmp_path_factory):
    return grow(tmp_path_factory.mktemp("run") / "report.json")


def ran_out(run):
    return [line for line in run["lines"] if "Memory ran out" in line]


def test_a_run_whose_completions_grow_stays_within_its_memory_without_an_option(without_an_option):
    assert len(without_an_option["grad_norm"]) == len(LENGTHS)
    assert without_an_option["max_tokens"] < without_an_option["wanted"]
    assert not ran_out(without_an_option)
    assert without_an_option["peak"] <= without_an_option["free"]


def test_a_run_that_is_told_to_take_more_than_there_is_shrinks_and_goes_on(without_an_option, tmp_path):
    options = ["max_tokens_per_micro_batch=100000", "gradient_checkpointing=false"]
    run = grow(tmp_path / "report.json", *options)
    assert ran_out(run)
    assert run["grad_norm"] == pytest.approx(without_an_option["grad_norm"], rel=1e-3)
