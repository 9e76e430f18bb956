"""What a way of training holds and sends, on paper and counted."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_trl.plan import Job, Shape, activations, memory, traffic


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "distributed.md", ROOT / "docs" / "performance.md"]
GPU_BYTES = 80e9
"""Of the GPU that the table of activations is for."""
BILLION = 10**9
METHODS = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
SEVEN = Job("ZeRO-3", ranks=8, trained=7 * BILLION)


# ---- What must hold whatever the formulas are ----
@pytest.mark.parametrize("trained, frozen", [(7 * BILLION, 0), (BILLION // 100, 7 * BILLION)])
def test_a_higher_stage_holds_less_and_no_stage_sends_less_than_the_one_below(trained, frozen):
    jobs = [Job(method, 8, trained, frozen) for method in METHODS]
    held = [memory(job).held for job in jobs]
    assert held == sorted(held, reverse=True)
    sent = [traffic(job, micro_batches=4).update for job in jobs[1:]]
    assert sent == sorted(sent)


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_sends_nothing(method):
    alone = Job(method, 1, BILLION)
    assert traffic(alone, micro_batches=3, passes=1).update == traffic(alone).sampling == 0


def test_sharded_memory_goes_with_the_number_of_ranks():
    assert memory(SEVEN).held == pytest.approx(8 * memory(replace(SEVEN, ranks=64)).held)
    assert memory(SEVEN).sampling == memory(replace(SEVEN, ranks=64)).sampling == 14 * BILLION


def test_what_is_offloaded_lies_on_the_host():
    kept = memory(SEVEN)
    for options in ({"offload_optimizer": True}, {"offload_optimizer": True, "offload_param": True}):
        moved = memory(replace(SEVEN, **options))
        assert moved.host + moved.held == kept.held
    assert moved.held == 2 * 7 * BILLION / 8  # a place for the gradients is left


def test_the_papers_example():
    """arXiv 1910.02054, figure 1: 7.5 B parameters on 64 devices, in GB, gradients included."""
    jobs = {method: Job(method, 64, 7_500_000_000) for method in METHODS}
    b, share = 2 * 7.5, 7.5 / 64
    assert memory(jobs["ZeRO-1"]).held / 1e9 + b == pytest.approx(31.4, abs=0.05)
    assert memory(jobs["ZeRO-2"]).held / 1e9 + 2 * share == pytest.approx(16.6, abs=0.05)
    assert memory(jobs["ZeRO-3"]).held / 1e9 == pytest.approx(1.88, abs=0.01)


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"method='ZeRO-4' is unknown; use one of 'DDP', 'ZeRO-1'"):
        Job("ZeRO-4", 8, 1)


# ---- The tables of docs/distributed.md ----
def rounded(value):
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


SIZES = {"0.5 B": 0.5, "1.5 B": 1.5, "3 B": 3, "7 B": 7, "14 B": 14, "32 B": 32, "70 B": 70}
RANKS = {"0.5 B": (8,), "1.5 B": (8,), "3 B": (8,), "7 B": (8, 64), "14 B": (8, 64), "32 B": (8, 64, 512)}


def memory_rows():
    """GiB of a rank at the peak, without activations; LoRA trains 0.5 % besides."""
    for name, billions in SIZES.items():
        size = int(billions * BILLION)
        for ranks in RANKS.get(name, (8, 64, 512)):
            plans = [memory(Job(method, ranks, size)) for method in METHODS]
            off = memory(Job("ZeRO-3", ranks, size, offload_optimizer=True, offload_param=True))
            lora = memory(Job("ZeRO-3", ranks, size // 200, size))
            peaks = [plan.peak for plan in plans]
            peaks += [plans[-1].held + plans[-1].update, off.held + off.update, off.host, lora.peak]
            yield row(name, ranks, *(rounded(peak / 2**30) for peak in peaks))


def traffic_rows():
    """GB that a rank sends, on 64 ranks, with 8 micro-batches a step."""
    for name, billions in SIZES.items():
        size = int(billions * BILLION)
        jobs = [Job(method, 64, size) for method in METHODS]
        sent = [traffic(job, micro_batches=8).update for job in jobs]
        lora = traffic(Job("ZeRO-3", 64, size // 200, size), micro_batches=8)
        sent += [traffic(jobs[-1]).sampling, lora.update]
        yield row(name, *(rounded(value / 1e9) for value in sent))


SHAPES = {
    "Qwen2.5-0.5B": Shape(24, 896, 128, 4864, 151_936),
    "Qwen2.5-1.5B": Shape(28, 1536, 256, 8960, 151_936),
    "Qwen2.5-7B": Shape(28, 3584, 512, 18_944, 152_064),
    "Qwen2.5-32B": Shape(64, 5120, 1024, 27_648, 152_064),
    "Llama-3.1-70B": Shape(80, 8192, 1024, 28_672, 128_256),
}


def activation_rows():
    """GiB of a micro-batch in bfloat16, and KiB of keys and values of a token."""
    for name, shape in SHAPES.items():
        cells = [
            activations(shape, tokens, checkpointing=c, gpu_bytes=GPU_BYTES) / 2**30
            for c in (True, False)
            for tokens in (4096, 16_384)
        ]
        yield row(name, *map(rounded, cells), rounded(2 * 2 * shape.layers * shape.key_value / 2**10))


@pytest.mark.parametrize("rows", [memory_rows, traffic_rows, activation_rows])
def test_the_tables_of_the_pages_are_those_of_the_plan(rows):
    lines = [line for page in PAGES for line in page.read_text().splitlines()]
    missing = [line for line in rows() if line not in lines]
    assert not missing, "\n".join(missing)


# ---- Counted on two processes ----
@pytest.fixture(scope="module")
def counted():
    """What the benchmark prints: for each of its rows, pairs of plan and count."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    options = ["--methods", "ZeRO-2", "ZeRO-3", "--precisions", "autocast"]
    command = [sys.executable, str(ROOT / "benchmarks" / "distributed.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    rows = {}
    for line in done.stdout.splitlines():
        pairs = re.findall(r"([-\d.,]+) / ([-\d.,]+)", line)
        rows[line.split()[0] if line.split() else ""] = [[float(n.replace(",", "")) for n in pair] for pair in pairs]
    return rows


@pytest.mark.backends
@pytest.mark.parametrize("method", ["ZeRO-2", "ZeRO-3"])
def test_two_ranks_hold_and_send_what_the_plan_says(method, counted):
    held, update, sampling, sent, sent_for_sampling = counted[method]
    assert held[1] == pytest.approx(held[0], rel=0.02)
    assert update[1] == pytest.approx(update[0], rel=0.1)
    fused_copies = (
        2  # of the layers' weights, which the sampler makes where memory is plenty; embeddings are not copied
    )
    assert sampling[0] - 0.1 < sampling[1] < 1.1 * sampling[0] + fused_copies
    assert sent[1] == pytest.approx(sent[0], rel=0.01)
    assert sent_for_sampling[1] == pytest.approx(sent_for_sampling[0], rel=0.02)


@pytest.mark.backends
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_token_has_the_activations_that_the_plan_says(checkpointing, counted):
    ((planned, count),) = counted[f"autocast,checkpointing={checkpointing}"]
    assert count == pytest.approx(planned, rel=0.1)
