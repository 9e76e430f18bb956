"""DeepSpeed's own engine, on two CPU processes: its weights are those of one process."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from .conftest import make_model
from .test_ranks import launch
from .training import relative_error, weights
from .zero import CASES, run_all


pytestmark = [
    pytest.mark.zero,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]
STAGES = (1, 2, 3)
ENGINE = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run_all(None, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module", params=STAGES, ids=lambda stage: f"ZeRO-{stage}")
def two(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("zero") / "results"
    launch([*TORCHRUN, "-m", "tests.zero", str(request.param)], file, timeout=400, environment=ENGINE)
    return [torch.load(f"{file}.{rank}", weights_only=False) for rank in range(2)]


def difference(one, other):
    """Of two sets of weights, relative to their size."""
    squares = sum((other[name] - value).square().sum() for name, value in one.items())
    return (squares / sum(value.square().sum() for value in one.values())).sqrt().item()


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_one_process(case, one, two):
    for rank in two:
        assert difference(one[case]["before"], rank[case]["before"]) == 0
        assert difference(one[case]["after"], rank[case]["after"]) < 1e-6
        assert relative_error(one[case]["before"], rank[case]["after"], one[case]["after"]) < 1e-3


@pytest.mark.parametrize("run", ["sampled", "sampled with LoRA"])
def test_sampling_resuming_and_saving(run, one, two):
    """Completions are those of one process; resumed inside a window equals uninterrupted; what is saved loads."""
    written = [rank[run]["written"] for rank in two]
    assert sorted(written[0] + written[1]) == sorted(one[run]["written"])
    for rank in two:
        assert difference(one[run]["after"], rank[run]["after"]) < 1e-5
        assert rank[run]["resumed"]["written"] == rank[run]["written"]
        for name, value in rank[run]["after"].items():
            assert torch.equal(rank[run]["resumed"]["after"][name], value), name
        saved = rank[run]["saved"]
        assert all(torch.equal(saved[name], value.to(saved[name].dtype)) for name, value in rank[run]["after"].items())


def test_a_model_given_as_a_path_and_its_reference_are_sharded_as_they_are_loaded(one, two):
    for rank in two:
        assert difference(one["from a path"]["after"], rank["from a path"]["after"]) < 1e-5


def test_completions_may_be_written_without_gathering_all_weights(two):
    """Under stage 3 `model.generate` writes them, with other noise."""
    first, second = (rank["not gathered"] for rank in two)
    assert first["steps"] == 6
    assert difference(first["after"], second["after"]) == 0
    assert difference(weights(make_model()), first["after"]) > 1e-5


def test_an_error_in_sampling_leaves_a_model_that_trains_on(one, two):
    for rank in two:
        failed = rank["sampling that fails"]
        assert failed["errors"] == ["KeyError('made up')"]
        assert failed["steps"] == 6
        assert difference(one["sampling that fails"]["after"], failed["after"]) < 1e-5


def test_a_rank_that_is_killed_ends_the_job(tmp_path):
    command = [*TORCHRUN, "-m", "tests.zero", "2", str(tmp_path / "results")]
    folder = Path(__file__).parents[1]
    job = psutil.Popen(
        command, cwd=folder, env=os.environ | ENGINE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    members: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "results-runs").exists():  # training has begun
            assert time.monotonic() < deadline
            assert job.is_running()
            time.sleep(0.2)
        members = job.children(recursive=True)
        ranks = [member for member in members if "tests.zero" in " ".join(member.cmdline())]
        ranks[-1].send_signal(signal.SIGKILL)
        assert job.wait(30) != 0
        _, left = psutil.wait_procs(members, timeout=10)
        assert not left
    finally:
        for member in [*members, job]:
            if member.is_running():
                member.kill()
