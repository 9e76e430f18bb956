"""The engine that samples completions in process, a group at a time.

A prompt is computed once, and one copy of its keys and values serves all of its rows; a row that ends leaves the batch at
once; memory is allocated before the first token is sampled.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import StopStringCriteria

from ...attention.compatibility import ignored_window, incompatibility
from ...attention.last_layer import reading_completions
from ...free_memory import free_memory
from ...logging import EVERY_RANK, get_logger
from ...logprobs.comparison import Comparison
from ...model_utils import attending_by, causal_lm, evaluation_mode, ran_out_of_memory
from ..base import Rollout, RolloutRequest, SamplingOptions, most_rows_in_flight
from ..generate import GenerateEngine
from ..sampling import Sampler, unserved_option
from .cache import NAME, GroupCache
from .comparison import MORE_TOKENS, TOKENS, compare, sample_options, sample_request
from .cuda_graphs import CudaRecorder, EagerSteps, RecordedSteps
from .fused_layers import laid_out
from .scheduler import Scheduler
from .speculation import SpeculativeScheduler


logger = get_logger(__name__)

FREE_SHARE = 0.7
"""Share of the free memory that keys, values and logits may take; the rest is for activations."""
LOGIT_BYTES = 3 * 4
"""Of one logit and what sampling makes of it."""
KERNEL_COLUMNS = 16
"""Columns of memory are a multiple of this, as kernels want it."""


class GroupEngine(GenerateEngine):
    """Samples with one copy of a prompt's keys and values for all of its completions.

    A completion follows from its prompt's seed and its place in the group, whatever else is in flight (up to rounding,
    which can decide between tokens that are nearly tied).

    What it cannot serve (a model, an option) is left to `GenerateEngine`, with one line in the log. Whether it can serve
    a model is decided by its configuration, and at the first call by comparing log-probabilities with plain forwards.
    Where ranks wait for each other in every forward (`in_step`: sharded weights that `context` does not gather), all
    completions are left to it, since ranks would compute different numbers of steps here.

    Args:
        model: The unwrapped policy.
        options: How tokens are sampled.
        mixed_precision: Whether `context` computes in half precision, whatever the weights are.
        speculative_ngrams: Tokens that must have occurred in a group before for the next ones to be guessed; 0: no guesses.
        others: As in `GenerateEngine`. Fewer rows are in flight than `max_rows_in_flight` where memory is short; `check` is
            called after each decoding step, and `gather` where ranks decide together.
    """

    def __init__(
        self,
        model: Any,
        options: SamplingOptions,
        *,
        mixed_precision: bool = False,
        speculative_ngrams: int = 0,
        **others: Any,
    ):
        super().__init__(model, options, **others)
        self.speculative_ngrams = speculative_ngrams
        self._mixed_precision = mixed_precision
        self._bytes_per_token = 0
        """Of keys and values; 0 before the first rollout has measured it."""
        self._records = True
        """Whether decoding steps can be recorded, as far as is known."""
        self._reason: str | None = None
        sharded = "its weights are sharded, and ranks compute different numbers of steps" if self.in_step else None
        self._hand_over_if(self._gather([sharded or unserved_option(options) or incompatibility(model)]))
        self._sampler = None if self._reason else Sampler(model, options)

    def rollout(self, request: RolloutRequest) -> Rollout:
        if not self._reason:
            # Entered once, and as often on every rank: ZeRO-3 gathers weights there
            with torch.no_grad(), self.context(), evaluation_mode(self.model):
                if not self._bytes_per_token:
                    self._decide_together(request)
                if not self._reason:
                    with self._served():
                        return self._sample_what_fits(request)
        return super().rollout(request)

    @contextlib.contextmanager
    def _served(self) -> Iterator[None]:
        """Inside, the model computes prompts and decoding steps in ways of its own."""
        with (
            attending_by(self.model, NAME),
            reading_completions(self.model),
            laid_out(self.model, free_memory(self.model.device)),
        ):
            yield

    def _sample_what_fits(self, request: RolloutRequest) -> Rollout:
        """Sample; where memory runs out, once more with half of the rows, which gives the same completions."""
        cache = self._sized_cache(request)
        while True:
            with _Bar(request.num_rows, self.show_progress(), self.check) as on_tokens:
                try:
                    return self._sample(request, self.options, self._stop, cache, on_tokens)
                except Exception as error:
                    if not ran_out_of_memory(error) or cache.max_rows == 1:
                        raise
            # outside of the handler, which holds what the failed attempt has allocated
            self.max_rows_in_flight = cache.max_rows // 2
            cache = self._cache_of(request, self.max_rows_in_flight)
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            logger.warning(
                "Memory ran out in sampling; it starts again, and continues, with %d completions at a time. "
                "max_rows_in_flight=%d avoids this.",
                cache.max_rows,
                cache.max_rows,
                extra=EVERY_RANK,
            )

    def _sample(
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
        parts = self.model, self._sampler, options, stop, request, cache, recorded or eager, on_tokens
        if self.speculative_ngrams and not self._sampler.reads_tokens:
            scheduler: Scheduler = SpeculativeScheduler(*parts, ngrams=self.speculative_ngrams)
        else:
            scheduler = Scheduler(*parts, lag=1 if on_gpu and stop is None and not self._sampler.reads_tokens else 0)
        completions = scheduler.run()
        if recorded is not None:
            self._records = not recorded.refused
        return Rollout(completions, computed_tokens=scheduler.computed)

    # ---- Memory ----
    def _sized_cache(self, request: RolloutRequest) -> GroupCache:
        """A cache for as many rows as the option says and memory holds.

        Raises:
            MemoryError: Not even one row fits.
        """
        most = most_rows_in_flight(self.max_rows_in_flight, self.model.device)
        rows = min(most, request.num_rows)
        free = FREE_SHARE * (free_memory(self.model.device) - self._bytes_of_casts())
        wanted = self._cache_of(request, rows)
        while rows and self._bytes_of(cache := self._cache_of(request, rows)) > free:
            rows -= -(-rows // 16)
        if not rows:
            raise MemoryError(
                f"No completion of max_completion_length={self.options.max_completion_length} tokens fits into the "
                f"{free / 2**30:.2f} GiB that are free: a prompt of {wanted.max_prompt_tokens} tokens and one completion "
                f"need {self._bytes_of(self._cache_of(request, 1)) / 2**30:.2f} GiB of keys, values and logits. Lower it, "
                "or shorten the prompts."
            )
        if rows < wanted.max_rows:
            logger.warning(
                "%d completions are decoded at a time instead of %d: their keys, values and logits would take %.2f GiB, "
                "and %.2f are free for them. It takes longer; max_rows_in_flight=%d avoids this.",
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
        # the last token's keys are never read; guesses that stand behind it go to its place
        held = self.options.max_completion_length - (not self.speculative_ngrams)
        return GroupCache(rows, prompts, _columns(longest), _columns(max(1, held)))

    def _bytes_of(self, cache: GroupCache) -> int:
        tokens = cache.max_rows * cache.max_completion_tokens + cache.max_prompts * cache.max_prompt_tokens
        logits = cache.max_rows * causal_lm(self.model).config.get_text_config().vocab_size
        return tokens * self._bytes_per_token + LOGIT_BYTES * logits

    def _bytes_of_casts(self) -> int:
        """Of the half-precision copies that autocast makes of float32 weights at the first step."""
        if not torch.is_autocast_enabled(self.model.device.type):
            return 0
        return sum(2 * p.numel() for p in self.model.parameters() if p.dtype == torch.float32 and p.ndim > 1)

    # ---- Whether it serves ----
    def _hand_over_if(self, reasons: list[str | None]) -> None:
        """Fall back to `model.generate` from now on if some rank has a reason to."""
        self._reason = next(filter(None, reasons), None)
        if self._reason:
            logger.warning("Completions are sampled with model.generate, a prompt once for each: %s.", self._reason)

    def _decide_together(self, request: RolloutRequest) -> None:
        """Compare with plain forwards on every rank; each rank gets here and back, whatever happens on one of them.

        Raises:
            RuntimeError: Another rank has met an error; a rank's own errors are raised as they are.
        """
        reason, error = None, None
        try:
            reason = self._disagreement(request)
        except Exception as met:
            error = met
        reports = self._gather([(reason, repr(error) if error else None)])
        if error is not None:
            raise error
        if failures := [text for _, text in reports if text]:
            raise RuntimeError(f"Another rank failed in its first round of sampling: {failures[0]}")
        self._hand_over_if([reason for reason, _ in reports])

    def _disagreement(self, request: RolloutRequest) -> str | None:
        """Why what this engine says of its own tokens is not what the model says; None if it is.

        Completions are compared once more, and more of them, before they disagree. Measures the memory of a token too.
        """
        name = type(causal_lm(self.model)).__name__
        try:
            if reason := ignored_window(self.model):
                return reason
            compared = self._compare(request, prompts=2, tokens=TOKENS)
            if compared is not None and not compared.agrees:
                compared = self._compare(request, prompts=4, tokens=MORE_TOKENS)
        except FloatingPointError:
            raise
        except Exception as error:  # whatever a model's own code raises where it is called in a new way
            if ran_out_of_memory(error):
                raise
            return f"{name} cannot be decoded by groups ({type(error).__name__}: {error})"
        if compared is None:
            return f"{name} does not ask transformers' AttentionInterface for its attention"
        if compared.agrees:
            return None
        return f"log-probabilities of {name} decoded by groups differ from plain ones by {compared}"

    def _compare(self, request: RolloutRequest, prompts: int, tokens: int) -> Comparison | None:
        """None if the cache saw no keys. Not all rows fit into flight, so that slots change hands."""
        sample = sample_request(request, prompts)
        options = sample_options(self.model, self.options, tokens)
        longest = max(map(len, sample.prompt_ids))
        cache = GroupCache(3, prompts, _columns(longest), _columns(options.max_completion_length))
        with self._served():
            completions = self._sample(sample, options, None, cache).completions
        self._bytes_per_token = cache.bytes_per_token
        if not self._bytes_per_token:
            return None
        return compare(self.model, completions, options.temperature, self._mixed_precision)


def _columns(tokens: int) -> int:
    return -(-tokens // KERNEL_COLUMNS) * KERNEL_COLUMNS


class _Bar:
    """Completions that have ended, and tokens/s. Called after each step, where `check` may raise."""

    def __init__(self, rows: int, show: bool, check: Callable[[], None]):
        self._bar = tqdm(total=rows, desc="sampling", unit="completion", leave=False, disable=not show, position=1)
        self._check = check
        self._tokens = 0
        self._start = time.perf_counter()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *args: object) -> None:
        self._bar.close()

    def __call__(self, tokens: int, ended: int) -> None:
        self._tokens += tokens
        if not self._bar.disable:
            rate = self._tokens / (time.perf_counter() - self._start)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            self._bar.update(ended)
        self._check()
