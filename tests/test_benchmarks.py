"""The benchmarks run; what they measure is no matter of tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_scoring_benchmark_prints_its_table():
    command = [sys.executable, ROOT / "benchmarks" / "scoring.py", "--models", "5m", "--systems", "padded", "packed"]
    options = ["--group_sizes", "2", "--rounds", "1", "--steps", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^padded +\d+\.\d+ .*\n^packed +\d+\.\d+ .* 1\.00 +1\.00$", done.stdout, re.MULTILINE)
    assert "machine's matrix rate" in done.stdout
