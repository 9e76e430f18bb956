"""What an optimizer step costs: packed with shared prompts, padded, and in TRL, on the same completions.

    python benchmarks/scoring.py                       # both cases, both models, all systems: about an hour on two cores
    python benchmarks/scoring.py --models 5m --cases zero-shot --rounds 1
    python benchmarks/scoring.py --models 5m --systems packed --group_sizes 2 4 8 16 32
    python benchmarks/scoring.py --models 0.5b         # on a GPU, in bf16

A step is forward, backward and optimizer: from the first call of `compute_loss` to the end of the optimizer step. Writing
and rewarding completions is left out; all systems get the same ones from `rollout_func`. Each system runs in a process of
its own, in turns; the first steps are left out; figures are medians. Memory is the peak of a last step, which is not timed,
 above what the process holds before it (weights, optimizer state): resident pages on a CPU, the allocator's on a GPU.
"""

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

# Lengths of GSM8K's answers (training set, end token included): 32 quantiles, mean 127
ANSWER_LENGTHS = (
    *(50, 58, 64, 68, 73, 77, 81, 85, 89, 92, 95, 99, 102, 106, 110, 113),
    *(118, 123, 127, 132, 137, 143, 149, 155, 161, 168, 176, 185, 199, 214, 240, 282),
)
VOCABULARY = 4096
MODELS: dict[str, dict[str, Any]] = {
    "5m": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "heads": (8, 2)},
    "32m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "heads": (8, 2)},
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "heads": (14, 2),
        "vocab_size": 151936,
    },
}
SYSTEMS = ("trl", "padded", "packed")
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """Prompts of one length, each with a group of completions."""

    num_prompts: int
    prompt_length: int
    num_generations: int = 8

    @property
    def num_completions(self) -> int:
        return self.num_prompts * self.num_generations

    @property
    def packed_tokens(self) -> int:
        return self.num_prompts * self.prompt_length + sum(n - 1 for n in self.lengths(0))

    @property
    def padded_tokens(self) -> int:
        return self.num_completions * (self.prompt_length + max(self.lengths(0)) - 1)

    def lengths(self, step: int) -> list[int]:
        """Of the completions of a step: quantiles of GSM8K's answers, in an order that changes with the step."""
        n = self.num_completions
        spread = [ANSWER_LENGTHS[(2 * i + 1) * len(ANSWER_LENGTHS) // (2 * n)] for i in range(n)]
        random.Random(step).shuffle(spread)
        return spread


CASES = {"zero-shot": Case(4, 75), "eight-shot": Case(2, 1800)}


# ---- One system, in a process of its own ----
def measure(system: str, model_name: str, case: Case, steps: int, checkpointing: bool) -> dict:
    """Seconds of each step but the first ones, and the bytes of one more."""
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback

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
        _model(model_name),
        reward,
        config,
        Dataset.from_dict({"prompt": ["a"] * case.num_prompts * total}),
        processing_class=_tokenizer(PreTrainedTokenizerFast),
        rollout_func=rollout_func,
    )
    meter = _Meter(torch, timed_steps=total - 1)
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
    options = {
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
    if system == "trl":
        from trl import GRPOConfig, GRPOTrainer

        return GRPOTrainer, GRPOConfig(**options, loss_type="grpo")
    from grpo_trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer, GRPOConfig(**options, shared_prefix=system == "packed")


class _Meter:
    """From `start` (its first call) to `stop`: the time of each of the first steps, the peak memory of the one after."""

    def __init__(self, torch, timed_steps: int):
        self.torch = torch
        self.timed_steps = timed_steps
        self.on_gpu = torch.cuda.is_available()
        self.seconds: list[float] = []
        self.bytes = 0
        self.started: float | None = None

    def start(self) -> None:
        if self.started is not None:
            return
        if len(self.seconds) == self.timed_steps:
            self.bytes = -self._hold()
        if self.on_gpu:
            self.torch.cuda.synchronize()
        self.started = time.perf_counter()

    def stop(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()
        if len(self.seconds) == self.timed_steps:
            self.bytes += self.torch.cuda.max_memory_allocated() if self.on_gpu else _status("VmHWM")
        else:
            self.seconds.append(time.perf_counter() - self.started)
        self.started = None

    def _hold(self) -> int:
        """Bytes in use; the peak starts anew."""
        if self.on_gpu:
            self.torch.cuda.reset_peak_memory_stats()
            return self.torch.cuda.memory_allocated()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")


def _status(name: str) -> int:
    """Bytes that Linux reports for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _model(name: str):
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

    sizes = dict(MODELS[name])
    heads, key_value_heads = sizes.pop("heads")
    set_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            **({"vocab_size": VOCABULARY} | sizes),
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def _tokenizer(tokenizer_class):
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2} | {f"t{i}": i for i in range(3, VOCABULARY)}
    return tokenizer_class(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")), pad_token="<pad>", eos_token="<eos>"
    )


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
    command = [sys.executable, __file__, "--child", system, "--models", model, "--steps", str(args.steps)]
    command += ["--case_sizes", *map(str, (case.num_prompts, case.prompt_length, case.num_generations))]
    command += ["--gradient_checkpointing"] * args.gradient_checkpointing
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{system} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


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
