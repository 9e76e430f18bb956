"""The peak of an update on a CPU, counted, beside what `trainer.plan()` says.

    python benchmarks/plan.py

Each case runs in a process of its own, which counts the bytes that are allocated above those before the model is made.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from distributed import LETTERS, Allocated, model, tokenizer
from peft import LoraConfig
from transformers import TrainerCallback

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.plan import phases


SIZES = {"layers": 8, "hidden": 256, "key_value": 128, "intermediate": 768, "vocabulary": 1024}
PROMPT, PROMPTS = 500, 8
CASES = {
    "float32": {},
    "float32, no checkpointing": {"gradient_checkpointing": False},
    "autocast": {"bf16": True},
    "float32, reference": {"beta": 0.1},
    "float32, LoRA": {"lora": True},
    "float32, SGD": {"optim": "sgd"},
}


class UpdatePeak(TrainerCallback):
    """The most that is allocated between the start and the end of the third optimizer step's update."""

    def __init__(self, allocated, before):
        self.allocated, self.before, self.peak = allocated, before, 0

    def on_step_begin(self, args, state, control, **kwargs):  # completions are sampled by now
        self.allocated.peak_since()

    def on_step_end(self, args, state, control, **kwargs):
        self.peak = self.allocated.peak_since() - self.before


def count(options):
    """Planned and counted bytes of an update at its peak."""
    torch.set_num_threads(1)
    lora = LoraConfig(r=16, target_modules="all-linear") if options.pop("lora", False) else None
    allocated = Allocated()
    before = allocated.now()
    with tempfile.TemporaryDirectory() as folder:
        peak = UpdatePeak(allocated, before)
        trainer = GRPOTrainer(
            model(**SIZES),
            lambda completions: [float(i % 2) for i in range(len(completions))],
            GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                max_steps=3,
                per_device_train_batch_size=2 * PROMPTS,
                num_generations=2,
                max_completion_length=2,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **options,
            ),
            Dataset.from_list(
                [{"prompt": f"{LETTERS[i // 8]}{LETTERS[i % 8]}" + "a" * (PROMPT - 2)} for i in range(3 * PROMPTS)]
            ),
            processing_class=tokenizer(),
            peft_config=lora,
            callbacks=[peak],
        )
        planned = sum(phases(trainer.plan().setup)["update"].values())
        trainer.train()
    return planned, peak.peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--count", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        case, file = args.count
        Path(file).write_text(json.dumps(count(dict(CASES[case]))))
        return
    print("planned / counted, MiB at the peak of an update")
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "counted.json"
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--count", case, str(file)]
            subprocess.run(command, env=environment, check=True, capture_output=True)
            planned, counted = json.loads(file.read_text())
            print(f"{case:28} {planned / 2**20:7.1f} / {counted / 2**20:7.1f}", flush=True)


if __name__ == "__main__":
    main()
