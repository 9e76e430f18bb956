"""What an optimizer step costs: packed with shared prompts, padded, and in TRL, on the same completions.

    python benchmarks/update.py                        # both cases, both models, all systems: about an hour on two cores
    python benchmarks/update.py --models 5m --cases zero-shot --rounds 1
    python benchmarks/update.py --models 5m --systems packed --group_sizes 2 4 8 16 32
    python benchmarks/update.py --models 0.5b          # on a GPU, in bf16

A step is forward, backward and optimizer: from the first call of `compute_loss` to the end of the optimizer step. Writing
and rewarding completions is left out; all systems get the same ones from `rollout_func`. Each system runs in a process of
its own, in turns; the first steps are left out; figures are medians. Memory is the peak of a last step, which is not timed,
above what the process holds before it (weights, optimizer state): resident pages on a CPU, the allocator's on a GPU.
"""

import argparse
import importlib
import json
import random
import statistics
import tempfile
import time
from typing import Any

from workload import (
    ANSWER_LENGTHS,
    MODELS,
    VOCABULARY,
    Case,
    Meter,
    in_child,
    make_model,
    make_tokenizer,
)


SYSTEMS = ("trl", "padded", "packed")
WARM_UP = 2


CASES = {"zero-shot": Case(4, 75), "eight-shot": Case(2, 1800)}


# ---- One system, in a process of its own ----
def measure(system: str, model_name: str, case: Case, steps: int, checkpointing: bool) -> dict:
    """Seconds of each step but the first ones, and the bytes of one more."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    total = WARM_UP + steps + 1
    trainer_class, config = _trainer_of(system, case, total, checkpointing, torch.cuda.is_available())
    calls = iter(range(total))

    def rollout_func(prompts, trainer):
        step = next(calls)
        source = random.Random(step)

        def tokens(length):
            return [source.randrange(3, VOCABULARY) for _ in range(length)]

        lengths = case.lengths(step)
        rows = [row for _ in range(case.num_prompts) for row in [tokens(case.prompt_length)] * case.num_generations]
        logprobs = [[-1.0] * length for length in lengths] if system == "trl" else None  # which TRL requires
        return {"prompt_ids": rows, "completion_ids": [tokens(n) for n in lengths], "logprobs": logprobs}

    def reward(completions, **kwargs):
        return [float(i % 4) for i in range(len(completions))]

    trainer = trainer_class(
        make_model(model_name),
        reward,
        config,
        Dataset.from_dict({"prompt": ["a"] * case.num_prompts * total}),
        processing_class=make_tokenizer(),
        rollout_func=rollout_func,
    )
    meter = Meter(timed_steps=total - 1)
    compute_loss = trainer.compute_loss

    def metered_loss(*args, **kwargs):
        meter.start()
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = metered_loss

    class StopMeter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            meter.stop()

    trainer.add_callback(StopMeter())
    trainer.train()
    return {"seconds": meter.seconds[WARM_UP:], "bytes": meter.bytes}


def _trainer_of(system: str, case: Case, total: int, checkpointing: bool, on_gpu: bool):
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": case.num_completions,
        "num_generations": case.num_generations,
        "max_completion_length": max(ANSWER_LENGTHS),
        "max_steps": total,
        "beta": 0.0,
        "gradient_checkpointing": checkpointing,
        "bf16": on_gpu,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
    }
    library: Any = importlib.import_module("trl" if system == "trl" else "grpo_trl")
    own = {"loss_type": "grpo"} if system == "trl" else {"shared_prefix": system == "packed"}
    return library.GRPOTrainer, library.GRPOConfig(**options, **own)


# ---- The table ----
def matrix_work(model_name: str, case: Case) -> float:
    """Operations in matrix products that a packed step needs; what is recomputed in the backward pass is not counted.

    Forward and backward are three times the forward. A product of a token with a weight has two operations; a query
    with a key and its value four per channel.
    """
    sizes = MODELS[model_name]
    hidden, layers, (heads, key_value_heads) = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["heads"]
    weights = layers * hidden * (2 * hidden + 2 * hidden * key_value_heads / heads + 3 * sizes["intermediate_size"])
    lengths = case.lengths(0)
    pairs = case.num_prompts * case.prompt_length**2 / 2 + sum(n * case.prompt_length + n * n / 2 for n in lengths)
    head = 2 * sum(lengths) * hidden * sizes.get("vocab_size", VOCABULARY)
    return 3 * (2 * weights * case.packed_tokens + 4 * pairs * hidden * layers + head)


def machine_rate() -> float:
    """Operations per second of large matrix products in the precision of training."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        start = time.perf_counter()
        c = a @ b
        c[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:])


def run(system: str, model: str, case: Case, args) -> dict:
    sizes = case.num_prompts, case.prompt_length, case.num_generations
    checkpointing = ["--gradient_checkpointing"] * args.gradient_checkpointing
    options = ("--models", model, "--steps", args.steps, "--case_sizes", *sizes, *checkpointing)
    return in_child(__file__, system, *options)


def compare(model: str, name: str, case: Case, args) -> None:
    seconds: dict[str, list[float]] = {system: [] for system in args.systems}
    peaks: dict[str, list[int]] = {system: [] for system in args.systems}
    rates = []
    for _ in range(args.rounds):
        rates.append(machine_rate())
        for system in args.systems:
            measured = run(system, model, case, args)
            seconds[system] += measured["seconds"]
            peaks[system].append(measured["bytes"])
    show(model, name, case, seconds, peaks, statistics.median(rates))


def show(model: str, name: str, case: Case, seconds: dict, peaks: dict, rate: float) -> None:
    padded, packed = case.padded_tokens, case.packed_tokens
    print(f"\n{model}, {name}: {case.num_prompts} prompts of {case.prompt_length} tokens, G = {case.num_generations}")
    print(f"tokens padded {padded}, needed and packed {packed} ({padded / packed:.1f} times fewer)")
    print(f"{'':8} {'s/step':>8} {'range':>17} {'GiB':>6} {'time':>7} {'memory':>7}  of packed")
    time_of = {system: statistics.median(values) for system, values in seconds.items()}
    peak_of = {system: statistics.median(values) for system, values in peaks.items()}
    for system, values in seconds.items():
        ratios = [f"{x[system] / x['packed']:.2f}" if "packed" in x else "" for x in (time_of, peak_of)]
        extremes = f"{min(values):.3f}-{max(values):.3f}"
        print(
            f"{system:8} {time_of[system]:8.3f} {extremes:>17} {peak_of[system] / 2**30:6.2f}",
            *(f"{r:>7}" for r in ratios),
        )
    if "packed" in time_of:
        share = matrix_work(model, case) / time_of["packed"] / rate
        print(f"packed: {share:.0%} of the machine's matrix rate of {rate / 1e9:.0f} GFLOP/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["5m", "32m"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--group_sizes", nargs="+", type=int, help="instead of the cases: 2 prompts of 1000 tokens")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each system, in turns")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--case_sizes", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        result = measure(args.child, args.models[0], Case(*args.case_sizes), args.steps, args.gradient_checkpointing)
        print(json.dumps(result))
        return
    cases = {name: CASES[name] for name in args.cases}
    if args.group_sizes:
        cases = {f"G = {g}": Case(2, 1000, g) for g in args.group_sizes}
    for model in args.models:
        for name, case in cases.items():
            compare(model, name, case, args)


if __name__ == "__main__":
    main()
