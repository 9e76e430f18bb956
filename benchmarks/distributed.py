"""What a rank holds and sends, counted on two CPU processes, beside what `grpo_trl.plan` says.

    python benchmarks/distributed.py

Each way of training runs with a model of two sizes, and a model with a micro-batch of two sizes. What grows with
parameters, or with tokens, is the difference between both, so that nothing else counts: bytes that are allocated
(glibc's count of large blocks, every 0.3 ms), and bytes that collectives move (torch.profiler's record of them, each
counted as a ring).
"""

import argparse
import ctypes
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import get_args

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from grpo_trl import GRPOConfig, GRPOTrainer, plan
from grpo_trl.plan import Job, Shape, activation_bytes_per_token, memory, traffic


RANKS = 2
LAYERS = (2, 6)
MICRO_BATCHES = 3
STEPS = 4
METHODS = {
    **{method: {"method": method, "lora": False} for method in plan.METHODS if method != "FSDP2"},
    "ZeRO-2, LoRA": {"method": "ZeRO-2", "lora": True},
    "ZeRO-3, LoRA": {"method": "ZeRO-3", "lora": True},
}
QUANTITIES = ("held", "update", "sampling", "sent", "sent for sampling")
SHAPE = Shape(layers=8, hidden=128, key_value=64, intermediate=384, vocabulary=64)
"""Small beside its activations."""
GROUPS = (4, 16)
PROMPT = 500
LETTERS = "abcdefgh"


FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class MallInfo(ctypes.Structure):
    """What glibc says of its memory; `hblkhd` are the bytes of blocks that have pages of their own."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


class Allocated:
    """Bytes allocated now, and the most since the last question."""

    def __init__(self):
        self.count = ctypes.CDLL(None).mallinfo2
        self.count.restype = MallInfo
        self.peak = 0
        self.lock = threading.Lock()
        threading.Thread(target=self._poll, daemon=True).start()

    def now(self):
        return self.count().hblkhd

    def peak_since(self):
        with self.lock:
            peak, self.peak = max(self.peak, self.now()), self.now()
        return peak

    def _poll(self):
        while True:
            with self.lock:
                self.peak = max(self.peak, self.now())
            time.sleep(0.0003)


class Counting(TrainerCallback):
    """In the last step but one: what is held before it, and the peaks of sampling and update. In the last: what both send.

    A profile takes memory itself.
    """

    def __init__(self):
        self.allocated = Allocated()
        self.counted = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEPS - 2:
            self.counted["held"] = self.allocated.now()
            self.allocated.peak_since()
        elif state.global_step == STEPS - 1:
            self.counted["update"] = self.allocated.peak_since() - self.counted["held"]
            self._start()
        elif state.global_step == STEPS:
            self.counted["sent"] = self._sent()

    def on_step_begin(self, args, state, control, **kwargs):  # completions are written by now
        if state.global_step == STEPS - 2:
            self.counted["sampling"] = self.allocated.peak_since() - self.counted["held"]
        elif state.global_step == STEPS - 1:
            self.counted["sent for sampling"] = self._sent()
            self._start()

    def _start(self):
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.profile.start()

    def _sent(self):
        self.profile.stop()
        size = Counter()
        for event in self.profile.profiler.kineto_results.events():
            size[event.name()] += bytes_of(event)
        gathered = size["c10d::_allgather_base_"]
        scattered = size["c10d::_reduce_scatter_base_"]
        reduced = size["gloo:all_reduce"] - scattered  # which gloo makes of all-reduces
        return (gathered + scattered + 2 * reduced) * (RANKS - 1) / RANKS


def bytes_of(event):
    """Of the largest tensor that a recorded call got: what is whole in a collective."""
    sizes = {"c10::BFloat16": 2, "float": 4}
    tensors = zip(event.shapes(), event.dtypes(), strict=True)
    return max((torch.Size(shape).numel() * sizes.get(dtype, 0) for shape, dtype in tensors), default=0)


def tokenizer():
    letters = {token: i for i, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    made = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def model(layers, hidden=512, key_value=512, intermediate=1536, vocabulary=64):
    """By default layers of 3.3 M parameters, and few others."""
    head = 64
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // head, "num_key_value_heads": key_value // head}
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(max_position_embeddings=1024, **sizes, **heads, **tokens))


def reward(completions):
    """Differs within each group."""
    return [float(i % 2) for i in range(len(completions))]


def train(policy, prompts, peft_config=None, **options):
    """What is counted in a few steps, and the model."""
    torch.set_num_threads(1)
    counting = Counting()
    with tempfile.TemporaryDirectory() as folder:
        defaults = {
            "use_cpu": True,
            "max_steps": STEPS,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        trainer = GRPOTrainer(
            policy,
            reward,
            GRPOConfig(output_dir=folder, seed=1, **defaults, **options),
            Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer(),
            peft_config=peft_config,
            callbacks=[counting],
        )
        trainer.train()
    return counting.counted, trainer.model


def engine_config(stage):
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = json.loads((Path(__file__).parents[1] / "ds_configs" / f"zero{stage}.json").read_text())["zero_optimization"]
    return dict.fromkeys(sizes, "auto") | {"bf16": {"enabled": "auto"}, "zero_optimization": zero}


def count_parameters(name, layers):
    """As one of two ranks, with few tokens, so that activations are small."""
    method, lora = METHODS[name].values()
    stage = Job(method, RANKS, 1).stage
    counted, trained = train(
        model(layers),
        ["ab", "cd", "ef", "gh"] * 4,
        peft_config=LoraConfig(r=64, target_modules="all-linear") if lora else None,
        deepspeed=engine_config(stage) if stage else None,
        bf16=stage > 0,
        per_device_train_batch_size=6,
        num_generations=6,
        max_completion_length=4,
        max_tokens_per_micro_batch=8,  # three micro-batches
        gradient_checkpointing=False,
    )
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trained.parameters()]
    counted["trained"] = sum(size for size, is_trained in sizes if is_trained)
    counted["frozen"] = sum(size for size, is_trained in sizes if not is_trained)
    return counted


def count_tokens(checkpointing, precision, groups):
    """In one process: the update of one micro-batch with so many long prompts, each another."""
    prompts = [
        "".join(LETTERS[i >> 3 * place & 7] for place in range(4)) + "a" * (PROMPT - 4) for i in range(4 * groups)
    ]
    counted, _ = train(
        model(**vars(SHAPE)).to(torch.bfloat16 if precision == "bf16" else torch.float32),
        prompts,
        per_device_train_batch_size=2 * groups,
        num_generations=2,
        max_completion_length=2,
        gradient_checkpointing=checkpointing,
        optim="sgd",
        bf16=precision == "autocast",
    )
    return counted


def run(launcher, *arguments):
    """What another process counts; blocks of 16 KiB and more have pages of their own there, which are counted."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counted.json"
        done = subprocess.run(
            [*launcher, __file__, "--count", *map(str, arguments), str(file)],
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not file.exists():
            raise SystemExit(done.stdout[-5000:])
        return json.loads(file.read_text())


def grown(small, large):
    return {name: large[name] - small[name] for name in large}


def compare_parameters(name):
    """For each quantity, plan and count, per parameter."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    counted = grown(*(run(torchrun, "parameters", name, layers) for layers in LAYERS))
    job = Job(METHODS[name]["method"], RANKS, counted["trained"], counted["frozen"])
    holds, sends = memory(job), traffic(job, MICRO_BATCHES)
    planned = [holds.held, holds.update, holds.sampling, sends.update, sends.sampling]
    return [(value / job.parameters, counted[q] / job.parameters) for q, value in zip(QUANTITIES, planned, strict=True)]


def compare_tokens(precision, checkpointing):
    """Plan and count of activations, per token."""
    how = f"{precision},{int(checkpointing)}"
    counted = grown(*(run([sys.executable], "tokens", how, groups) for groups in GROUPS))
    planned = activation_bytes_per_token(SHAPE, precision, checkpointing)
    return planned, counted["update"] / (PROMPT * (GROUPS[1] - GROUPS[0]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    precisions = get_args(plan.Precision)
    parser.add_argument("--precisions", nargs="*", default=list(precisions), choices=precisions)
    parser.add_argument("--count", nargs=4, metavar=("WHAT", "HOW", "SIZE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        what, how, size, file = args.count
        if what == "parameters":
            counted = count_parameters(how, int(size))
        else:
            precision, checkpointing = how.split(",")
            counted = count_tokens(checkpointing == "1", precision, int(size))
        if os.environ.get("RANK", "0") == "0":
            Path(file).write_text(json.dumps(counted))
        return
    print(f"plan / counted, bytes per parameter, {RANKS} ranks, {MICRO_BATCHES} micro-batches a step")
    print(f"{'':16}" + "".join(f"{quantity:>19}" for quantity in QUANTITIES))
    for name in args.methods:
        cells = [f"{planned:.2f} / {count:.2f}" for planned, count in compare_parameters(name)]
        print(f"{name:16}" + "".join(f"{cell:>19}" for cell in cells), flush=True)
    print(f"\nplan / counted, bytes of activations per token, {SHAPE}")
    for precision, checkpointing in itertools.product(args.precisions, (True, False)):
        planned, count = compare_tokens(precision, checkpointing)
        print(f"{precision},checkpointing={checkpointing!s:6} {planned:,.0f} / {count:,.0f}", flush=True)


if __name__ == "__main__":
    main()
