"""transformers' logits processors for rows of many lengths in one batch.

transformers calls a processor with rows of one length. Here a row has its own prompt and its own number of tokens, and rows
are processed together wherever a processor allows it:
- processors that look at logits alone take all rows as they are;
- those that count tokens (`min_new_tokens`, ...) become masks over the rows' lengths;
- the repetition penalty reads the set of a row's tokens, so that rows may be padded with tokens of their own;
- all others get the rows of one length at a time.

Axes: R rows, V vocabulary, L tokens of prompt and completion.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process

from .inverse_cdf import Narrowing


LOGITS_ONLY = tuple(
    getattr(logits_process, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "MinPLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
)
"""Processors that look at a row's logits and not at its tokens."""
NARROWING = (
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
)
"""Processors that `Narrowing` stands for where no other one that reads probabilities is among them."""
KEPT_LENGTHS = 64
"""Lengths of prompts whose processors are kept; some hold a number per token of the vocabulary."""


@dataclass(frozen=True)
class History:
    """The tokens of each row so far."""

    tokens_RL: Tensor
    """Prompt and completion, then any tokens of the same row."""
    prompt_lengths: list[int]
    lengths: list[int]
    """Of the completions."""

    def __getitem__(self, rows: slice) -> "History":
        return History(self.tokens_RL[rows], self.prompt_lengths[rows], self.lengths[rows])


Process = Callable[[Tensor, History], Tensor]


class Processors:
    """What `generation_config` does to the logits before a token is sampled.

    Args:
        lm: Its transformers.GenerationMixin says which processors a configuration means.
        config: What is asked for.
        max_completion_length: Tokens of a completion at most.
    """

    def __init__(self, lm: Any, config: GenerationConfig, max_completion_length: int):
        self._lm = lm
        self._config = config
        self._max_completion_length = max_completion_length
        self._made: dict[int, list[Any]] = {}
        first = self._of_prompt_length(1)
        self.narrowing = Narrowing()
        if all(isinstance(p, (logits_process.TemperatureLogitsWarper, *NARROWING)) for p in first if _is_warper(p)):
            self.narrowing = _narrowing_of(config)
            first = [p for p in first if not isinstance(p, NARROWING)]
        self._processes = [self._batched(p, type(p)) for p in first]
        self.reads_tokens = any(_reads_tokens(p) for p in first)
        """Whether `__call__` needs the rows' history."""
        self.only_temperature = all(isinstance(p, logits_process.TemperatureLogitsWarper) for p in first)
        """Whether scores are logits divided by the temperature, and nothing else."""

    def __call__(self, logits_RV: Tensor, history: History | None) -> Tensor:
        """The logits that tokens are sampled from, before `narrowing`."""
        for process in self._processes:
            logits_RV = process(logits_RV, history)  # type: ignore[arg-type]
        return logits_RV

    def _batched(self, processor: Any, kind: Any) -> Process:
        if kind in _COUNTING:
            return _COUNTING[kind](processor, self._max_completion_length)
        if kind is logits_process.RepetitionPenaltyLogitsProcessor:
            return _penalize_repetition(processor.penalty)
        if isinstance(processor, LOGITS_ONLY):
            return lambda logits_RV, history: processor(None, logits_RV)
        return lambda logits_RV, history: self._by_length(kind, logits_RV, history)

    def _by_length(self, kind: Any, logits_RV: Tensor, history: History) -> Tensor:
        scores_RV = torch.empty_like(logits_RV)
        rows_of: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, lengths in enumerate(zip(history.prompt_lengths, history.lengths, strict=True)):
            rows_of[lengths].append(row)
        for (prompt_length, length), rows in rows_of.items():
            (processor,) = [p for p in self._of_prompt_length(prompt_length) if type(p) is kind]
            read = history.tokens_RL[rows, : prompt_length + length]
            scores_RV[rows] = processor(read, logits_RV[rows])
        return scores_RV

    def _of_prompt_length(self, prompt_length: int) -> list[Any]:
        """transformers' processors for prompts of one length: where a completion begins counts from the prompt's start."""
        if prompt_length not in self._made:
            if len(self._made) == KEPT_LENGTHS:
                self._made.clear()
            config = copy.deepcopy(self._config)
            config.max_length = prompt_length + self._max_completion_length
            self._lm._prepare_special_tokens(config, device=self._lm.device)
            made = self._lm._get_logits_processor(config, input_ids_seq_length=prompt_length, device=self._lm.device)
            # a constant that is added to all logits of a row changes nothing
            self._made[prompt_length] = [p for p in made if not isinstance(p, logits_process.LogitNormalization)]
        return self._made[prompt_length]


def _narrowing_of(config: GenerationConfig) -> Narrowing:
    if not config.do_sample:
        return Narrowing()
    return Narrowing(
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
    )


def _is_warper(processor: Any) -> bool:
    """Whether it comes after the temperature, or is it."""
    return isinstance(processor, LOGITS_ONLY) and not isinstance(
        processor, logits_process.SuppressTokensLogitsProcessor
    )


def _reads_tokens(processor: Any) -> bool:
    return not isinstance(processor, LOGITS_ONLY)


def _penalize_repetition(penalty: float) -> Process:
    """As transformers' processor, which copies the logits three times."""

    def process(logits_RV: Tensor, history: History) -> Tensor:
        seen_RL = logits_RV.gather(1, history.tokens_RL)
        return logits_RV.scatter(1, history.tokens_RL, torch.where(seen_RL < 0, seen_RL * penalty, seen_RL / penalty))

    return process


# ---- Processors that count ----
def _among(logits_RV: Tensor, tokens: Tensor) -> Tensor:
    return torch.isin(torch.arange(logits_RV.shape[1], device=logits_RV.device), tokens.to(logits_RV.device))


def _forbid(tokens: Tensor, applies: Callable[[int, int], bool]) -> Process:
    """Without `tokens` in the rows whose lengths of prompt and completion it applies to."""

    def process(logits_RV: Tensor, history: History) -> Tensor:
        rows = list(map(applies, history.prompt_lengths, history.lengths))
        if not any(rows):
            return logits_RV
        row_R1 = torch.tensor(rows, device=logits_RV.device)[:, None]
        return logits_RV.masked_fill(row_R1 & _among(logits_RV, tokens), -torch.inf)

    return process


def _force(tokens: Tensor, applies: Callable[[int, int], bool]) -> Process:
    """Nothing but `tokens`, all equally probable, in the rows whose lengths of prompt and completion it applies to."""

    def process(logits_RV: Tensor, history: History) -> Tensor:
        rows = list(map(applies, history.prompt_lengths, history.lengths))
        if not any(rows):
            return logits_RV
        forced_V = torch.zeros_like(logits_RV[0]).masked_fill(~_among(logits_RV, tokens), -torch.inf)
        return torch.where(torch.tensor(rows, device=logits_RV.device)[:, None], forced_V, logits_RV)

    return process


def _raise_the_end(tokens: Tensor, start: int, factor: float) -> Process:
    """`tokens` more probable with each token of a completion from `start` on."""

    def process(logits_RV: Tensor, history: History) -> Tensor:
        factors = [factor ** max(0, n - start) - 1 for n in history.lengths]
        factor_R1 = torch.tensor(factors, dtype=logits_RV.dtype, device=logits_RV.device)[:, None]
        raised = _among(logits_RV, tokens) & logits_RV.isfinite()
        return torch.where(raised, logits_RV + logits_RV.abs() * factor_R1, logits_RV)

    return process


# Made by transformers for a prompt of one token, from which their counts start
_COUNTING: dict[Any, Callable[[Any, int], Process]] = {
    logits_process.MinLengthLogitsProcessor: lambda made, most: _forbid(
        made.eos_token_id, lambda p, n: p + n < made.min_length
    ),
    logits_process.MinNewTokensLengthLogitsProcessor: lambda made, most: _forbid(
        made.eos_token_id, lambda p, n: n < made.min_new_tokens
    ),
    logits_process.SuppressTokensAtBeginLogitsProcessor: lambda made, most: _forbid(
        made.begin_suppress_tokens, lambda p, n: n == (made.begin_index - 1 if p == 1 else 0)
    ),
    logits_process.ForcedBOSTokenLogitsProcessor: lambda made, most: _force(
        torch.tensor([made.bos_token_id]), lambda p, n: p + n == 1
    ),
    logits_process.ForcedEOSTokenLogitsProcessor: lambda made, most: _force(
        made.eos_token_id, lambda p, n: n == most - 1
    ),
    logits_process.ExponentialDecayLengthPenalty: lambda made, most: _raise_the_end(
        made.eos_token_id, made.regulation_start - 1, made.regulation_factor
    ),
}
"""From transformers' processor and the longest completion to what does the same for rows of any lengths."""
