"""The rollout engine that samples with vLLM."""

import shutil
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel

from ...seeds import derive_seed
from ...types import Completion
from ..base import Rollout, RolloutRequest, SamplingOptions
from .client import Client, Sample
from .weights import adapter_weights, policy_weights, write_adapter


PROBES = 4
"""Prompts of a rank that a sync is checked with."""
PROBE_TOKENS = 16

SERVED_KWARGS = {"stop_strings": "stop", "min_new_tokens": "min_tokens"}
"""Further options of `transformers.GenerationConfig` that vLLM has too, and their names in `vllm.SamplingParams`."""


class VLLMEngine:
    """Samples with vLLM; token ids go in and come out.

    A completion's noise follows from its prompt's seed and its place in the group. Its tokens may still depend on what is
    sampled beside it, where rounding does: vLLM's kernels are not batch invariant by default.

    Args:
        client: Where vLLM is.
        model: The policy, unwrapped, whose weights are sent. With an adapter, the adapter is.
        options: How tokens are sampled.
        folder: Where adapters are written; vLLM reads them there.
        writes: Whether this rank writes adapters; others take part in gathering them.
        loads_base: Whether the weights under an adapter are sent once, before the first adapter.
        check_steps: Every so many syncs, and after the first, `probe` samples.
        regex: What completions must match.
        interruptible: Entered around sampling, which a signal may end at any point.
    """

    in_process = False
    splits_groups = False

    def __init__(
        self,
        client: Client,
        model: Any,
        options: SamplingOptions,
        folder: Path,
        *,
        writes: bool = True,
        loads_base: bool = False,
        check_steps: int = 100,
        regex: str | None = None,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._client = client
        self._model = model
        self._options = options
        self._folder = folder
        self._writes = writes
        self._base_missing = loads_base
        self._check_steps = check_steps
        self._interruptible = interruptible
        self._params = _sampling_params(options, regex)
        self._plain = options.samples_from_policy and regex is None
        self._syncs = 0
        self.max_model_length = client.max_model_length
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def sync_weights(self) -> None:
        """Send the policy to vLLM. A collective: ranks gather weights together where they are sharded."""
        self._syncs += 1
        if not isinstance(self._model, PeftModel):
            self._load_weights()
            return
        if self._base_missing:
            self._load_weights()
            self._base_missing = False
        weights = adapter_weights(self._model)
        folder = self._folder / f"adapter-{self._syncs}"
        if self._writes:
            write_adapter(self._model, weights, folder)
        self._client.load_adapter(folder)
        if self._writes:
            shutil.rmtree(self._folder / f"adapter-{self._syncs - 1}", ignore_errors=True)

    def rollout(self, request: RolloutRequest) -> Rollout:
        params = [self._params | {"n": request.num_generations, "seed": seed >> 1} for seed in request.seeds]
        with self._interruptible():
            sampled = self._client.generate(request.prompt_ids, params)
        completions = [
            _completion(ids, sample, self._plain)
            for ids, group in zip(request.prompt_ids, sampled, strict=True)
            for sample in group
        ]
        return Rollout(completions)

    def probe(self, request: RolloutRequest) -> list[Completion]:
        """Sample a few tokens from the model's own distribution, whatever the options truncate.

        Their `sampler_logps` are the trainer's if the last sync has worked. None after syncs that are not to be checked.
        """
        if self._syncs != 1 and self._syncs % self._check_steps:
            return []
        options = SamplingOptions(PROBE_TOKENS, 0, (), temperature=self._options.temperature)
        params = _sampling_params(options, None) | {"n": 1}
        prompts = request.prompt_ids[:PROBES]
        seeds = [derive_seed(seed, "probe") >> 1 for seed in request.seeds[:PROBES]]
        with self._interruptible():
            sampled = self._client.generate(prompts, [params | {"seed": seed} for seed in seeds])
        return [_completion(ids, sample, plain=True) for ids, (sample,) in zip(prompts, sampled, strict=True)]

    def close(self) -> None:
        """Give back what vLLM holds of this process, and remove the files that it was sent."""
        self._client.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _load_weights(self) -> None:
        weights = policy_weights(self._model)
        try:
            self._client.load_weights(weights)
        finally:
            for _ in weights:  # what is not sent is gathered all the same: other ranks wait for this one
                pass


def _sampling_params(options: SamplingOptions, regex: str | None) -> dict[str, Any]:
    """Under the names of `vllm.SamplingParams`; nothing is left open for a model's own settings to fill in."""
    unserved = sorted(options.generation_kwargs.keys() - SERVED_KWARGS.keys())
    if unserved:
        raise ValueError(
            f"generation_kwargs sets {', '.join(unserved)}, which use_vllm=True does not serve; it serves "
            f"{', '.join(SERVED_KWARGS)}."
        )
    params = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p or 0.0,
        "repetition_penalty": options.repetition_penalty,
        "max_tokens": options.max_completion_length,
        "stop_token_ids": list(options.eos_token_ids),
        "ignore_eos": True,  # the end tokens are ours, not those of the model's settings
        "logprobs": 0,
    }
    if regex is not None:
        params["structured_outputs"] = {"regex": regex}
    return params | {SERVED_KWARGS[name]: value for name, value in options.generation_kwargs.items()}


def _completion(prompt_ids: list[int], sample: Sample, plain: bool) -> Completion:
    return Completion(
        prompt_ids,
        sample.ids,
        [True] * len(sample.ids),
        ended=sample.ended,
        sampler_logps=sample.logps if plain else None,
        drawn_logps=sample.logps,
    )
