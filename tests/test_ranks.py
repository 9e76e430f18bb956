"""Two processes end with the weights of one."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from .ranks import CASES, run_cases
from .training import relative_error


@pytest.fixture(scope="module")
def one():
    return run_cases()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    file = tmp_path_factory.mktemp("ranks") / "results"
    launch([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"], file)
    return [torch.load(f"{file}.{rank}", weights_only=False) for rank in range(2)]


def launch(command, file, timeout=150):
    """Run `tests.ranks`, and leave no process behind whatever happens: torchrun gives each rank a session of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = psutil.Popen(
        [*command, "tests.ranks", str(file)],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, output[-5000:]
    finally:
        if process.is_running():
            for member in [*process.children(recursive=True), process]:
                member.kill()


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_one_process(case, one, two):
    for rank in two:
        assert relative_error(one[case]["before"], rank[case]["after"], one[case]["after"]) < 1e-5


def test_ranks_sample_with_noise_of_their_own(two):
    assert two[0]["sampled"] != two[1]["sampled"]


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_those_of_one_process(case, one, two):
    """Evaluation has five prompts, so that one rank has one more than the other."""
    timed = ("time", "runtime", "per_second")
    for rank in two:
        for kind in ("log", "evaluation"):
            expected = {k: v for k, v in one[case][kind].items() if not any(word in k for word in timed)}
            actual = {k: v for k, v in rank[case][kind].items() if k in expected}
            assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6)
