"""The quickstart learns what it promises, for three seeds at both levels."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLE = Path(__file__).parents[1] / "examples" / "quickstart.py"


@pytest.mark.slow
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_accuracy_rises_by_thirty_points(tmp_path, level, seed):
    command = [sys.executable, str(EXAMPLE), "--loss_level", level, "--seed", str(seed), "--output_dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    line = result.stdout.strip().splitlines()[-1]
    print(line)
    before, after = map(float, re.findall(r"([\d.]+)%", line))
    assert 0 < before < 60
    assert after - before >= 30
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
