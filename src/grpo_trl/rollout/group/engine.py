"""The engine that writes completions in process, a group at a time.

A prompt is computed once, and one copy of its keys and values serves all of its rows; a row that ends leaves the batch at
once; memory is allocated before the first token is drawn.
"""

import contextlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from ...attention.compatibility import ignored_window, incompatibility
from ...logging import EVERY_RANK, get_logger
from ...logprobs.verify import tolerance
from ...model_utils import attending_by, causal_lm, evaluation_mode
from ...types import Completion
from ..base import Rollout, RolloutRequest, SamplingOptions
from ..generate import GenerateEngine
from ..sampling import Sampler, stop_strings, unserved_option
from .cache import NAME, GroupCache
from .cpu_linear import packed_weights
from .cuda_graphs import CudaRecorder, EagerSteps, RecordedSteps
from .decoding import Decoding


logger = get_logger(__name__)

CHECKED_TOKENS = 4
"""Tokens of each completion that is compared with plain forwards at first."""
FREE_SHARE = 0.7
"""Share of the free memory that keys and values may take; the rest is for activations and logits."""
KERNEL_COLUMNS = 16
"""Columns of memory are a multiple of this, as kernels want it."""


class GroupEngine:
    """Samples with one copy of a prompt's keys and values for all of its completions.

    A completion follows from its prompt's seed and its place in the group, whatever else is in flight (up to rounding,
    which can decide between tokens that are nearly tied).

    What it cannot serve (a model, an option) is handed to `model.generate`, with one line in the log. Whether it can serve
    a model is decided by its configuration, and at the first call by comparing log-probabilities with plain forwards.

    Args:
        model: The unwrapped policy.
        options: How tokens are drawn.
        max_rows_in_flight: Completions that are decoded at a time, at most; fewer where memory is short. By default 256,
            on a CPU 128, where more gain little.
        tokenizer: Finds `stop_strings`.
        context: What the forward passes run in, e.g. the accelerator's autocast.
        mixed_precision: Whether that is half precision, whatever the weights are.
        gather: From a list of objects on this rank to the concatenated lists of all ranks, which decide together.
        show_progress: Draw a bar with completions and tokens/s.
        check: Called after each decoding step; may raise.
        in_step: Whether ranks wait for each other in every forward: sharded weights that `context` does not gather. Then
            `model.generate` writes all completions, since ranks would compute different numbers of steps here.
    """

    in_process = True

    def __init__(
        self,
        model: Any,
        options: SamplingOptions,
        *,
        max_rows_in_flight: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        mixed_precision: bool = False,
        gather: Callable[[list[Any]], list[Any]] = list,
        show_progress: bool = False,
        check: Callable[[], None] = lambda: None,
        in_step: bool = False,
    ):
        self.model = model
        self.options = options
        self.max_rows_in_flight = max_rows_in_flight
        self.context = context
        self.show_progress = show_progress
        self.check = check
        self._stop = stop_strings(options, tokenizer)
        self._mixed_precision = mixed_precision
        self._gather = gather
        self._generate = GenerateEngine(model, options, tokenizer, context, show_progress, check, in_step)
        self._bytes_per_token = 0
        """Of keys and values; 0 before the first rollout has measured it."""
        self._records = True
        """Whether decoding steps can be recorded, as far as is known."""
        self._reason: str | None = None
        sharded = "its weights are sharded, and ranks compute different numbers of steps" if in_step else None
        self._hand_over_if(sharded or unserved_option(options) or incompatibility(model))
        self._sampler = None if self._reason else Sampler(model, options)

    def rollout(self, request: RolloutRequest) -> Rollout:
        if not self._reason:
            # Entered once, and as often on every rank: ZeRO-3 gathers weights there
            with torch.no_grad(), self.context(), evaluation_mode(self.model):
                if not self._bytes_per_token:
                    self._hand_over_if(self._disagreement(request))
                if not self._reason:
                    rows = len(request.prompt_ids) * request.num_generations
                    with _Bar(rows, self.show_progress) as bar:

                        def on_tokens(tokens: int, ended: int) -> None:
                            bar.add(tokens, ended)
                            self.check()

                        return self._write(request, self.options, self._stop, self._sized_cache(request), on_tokens)
        return self._generate.rollout(request)

    def _write(
        self,
        request: RolloutRequest,
        options: SamplingOptions,
        stop: StopStringCriteria | None,
        cache: GroupCache,
        on_tokens: Callable[[int, int], None] = lambda tokens, ended: None,
    ) -> Rollout:
        assert self._sampler is not None
        eager = EagerSteps(self.model, cache)
        on_gpu = self.model.device.type == "cuda"
        recorded = RecordedSteps(eager, CudaRecorder(), refused=not self._records) if on_gpu else None
        decoding = Decoding(self.model, self._sampler, options, stop, request, cache, recorded or eager, on_tokens)
        with attending_by(self.model, NAME), packed_weights(self.model):
            completions = decoding.run()
        if recorded is not None:
            self._records = not recorded.refused
        return Rollout(completions, computed_tokens=decoding.computed)

    # ---- Memory ----
    def _sized_cache(self, request: RolloutRequest) -> GroupCache:
        """A cache for as many rows as the option says and memory holds.

        Raises:
            MemoryError: Not even one row fits.
        """
        most = self.max_rows_in_flight or (128 if self.model.device.type == "cpu" else 256)
        rows = min(most, len(request.prompt_ids) * request.num_generations)
        free = FREE_SHARE * _free_memory(self.model.device)
        wanted = self._cache_of(request, rows)
        while rows and self._bytes_of(cache := self._cache_of(request, rows)) > free:
            rows -= -(-rows // 16)
        if not rows:
            raise MemoryError(
                f"No completion of max_completion_length={self.options.max_completion_length} tokens fits into the "
                f"{free / 2**30:.2f} GiB that are free: a prompt of {wanted.max_prompt_tokens} tokens and one completion "
                f"need {self._bytes_of(self._cache_of(request, 1)) / 2**30:.2f} GiB of keys and values. Lower it, or "
                "shorten the prompts."
            )
        if rows < wanted.max_rows:
            logger.warning(
                "%d completions are decoded at a time instead of %d: their keys and values would take %.2f GiB, and %.2f "
                "are free for them. It takes longer; max_rows_in_flight=%d says so in advance.",
                rows,
                wanted.max_rows,
                self._bytes_of(wanted) / 2**30,
                free / 2**30,
                rows,
                extra=EVERY_RANK,
            )
        return cache

    def _cache_of(self, request: RolloutRequest, rows: int) -> GroupCache:
        longest = max(map(len, request.prompt_ids))
        # twice the prompts that fill the rows: a prompt keeps its slot until its last row has ended
        prompts = min(len(request.prompt_ids), 2 * -(-rows // request.num_generations))
        return GroupCache(rows, prompts, _columns(longest), _columns(max(1, self.options.max_completion_length - 1)))

    def _bytes_of(self, cache: GroupCache) -> int:
        tokens = cache.max_rows * cache.max_completion_tokens + cache.max_prompts * cache.max_prompt_tokens
        return tokens * self._bytes_per_token

    # ---- Whether it serves ----
    def _hand_over_if(self, reason: str | None) -> None:
        """Hand over to `model.generate` from now on if some rank has a reason to."""
        self._reason = next(filter(None, self._gather([reason])), None)
        if self._reason:
            logger.warning("Completions are written with model.generate, a prompt once for each: %s.", self._reason)

    def _disagreement(self, request: RolloutRequest) -> str | None:
        """Why what this engine says of its own tokens is not what the model says; None if it is.

        Prompts are continued by a few tokens; not all rows fit into flight. Measures the memory of a token too.
        """
        name = type(causal_lm(self.model)).__name__
        sample = _sample_of(request)
        # Nothing ends before its length, so that there are tokens to compare
        endless = replace(
            self.options,
            max_completion_length=min(CHECKED_TOKENS, self.options.max_completion_length),
            eos_token_ids=(),
        )
        cache = GroupCache(3, 2, _columns(max(map(len, sample.prompt_ids))), _columns(CHECKED_TOKENS))
        try:
            if reason := ignored_window(self.model):
                return reason
            completions = self._write(sample, endless, None, cache).completions
        except (FloatingPointError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model's own code raises where it is called in a new way
            return f"{name} cannot be decoded by groups ({type(error).__name__}: {error})"
        self._bytes_per_token = cache.bytes_per_token
        if not self._bytes_per_token:
            return f"{name} does not ask transformers' AttentionInterface for its attention"
        differences = [difference for c in completions for difference in self._differences(c)]
        mean = sum(differences) / len(differences)
        if mean <= tolerance(self.model, self._mixed_precision):
            return None
        return f"log-probabilities of {name} decoded by groups differ from plain ones by {mean:.2g} nats on average"

    def _differences(self, completion: Completion) -> list[float]:
        """Between the engine's and the model's log-probability of each token."""
        input_ids = torch.tensor([completion.prompt_ids + completion.ids], device=self.model.device)
        logits = self.model(input_ids=input_ids, use_cache=False).logits[0, len(completion.prompt_ids) - 1 : -1]
        log_probs = (logits.double() / self.options.temperature).log_softmax(-1)
        assert completion.sampler_logps is not None
        return [
            abs(log_probs[t, token].item() - logp)
            for t, (token, logp) in enumerate(zip(completion.ids, completion.sampler_logps, strict=True))
        ]


def _sample_of(request: RolloutRequest) -> RolloutRequest:
    """Two completions of the shortest prompt, and two of the longest."""
    order = sorted(range(len(request.prompt_ids)), key=lambda i: len(request.prompt_ids[i]))
    chosen = sorted({order[0], order[-1]})
    return RolloutRequest(
        prompts=[request.prompts[i] for i in chosen],
        prompt_ids=[request.prompt_ids[i] for i in chosen],
        num_generations=2,
        seeds=[request.seeds[i] for i in chosen],
    )


def _columns(tokens: int) -> int:
    return -(-tokens // KERNEL_COLUMNS) * KERNEL_COLUMNS


def _free_memory(device: torch.device) -> int:
    """Bytes that this process may count on."""
    if device.type != "cuda":
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class _Bar:
    """Completions that have ended, and tokens/s."""

    def __init__(self, rows: int, show: bool):
        self._bar = tqdm(total=rows, desc="sampling", unit="completion", leave=False, disable=not show, position=1)
        self._tokens = 0
        self._start = time.perf_counter()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *args: object) -> None:
        self._bar.close()

    def add(self, tokens: int, ended: int) -> None:
        self._tokens += tokens
        if not self._bar.disable:
            rate = self._tokens / (time.perf_counter() - self._start)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            self._bar.update(ended)
