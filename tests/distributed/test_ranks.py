"""Two processes end with the weights of one."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from grpo_trl.reliability.signals import EXIT_CODE
from tests.helpers.ranks import CASES, SAMPLED, run_cases, sampled
from tests.helpers.training import relative_error


pytestmark = pytest.mark.backends
TIMED = ("time", "runtime", "per_second")


@pytest.fixture(scope="module")
def one():
    return run_cases()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    file = tmp_path_factory.mktemp("ranks") / "results"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch([*torchrun, "-m", "tests.helpers.ranks"], file)
    return [torch.load(f"{file}.{rank}", weights_only=False) for rank in range(2)]


def launch(command, file, timeout=300, environment=None):
    """Run `command FILE`, and leave no process behind whatever happens: torchrun gives each rank a session of its own."""
    process = psutil.Popen(
        [*command, str(file)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
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


@pytest.mark.parametrize("case", ["token", "a rank that samples no signal"])
def test_ranks_compute_equally_much(case, one, two):
    """In the second case all that trains was sampled on the first rank."""
    first, second = (rank[case]["computed"] for rank in two)
    assert abs(first - second) < 0.2 * (first + second)
    assert first + second < 1.5 * one[case]["computed"]


@pytest.mark.parametrize("case", SAMPLED)
def test_two_ranks_sample_what_one_samples(case, two):
    """In float64; in float32 rounding decides between tokens that are nearly tied."""
    alone = sampled(**SAMPLED[case])
    shares = [rank["sampled"][case] for rank in two]
    assert sorted(shares[0]["written"] + shares[1]["written"]) == sorted(alone["written"])
    assert len({tuple(ids) for _, ids in alone["written"]}) > 0.5 * len(alone["written"])
    for share in shares:
        for mine, other in zip(share["metrics"], alone["metrics"], strict=True):
            assert of_rollouts(mine) == pytest.approx(of_rollouts(other), rel=1e-9, nan_ok=True)
        for name, value in alone["after"].items():
            assert torch.allclose(share["after"][name], value, rtol=1e-9, atol=1e-12)


# ---- What one rank meets ----


def test_a_run_of_two_ranks_that_was_interrupted_ends_as_if_it_had_not_been(two):
    for rank in two:
        incident = rank["incidents"]["interrupted"]
        whole, *others = incident["ends"]
        for other in others:
            assert all(torch.equal(other["after"][name], value) for name, value in whole["after"].items())
            assert other["written"] == whole["written"]
            assert [*map(untimed, other["log"])] == [*map(untimed, whole["log"])]
        assert incident["code"] == EXIT_CODE
        assert incident["saved"] == ["checkpoint-3"]


def test_a_rank_that_runs_out_of_memory_makes_its_step_anew(two):
    for rank in two:
        plain, small = rank["incidents"]["short of memory"]["ends"]
        assert all(torch.allclose(small[name], value, rtol=1e-4, atol=1e-6) for name, value in plain.items())
    assert two[0]["incidents"]["short of memory"]["largest"] is None
    assert two[1]["incidents"]["short of memory"]["largest"] > 30


def test_micro_batches_are_those_that_fit_on_the_rank_with_the_least_memory(two):
    for rank in two:
        spare, little, _ = rank["incidents"]["budgeted"]
        assert spare["chosen"]["recomputed"] is False
        assert spare["chosen"]["max_tokens"] > 1000
        assert little["chosen"]["recomputed"] is True
        assert 35 <= little["chosen"]["max_tokens"] == little["used"] <= 40
        for name, value in spare["after"].items():
            assert torch.allclose(little["after"][name], value, rtol=1e-4, atol=1e-6)


def test_a_rank_that_shrinks_what_was_chosen_keeps_no_other_waiting(two):
    """Each rank makes as many micro-batches as its own memory asks for, since gradients meet at the end of a step."""
    first, second = (rank["incidents"]["budgeted"][2] for rank in two)
    plain = two[0]["incidents"]["budgeted"][0]
    assert first["used"] == first["chosen"]["max_tokens"] == second["chosen"]["max_tokens"]
    assert second["used"] <= 30
    for rank in (first, second):
        assert all(
            torch.allclose(rank["after"][name], value, rtol=1e-4, atol=1e-6) for name, value in plain["after"].items()
        )


def test_no_rank_makes_a_step_that_is_not_finite_on_one(two):
    for rank in two:
        incident = rank["incidents"]["not finite"]
        assert incident["moved"] == [True, False, True, True, True, True]
        assert incident["skipped"][:3] == [None, 1.0, None]


def test_a_reward_function_that_fails_on_one_rank_fails_for_all(two):
    for rank in two:
        excluded, raised = (rank["incidents"]["failing rewards"][action] for action in ("exclude", "raise"))
        assert excluded["steps"] == 6
        assert max(filter(None, excluded["failures"])) >= 1
        assert excluded["stop"] == "None"
        assert raised["steps"] < 6
        assert "RunStopped" in raised["stop"]
        assert "hates_short" in raised["stop"]


def of_rollouts(metrics):
    """Metrics of what is sampled and rewarded, and the whole evaluation; those of the update depend on micro-batches."""
    names = ("eval_", "reward", "frac_", "completions/", "sampling/useful", "num_tokens")
    return {name: value for name, value in untimed(metrics).items() if name.startswith(names)}


def untimed(metrics):
    return {k: v for k, v in metrics.items() if not any(word in k for word in TIMED)}


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_those_of_one_process(case, one, two):
    """Evaluation has five prompts, so that one rank has one more than the other."""
    for rank in two:
        for kind in ("log", "evaluation"):
            expected = untimed(one[case][kind])
            actual = {k: v for k, v in rank[case][kind].items() if k in expected}
            assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6)
