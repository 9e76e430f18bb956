"""A run on a CPU whose completions grow, in a process of its own, whose memory the system may limit.

python -m tests.helpers.growing REPORT [--limit MIB] [--layers N] [--hidden N] [--completions N] [option=value ...]

Writes what it needed to REPORT, as JSON.
"""

import argparse
import json
import logging
import resource
import tempfile
from pathlib import Path

import psutil
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.helpers.models import make_tokenizer


LENGTHS = [50, 500, 2000]
"""Tokens of the completions of each step."""
GROUP = 8
VOCABULARY = 40_000
"""So large that malloc maps the logits of a slice by themselves, as those of real models."""


def model_of(layers, hidden):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 3 * hidden}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    ends = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **ends))


def grown(prompts, trainer):
    """A rollout_func: completions of the length of this step; one in two is rewarded."""
    length = LENGTHS[trainer.state.global_step]
    rows = range(len(prompts))
    tokens = torch.randint(5, VOCABULARY, (len(prompts), length), generator=torch.Generator().manual_seed(length))
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": tokens.tolist(),
        "logprobs": None,
        "score": [float(row % 2) for row in rows],
    }


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def train(args, options):
    """Train a step for each length; return the trainer."""
    from grpo_trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model_of(args.layers, args.hidden),
        lambda score, **kwargs: score,
        GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=True,
            max_steps=len(LENGTHS),
            per_device_train_batch_size=args.completions,
            num_generations=GROUP,
            max_completion_length=max(LENGTHS),
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            **options,
        ),
        [{"prompt": "ab="}] * (args.completions // GROUP * len(LENGTHS)),
        processing_class=make_tokenizer(),
        rollout_func=grown,
    )
    if args.limit:  # what ulimit -v sets
        limit = psutil.Process().memory_info().vms + args.limit * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return trainer


def status(name):
    """Bytes that Linux reports for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("options", nargs="*")
    parser.add_argument("--limit", type=int, help="MiB that the process may take besides what it has before train()")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--completions", type=int, default=8)
    args = parser.parse_intermixed_args()
    options = {name: json.loads(value) for name, value in (option.split("=") for option in args.options)}
    log = Lines()
    logging.getLogger("grpo_trl").addHandler(logging.StreamHandler())
    logging.getLogger("grpo_trl").addHandler(log)
    trainer = train(args, options)
    before = psutil.Process().memory_info()
    from grpo_trl.free_memory import free_memory

    free = free_memory(torch.device("cpu"))
    trainer.train()
    packer = trainer._evaluator.packer
    report = {
        "free": free,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before.rss,
        "peak_address_space": status("VmPeak") - before.vms,
        "max_tokens": packer.max_tokens,
        "steps": trainer.state.global_step,
        "wanted": trainer._setup().micro_batch_tokens,
        "lines": log.lines,
        "grad_norm": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "seconds": [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry],
    }
    args.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
