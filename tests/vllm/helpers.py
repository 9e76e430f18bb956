"""What the tests of vLLM share: models that it serves, an oracle of their logprobs, and a real server."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from grpo_trl.rollout.base import RolloutRequest, SamplingOptions
from grpo_trl.rollout.vllm import VLLMEngine, VLLMServer
from tests.helpers.models import make_model, make_tokenizer


PROMPTS = [[5, 6, 7, 8, 9] * 40, [9, 10, 11], [12, 13]]  # the first fills a block of the prefix cache
OPTIONS = SamplingOptions(max_completion_length=12, pad_token_id=0, eos_token_ids=(1,), temperature=0.8)


def request(prompts=PROMPTS, num_generations=3, seed=1):
    return RolloutRequest(prompts, prompts, num_generations, [seed + 10 * place for place in range(len(prompts))])


def policy(tied: bool = True, lora: bool = False, seed: int = 0, **changes) -> PreTrainedModel | PeftModel:
    """Heads of 32, the smallest that vLLM serves on a CPU; seeds differ visibly."""
    model = make_model(seed=seed, hidden_size=128, tie_word_embeddings=tied, max_position_embeddings=512, **changes)
    if not lora:
        return model
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]))
    return adapted


def step(model, rate: float = 0.5) -> None:
    """One step of SGD that changes what the model says."""
    ids = torch.tensor([[*range(2, 40)]])
    torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None


@torch.no_grad()
def logps(model, prompt_ids: list[int], ids: list[int], temperature: float = OPTIONS.temperature) -> torch.Tensor:
    """The model's, by a plain forward."""
    logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1].double()
    return (logits / temperature).log_softmax(-1)[torch.arange(len(ids)), ids]


def largest_difference(model, completions) -> float:
    """Between the sampler's logprobs and the model's."""
    return max(
        float((logps(model, c.prompt_ids, c.ids) - torch.tensor(c.sampler_logps)).abs().max()) for c in completions
    )


def make_server_engine(server, model, folder: Path, **changes) -> VLLMEngine:
    return VLLMEngine(VLLMServer(server.url, timeout=120, folder=folder), model, OPTIONS, folder, **changes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real vLLM server in a process of its own."""

    def __init__(self, model, folder: Path, *arguments: str, tokenizer=None, max_model_length: int = 256):
        model.save_pretrained(folder)
        (tokenizer or make_tokenizer()).save_pretrained(folder)
        self.folder, self.port = folder, free_port()
        self.arguments = ["--max-model-len", str(max_model_length), *arguments]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder.parent / f"server-{self.port}.log"

    def start(self) -> None:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        command += ["--no-enable-chunked-prefill", "--logprobs-mode", "processed_logprobs", *self.arguments]
        environment = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True
            )

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @contextlib.contextmanager
    def running(self) -> Iterator["Server"]:
        self.start()
        try:
            yield self
        finally:
            self.stop()


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
