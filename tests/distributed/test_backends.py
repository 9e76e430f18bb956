"""Engines for several ranks, on two CPU processes: their weights are those of one process."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.distributed.test_ranks import launch
from tests.helpers.backends import CASES, ENGINES, run_all
from tests.helpers.models import make_model
from tests.helpers.training import relative_error, weights


pytestmark = [
    pytest.mark.backends,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LOCAL_SIZE": "2"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed"), "--master_port", "29533", "--module"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run_all(None, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def two(engine, tmp_path_factory):
    file = tmp_path_factory.mktemp("engine") / "results"
    launch([*TORCHRUN, "-m", "tests.helpers.backends", engine], file, timeout=400, environment=ENVIRONMENT)
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
        if case == "no rank with signal":
            assert difference(one[case]["before"], one[case]["after"]) == 0
        else:
            assert relative_error(one[case]["before"], rank[case]["after"], one[case]["after"]) < 1e-3


def test_gradients_are_in_shards_between_the_micro_batches_of_a_step(engine, two):
    if engine != "FSDP2":
        pytest.skip("DDP has none, and DeepSpeed keeps its own")
    for rank in two:
        micro_batches = rank["shards left by micro-batches"]
        step = [False] + [True] * (len(micro_batches) // 2 - 1)
        assert len(step) > 1
        assert micro_batches == 2 * step


@pytest.mark.parametrize("run", ["sampled", "sampled with LoRA", "sampled with LoRA that is continued"])
def test_sampling_resuming_and_saving(run, engine, one, two):
    """Completions are those of one process; resumed inside a generation batch equals uninterrupted; what is saved loads."""
    if engine != "FSDP2":  # there model.generate writes, whose noise depends on the batch
        written = [rank[run]["written"] for rank in two]
        assert sorted(written[0] + written[1]) == sorted(one[run]["written"])
    for rank in two:
        if engine != "FSDP2":
            assert difference(one[run]["after"], rank[run]["after"]) < 1e-5
            assert rank[run]["evaluated"] == pytest.approx(one[run]["evaluated"], abs=1e-6)
        assert rank[run]["resumed"]["written"] == rank[run]["written"]
        for name, value in rank[run]["after"].items():
            assert torch.equal(rank[run]["resumed"]["after"][name], value), name
        saved = rank[run]["saved"]
        if engine in ("ZeRO-3", "FSDP2"):  # saving is a collective, from which ranks return when it is done
            assert rank[run]["there"]
        after = rank[run]["after"]
        assert saved.keys() == after.keys()
        assert all(torch.equal(saved[name], value.to(saved[name].dtype)) for name, value in after.items())
        assert rank[run]["folders"] == []  # of an adapter that is not trained


def test_sharded_weights_are_gathered_once_a_generation_batch_and_once_an_evaluation(engine, two):
    for rank in two:
        counts, with_evaluation = rank["sampled"]["gatherings"], rank["sampled"]["gatherings with evaluation"]
        if engine != "ZeRO-3":
            assert with_evaluation == []
            continue
        assert len(counts) == 3
        assert len(with_evaluation) == 4
        assert min(with_evaluation) > 1  # groups


@pytest.mark.parametrize("run", ["from a path", "from a path with LoRA"])
def test_models_given_as_paths_are_loaded_as_the_engine_needs_them(run, engine, one, two):
    """Policy, reference and a reward model."""
    for rank in two:
        assert rank[run]["steps"] == 6
        if engine != "FSDP2":
            assert difference(one[run]["after"], rank[run]["after"]) < 1e-5
            assert rank[run]["rewards"] == pytest.approx(one[run]["rewards"], rel=1e-5)


def test_a_reference_has_the_precision_of_the_policy(engine, two):
    """At the first step they are the same; but FSDP rounds between layers too."""
    for rank in two:
        first, *others = rank["in half precision"]
        assert first < (1e-4 if engine == "FSDP2" else 1e-12)
        assert max(others) > 1e-4


def test_an_evaluation_may_come_before_training(engine, one, two):
    for rank in two:
        run, alone = rank["evaluated first"], one["evaluated first"]
        assert run["steps"] == 6
        if engine != "FSDP2":
            assert run["evaluated"] == pytest.approx(alone["evaluated"], abs=1e-6)
            assert difference(alone["after"], run["after"]) < 1e-5


def test_a_server_receives_the_whole_policy_one_weight_at_a_time(engine, two):
    first, second = (rank["on a server"] for rank in two)
    assert first["steps"] == second["steps"] == 4
    assert first["received"].keys() == first["after"].keys()
    assert all(torch.equal(value, first["received"][name]) for name, value in first["after"].items())
    assert difference(weights(make_model()), first["after"]) > 1e-4
    for rank in (first, second):
        assert len(rank["gathered"]) % len(rank["after"]) == 0
        assert max(rank["gathered"]) == (1 if engine == "ZeRO-3" else 0)


def test_a_server_receives_the_adapter_alone(engine, two):
    first, second = (rank["on a server with LoRA"] for rank in two)
    adapter = {name.replace(".default", ""): value for name, value in first["after"].items() if "lora_" in name}
    assert first["steps"] == second["steps"] == 4
    assert first["received"].keys() == adapter.keys()
    assert all(torch.equal(value, first["received"][name].double()) for name, value in adapter.items())
    assert any(value.any() for name, value in adapter.items() if "lora_B" in name)
    assert first["gathered"] == second["gathered"] == []


@pytest.mark.parametrize("precision", ["bfloat16 base", "bfloat16", "four bits"])
def test_an_adapter_is_trained_on_a_coarse_base(precision, engine, one, two):
    """The base stays, the adapter is saved whole, and KL is that of one process up to rounding."""
    for rank in two:
        if precision not in rank["coarse bases"]:
            pytest.skip("needs bitsandbytes, which FSDP2 has its own conditions for")
        run, alone = rank["coarse bases"][precision], one["coarse bases"][precision]
        assert len(run["moved"]) == 8
        assert all("lora_" in name for name in run["moved"])
        assert run["finite"]
        assert run["saved"]
        if precision == "four bits":
            assert run["kl"] == pytest.approx(alone["kl"], rel=1e-4)
        else:  # it is nothing but the rounding of half precision
            assert max(run["kl"]) < 4 * max(alone["kl"])


def test_completions_may_be_written_without_gathering_all_weights(engine, two):
    """Under stage 3 `model.generate` writes them, with other noise."""
    if engine != "ZeRO-3":
        pytest.skip("others have nothing to gather")
    first, second = (rank["not gathered"] for rank in two)
    assert first["steps"] == 6
    assert difference(first["after"], second["after"]) == 0
    assert difference(weights(make_model()), first["after"]) > 1e-5


def test_a_model_that_is_loaded_after_the_options_is_sharded(engine, one, two):
    if engine != "ZeRO-3":
        pytest.skip("others shard nothing while a model is loaded")
    for rank in two:
        assert rank["loaded after options"]["sharded"]
        assert difference(one["loaded after options"]["after"], rank["loaded after options"]["after"]) < 1e-5


MISTAKES = {
    "a second training": r"DeepSpeed starts once for a model\. Save it with save_model",
    "the model of another trainer": r"belongs to the DeepSpeed engine of an earlier trainer\. Save it",
    "a trainer without DeepSpeed": r"deepspeed=None conflicts with an earlier trainer.*Give all trainers deepspeed=",
    "a checkpoint of another backend": r"cannot resume like this \(.*backend: ZeRO-. then, none now\)\. Use the",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_the_remedy(mistake, engine, two):
    if not engine.startswith("ZeRO"):
        pytest.skip("only DeepSpeed's engines leave such traces")
    for rank in two:
        assert re.search(MISTAKES[mistake], rank["mistakes"][mistake]), rank["mistakes"][mistake]


def test_shards_of_a_checkpoint_are_put_together_by_the_script_of_deepspeed(engine, two):
    if engine != "ZeRO-3":
        pytest.skip("others save whole weights")
    for rank in two:
        found, after = rank["not gathered on saving"]["found"], rank["not gathered on saving"]["after"]
        assert all(torch.equal(found[name], value) for name, value in after.items())


def test_an_error_in_sampling_leaves_a_model_that_trains_on(engine, one, two):
    if engine == "FSDP2":
        pytest.skip("there model.generate writes, and ranks wait for each other")
    error = "KeyError('made up')"
    for rank, expected in zip(two, [f'RuntimeError("Rank 1: {error}")', error], strict=True):
        failed = rank["sampling that fails"]
        assert failed["errors"] == [expected]
        assert failed["steps"] == 6
        assert difference(one["sampling that fails"]["after"], failed["after"]) < 1e-5


@pytest.mark.parametrize(
    "killed, launcher",
    [("DDP", [*TORCHRUN, "-m"]), ("ZeRO-3", DEEPSPEED)],
    ids=["DDP-torchrun", "ZeRO-3-deepspeed"],
)
def test_a_rank_that_is_killed_ends_the_job(launcher, killed, tmp_path):
    """Within 30 s, with a code that is not 0, and without leaving a process behind."""
    command = [*launcher, "tests.helpers.backends", killed, str(tmp_path / "results")]
    folder = Path(__file__).parents[2]
    job = psutil.Popen(
        command, cwd=folder, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    members: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "results-runs").exists():  # training has begun
            assert time.monotonic() < deadline
            assert job.poll() is None
            time.sleep(0.2)
        members = job.children(recursive=True)
        ranks = [member for member in members if "tests.helpers.backends" in " ".join(member.cmdline())]
        ranks[-1].send_signal(signal.SIGKILL)
        assert job.wait(30) != 0
        _, left = psutil.wait_procs(members, timeout=10)
        assert not left
    finally:
        for member in [*members, job]:
            if member.is_running():
                member.kill()
