"""The engine that calls `model.generate`.

It prefills a prompt once per completion, and reports no sampler log-probabilities: `generate` would have to hold the
scores of all steps for them.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..policy import Completion, evaluation_mode
from .base import Rollout, RolloutRequest, SamplingOptions


class GenerateEngine:
    """Samples with `model.generate`, under a seed, without touching the model's own generation settings.

    Args:
        model: The unwrapped policy.
        options: How tokens are drawn.
        context: What the forward passes run in, e.g. the accelerator's autocast.
        show_progress: Draw a bar with the decoding steps and tokens/s.
    """

    def __init__(
        self,
        model: Any,
        options: SamplingOptions,
        context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        show_progress: bool = False,
    ):
        self.model = model
        self.options = options
        self.context = context
        self.show_progress = show_progress

    def rollout(self, request: RolloutRequest) -> Rollout:
        rows = [ids for ids in request.prompt_ids for _ in range(request.num_generations)]
        input_ids, attention_mask = _left_pad(rows, self.options.pad_token_id, self.model.device)
        bar = _DecodingBar(self.options, len(rows), disable=not self.show_progress)
        unchanged = _as_it_was(self.model, request.seed, self._generation_config())
        with unchanged, torch.no_grad(), self.context(), contextlib.closing(bar):
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                stopping_criteria=StoppingCriteriaList([bar]),
            )
        written = output[:, input_ids.shape[1] :].tolist()
        return Rollout([self._completion(prompt, ids) for prompt, ids in zip(rows, written, strict=True)])

    def _completion(self, prompt_ids: list[int], ids: list[int]) -> Completion:
        end = next((t + 1 for t, token in enumerate(ids) if token in self.options.eos_token_ids), len(ids))
        return Completion(prompt_ids, ids[:end], [True] * end)

    def _generation_config(self) -> GenerationConfig:
        options = self.options
        settings = {
            "do_sample": True,
            "max_new_tokens": options.max_completion_length,
            "pad_token_id": options.pad_token_id,
            "eos_token_id": list(options.eos_token_ids),
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "min_p": options.min_p,
            "repetition_penalty": options.repetition_penalty,
            "disable_compile": True,
        }
        return GenerationConfig(**(settings | options.generation_kwargs))


class _DecodingBar(StoppingCriteria):
    """Never stops anything: `generate` calls it once per decoding step, which moves a progress bar."""

    def __init__(self, options: SamplingOptions, rows: int, disable: bool):
        self.eos = torch.tensor(options.eos_token_ids)
        self.rows = rows
        self.finished: Tensor | None = None
        self.tokens = 0
        self.start = time.perf_counter()
        self.bar = tqdm(
            total=options.max_completion_length, desc="sampling", unit="token", leave=False, disable=disable, position=1
        )

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        if not self.bar.disable:
            if self.finished is None:
                self.finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
                self.eos = self.eos.to(input_ids.device)
            self.tokens += int((~self.finished).sum())
            self.finished |= torch.isin(input_ids[:, -1], self.eos)
            rate = self.tokens / (time.perf_counter() - self.start)
            running = self.rows - int(self.finished.sum())
            self.bar.set_postfix_str(f"{running}/{self.rows} running, {rate:,.0f} tokens/s", refresh=False)
            self.bar.update(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def close(self) -> None:
        self.bar.close()


def _left_pad(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both of shape (rows, longest), padded on the left."""
    longest = max(map(len, rows))
    input_ids = torch.tensor([[pad_token_id] * (longest - len(ids)) + ids for ids in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=device)
    return input_ids, mask


@contextlib.contextmanager
def _as_it_was(model: Any, seed: int, generation_config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, a seeded random state and `generation_config` inside; all as it was after."""
    # The model's own settings would fill in whatever ours leave open: a top_p, a list of suppressed tokens. A PeftModel
    # hands its settings to the model inside, so that they are replaced wherever a module holds some.
    settings: dict[Any, Any] = {m: m.generation_config for m in model.modules() if "generation_config" in vars(m)}
    devices = [model.device] if model.device.type != "cpu" else []
    try:
        forked = torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda")
        with forked, evaluation_mode(model):
            torch.manual_seed(seed)
            for module in settings:
                module.generation_config = generation_config
            yield
    finally:
        for module, own in settings.items():
            module.generation_config = own
