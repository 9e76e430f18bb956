"""A run on a CPU whose completions grow, in a process of its own, whose memory the system may limit.

python -m tests.helpers.growing REPORT [--limit MIB] [option=value ...]

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

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.free_memory import free_memory
from tests.helpers.models import make_tokenizer
from tests.helpers.training import score


LENGTHS = [50, 500, 2000]
"""Tokens of the completions of each step."""
COMPLETIONS = 8
VOCABULARY = 20_000
"""So small that malloc does not map the logits of a slice by themselves, and keeps pieces of them."""
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def grown(prompts, trainer):
    """A rollout_func: completions of the length of this step; one in two is rewarded."""
    length = LENGTHS[trainer.state.global_step]
    noise = torch.Generator().manual_seed(length)
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": torch.randint(5, VOCABULARY, (len(prompts), length), generator=noise).tolist(),
        "logprobs": None,
        "score": [float(row % 2) for row in range(len(prompts))],
    }


def make_trainer(options):
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return GRPOTrainer(
        Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **SIZES, **ends)),
        score,
        GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=True,
            max_steps=len(LENGTHS),
            per_device_train_batch_size=COMPLETIONS,
            num_generations=COMPLETIONS,
            max_completion_length=max(LENGTHS),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            **options,
        ),
        [{"prompt": "ab="}] * len(LENGTHS),
        processing_class=make_tokenizer(),
        rollout_func=grown,
    )


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("options", nargs="*")
    parser.add_argument("--limit", type=int, help="MiB that the process may take besides what it has before train()")
    args = parser.parse_intermixed_args()
    log = Lines()
    logging.getLogger("grpo_trl").addHandler(log)
    trainer = make_trainer({name: json.loads(value) for name, value in (one.split("=") for one in args.options)})
    before = psutil.Process().memory_info()
    if args.limit:  # what ulimit -v sets
        resource.setrlimit(resource.RLIMIT_AS, (before.vms + args.limit * 2**20,) * 2)
    free = free_memory(torch.device("cpu"))
    trainer.train()
    report = {
        "free": free,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before.rss,
        "max_tokens": trainer._evaluator.packer.max_tokens,
        "wanted": trainer._setup().micro_batch_tokens,
        "lines": log.lines,
        "grad_norm": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "seconds": [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry],
    }
    args.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
