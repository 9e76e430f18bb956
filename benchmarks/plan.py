"""What `trainer.plan()` says of memory and time on a CPU, beside what is counted and measured.

    python benchmarks/plan.py
    python benchmarks/plan.py --parts time

Memory: each case runs in a process of its own, which counts the bytes that are allocated, at the peaks of sampling and of
the update, above those that libraries keep when the run is gone. Time: a step of each size, beside the bound that follows
from the rate and the bandwidth that this machine reaches, which are measured right before and right after its run.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from distributed import LETTERS, Allocated, model, tokenizer
from peft import LoraConfig
from transformers import TrainerCallback

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.plan import Card, phases, step_seconds


SIZES = {"layers": 8, "hidden": 256, "key_value": 128, "intermediate": 768, "vocabulary": 1024}
PROMPT, PROMPTS = 500, 8
CASES = {
    "float32": {"gradient_checkpointing": True},
    "float32, no checkpointing": {"gradient_checkpointing": False},
    "float32, four micro-batches": {
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    },
    "autocast": {"gradient_checkpointing": True, "bf16": True},
    "float32, reference": {"gradient_checkpointing": True, "beta": 0.1},
    "float32, LoRA": {"gradient_checkpointing": True, "lora": True},
    "float32, SGD": {"gradient_checkpointing": True, "optim": "sgd"},
}
TIMED = {
    "7 M": SIZES,
    "32 M": {"layers": 8, "hidden": 512, "key_value": 256, "intermediate": 2048, "vocabulary": 1024},
}
STEPS = 3
PHASES = {"sampling": "time/sampling", "update": "time/update"}


class Peaks(TrainerCallback):
    """The most that is allocated in the sampling and in the update of the last optimizer step."""

    def __init__(self):
        self.allocated = Allocated()
        self.before = self.allocated.now()
        self.sampling = self.update = 0

    def on_step_begin(self, args, state, control, **kwargs):  # completions are sampled by now
        self.sampling = self.allocated.peak_since()

    def on_step_end(self, args, state, control, **kwargs):
        self.update = self.allocated.peak_since()

    def counted(self):
        """Both, above what is left when the run is gone: what libraries keep, for the most part."""
        gc.collect()
        left = self.allocated.now()
        return self.sampling - left, self.update - left


def trainer_of(folder, sizes, prompt, completion, callbacks=(), lora=None, **options):
    """A trainer on prompts and completions of these lengths; its rewards differ within each group."""
    defaults = {
        "output_dir": folder,
        "use_cpu": True,
        "max_steps": STEPS,
        "max_completion_length": completion,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    texts = [f"{LETTERS[i // 8]}{LETTERS[i % 8]}" + "a" * (prompt - 2) for i in range(STEPS * PROMPTS)]
    return GRPOTrainer(
        model(**sizes),
        lambda completions: [float(i % 2) for i in range(len(completions))],
        GRPOConfig(**(defaults | options)),
        Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=tokenizer(),
        peft_config=lora,
        callbacks=list(callbacks),
    )


def count(options):
    """Planned and counted bytes at the peaks of sampling and update."""
    torch.set_num_threads(1)
    lora = LoraConfig(r=16, target_modules="all-linear") if options.pop("lora", False) else None
    peaks = Peaks()
    options = {"per_device_train_batch_size": 2 * PROMPTS, "num_generations": 2} | options
    with tempfile.TemporaryDirectory() as folder:
        planned = run(folder, peaks, lora, options)
    return list(zip(planned, peaks.counted(), strict=True))


def run(folder, peaks, lora, options):
    """Train, and leave nothing of it; what was planned of sampling and update."""
    trainer = trainer_of(folder, SIZES, PROMPT, 2, [peaks], lora, **options)
    planned = phases(trainer.plan().setup)
    trainer.train()
    trainer.callback_handler.callbacks.clear()
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = None
    return sum(planned["sampling"].values()), sum(planned["update"].values())


def measured_machine():
    """The rates of float32 products and of reading memory that this machine reaches now: medians of half a second."""

    def seconds(work):
        times, end = [], time.perf_counter() + 0.5
        while (start := time.perf_counter()) < end:
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    a, long = torch.randn(1024, 1024), torch.ones(2**26)
    return Card("this machine", 0, long.nbytes / seconds(long.sum), 2 * 1024**3 / seconds(lambda: a @ a))


def times(sizes):
    """The machine before and after, and for sampling and update the seconds planned for their mean, and those measured."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": 32, "num_generations": 8, "gradient_checkpointing": False}
        trainer = trainer_of(folder, sizes, 75, 100, **options)
        before = measured_machine()
        trainer.train()
        after = measured_machine()
        logs = [entry for entry in trainer.state.log_history if "time/update" in entry]
        planned = step_seconds(trainer.plan().setup, mean(before, after))
    pairs = [(planned[name], statistics.median(entry[metric] for entry in logs)) for name, metric in PHASES.items()]
    return before, after, pairs


def mean(*cards):
    """The machine on average: its rates are harmonic means, since a step takes its time at each of them."""
    bandwidth = statistics.harmonic_mean([card.bytes_per_second for card in cards])
    return Card(cards[0].name, 0, bandwidth, statistics.harmonic_mean([card.flops_per_second for card in cards]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["memory", "time"], choices=["memory", "time"])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--count", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        case, file = args.count
        Path(file).write_text(json.dumps(count(dict(CASES[case]))))
        return
    if "memory" in args.parts:
        print(f"{'planned / counted, MiB at the peak of':36} {'sampling':>24} {'update':>24}")
        for case in args.cases:
            pairs = counted_apart(case)
            print(f"{case:36}", *(compared(planned / 2**20, counted / 2**20) for planned, counted in pairs), flush=True)
    if "time" in args.parts:
        print(f"{'measured / planned, s':12} {'GFLOP/s':>12} {'GB/s':>12} {'sampling':>24} {'update':>24}")
        for size, sizes in TIMED.items():
            before, after, pairs = times(sizes)
            rates = f"{before.flops_per_second / 1e9:5.0f},{after.flops_per_second / 1e9:5.0f}"
            bandwidths = f"{before.bytes_per_second / 1e9:5.1f},{after.bytes_per_second / 1e9:5.1f}"
            shown = (f"{took:8.4g} / {plan:6.4g} = {took / plan:4.1f}" for plan, took in pairs)
            print(f"{size:12} {rates:>12} {bandwidths:>12}", *shown, flush=True)


def counted_apart(case):
    """Count a case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counted.json"
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--count", case, str(file)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return json.loads(file.read_text())


def compared(planned, actual):
    return f"{planned:8.4g} / {actual:6.4g} {planned / actual - 1:+6.0%}"


if __name__ == "__main__":
    main()
