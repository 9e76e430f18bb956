"""What all benchmarks share: models, lengths, meters, and a child process per measured system."""

import ctypes
import json
import os
import random
import subprocess
import sys
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
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "heads": (12, 2),
        "vocab_size": 151936,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "heads": (4, 2)},
}


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

    def prompts(self, step: int) -> list[list[int]]:
        """Random token ids, others in each step."""
        source = random.Random(f"prompts {step}")
        return [[source.randrange(3, VOCABULARY) for _ in range(self.prompt_length)] for _ in range(self.num_prompts)]


def make_model(name: str) -> Any:
    """A Qwen2 with random weights."""
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


def make_tokenizer() -> Any:
    """One token per word, `t17` for 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2} | {f"t{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def ended_at(lengths: list[int]) -> Any:
    """Inside, the completions of this package's engine end at these lengths, and nowhere else."""
    from dataclasses import replace
    from unittest.mock import patch

    from grpo_trl.rollout.group.scheduler import Scheduler

    def limit_of(self: Any, row: Any) -> int:
        if not hasattr(self, "limits"):
            self.limits = {id(row): length for row, length in zip(self._rows, lengths, strict=False)}
            self.options = replace(self.options, eos_token_ids=())
        return min(self.limits[id(row)], self.options.max_completion_length)

    return patch.object(Scheduler, "_limit_of", limit_of)


class PeakMemory:
    """Bytes above what the process holds at the start: resident pages on a CPU, the allocator's on a GPU."""

    def start(self) -> None:
        import torch

        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")

    def stop(self) -> int:
        import torch

        return (torch.cuda.max_memory_allocated() if self.on_gpu else _status("VmHWM")) - self.before


class Meter:
    """From `start` (its first call) to `stop`: the time of each of the first steps, the peak memory of the one after.

    Memory is not that of a timed step, since giving free memory back before it costs the step time.
    """

    def __init__(self, timed_steps: int):
        self.timed_steps = timed_steps
        self.seconds: list[float] = []
        self.memory = PeakMemory()
        self.bytes = 0
        self.started: float | None = None

    def start(self) -> None:
        if self.started is not None:
            return
        if len(self.seconds) == self.timed_steps:
            self.memory.start()
        self.started = now()

    def stop(self) -> None:
        if self.started is None:
            return
        stopped = now()
        if len(self.seconds) == self.timed_steps:
            self.bytes = self.memory.stop()
        else:
            self.seconds.append(stopped - self.started)
        self.started = None


def _status(name: str) -> int:
    """Bytes that Linux reports for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def now() -> float:
    """Seconds, after the GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_child(script: str, *arguments: object) -> Any:
    """What `python script --child ...` prints as its last line, from JSON; a failure ends this process too."""
    done = subprocess.run([sys.executable, script, "--child", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
