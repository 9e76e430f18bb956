"""How the next token is drawn: from which distribution, with which noise, and when a completion ends.

What the options of sampling mean is transformers' business: its own logits processors and its own stop criterion are
called here. The noise is ours. A token takes one number in [0, 1), which follows from the seed of its prompt, the index
of its completion and its position and from nothing else, and finds the token by inverting the cumulative distribution.
So a completion depends neither on the rows beside it nor on how many there are.

Axes: R rows, V vocabulary, T completion tokens.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StopStringCriteria
from transformers.generation import logits_process

from ..model_utils import causal_lm
from .base import SamplingOptions


SERVED_KWARGS = frozenset(
    (
        "begin_suppress_tokens",
        "bad_words_ids",
        "do_sample",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "min_length",
        "min_new_tokens",
        "no_repeat_ngram_size",
        "renormalize_logits",
        "sequence_bias",
        "stop_strings",
        "suppress_tokens",
        "top_h",
        "typical_p",
    )
)
"""The further options of transformers.GenerationConfig that `Sampler` gives their meaning."""

BLIND_PROCESSORS = tuple(
    getattr(logits_process, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "LogitNormalization",
        "MinPLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
)
"""Logits processors that look at a row's logits and not at its tokens: rows of any length go through them together."""

KEPT_PROCESSORS = 64
"""Lengths of prompts whose logits processors are kept; some hold a number per token of the vocabulary."""
DRAWN_AT_A_TIME = 2**24
"""Probabilities that are held in float64 at a time."""


def unserved_option(options: SamplingOptions) -> str | None:
    """Why options need `model.generate`; None if they do not."""
    defaults = GenerationConfig._get_default_generation_params()
    others = sorted(
        name
        for name, value in options.generation_kwargs.items()
        if name not in SERVED_KWARGS and value is not None and value != defaults.get(name)
    )
    return f"generation_kwargs sets {', '.join(others)}" if others else None


def generation_config(options: SamplingOptions) -> GenerationConfig:
    """The options as transformers has them; nothing is left open for a model's own settings to fill in."""
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


def stop_strings(options: SamplingOptions, tokenizer: PreTrainedTokenizerBase | None) -> StopStringCriteria | None:
    """What ends a completion besides its end tokens.

    Raises:
        ValueError: There are stop strings and no tokenizer to find them with.
    """
    strings = options.generation_kwargs.get("stop_strings")
    if not strings:
        return None
    if tokenizer is None:
        raise ValueError(f"stop_strings={strings!r} are found by a tokenizer, and none was given; pass one.")
    return StopStringCriteria(tokenizer, strings)


@dataclass(frozen=True)
class Drawn:
    """The next token of each row, and its log-probabilities (nats, float64), each of shape (R,)."""

    tokens_R: Tensor
    logps_R: Tensor
    """The model's at the sampling temperature."""
    drawn_logps_R: Tensor
    """Of the distribution that the token was drawn from, e.g. after top-p."""


class Sampler:
    """Draws tokens.

    Args:
        model: Its transformers.GenerationMixin says which logits processors the options mean.
        options: How tokens are drawn. All of `generation_kwargs` are among `SERVED_KWARGS`.
    """

    def __init__(self, model: Any, options: SamplingOptions):
        self._lm: Any = causal_lm(model)
        self._options = options
        self._config = generation_config(options)
        self._processors: dict[tuple[int, torch.device], Any] = {}
        first = self._make_processors(1, self._lm.device)
        self._blind = all(isinstance(processor, BLIND_PROCESSORS) for processor in first)
        self._plain = all(isinstance(processor, logits_process.TemperatureLogitsWarper) for processor in first)

    def draw(
        self, logits_RV: Tensor, uniform_R: Tensor, prompts: Sequence[list[int]], written: Sequence[list[int]]
    ) -> Drawn:
        """One token per row.

        Args:
            logits_RV: The model's.
            uniform_R: Noise in [0, 1), float64; see `seeds.uniforms`.
            prompts: Token ids of each row's prompt.
            written: Token ids of each row's completion so far.
        """
        size = max(1, DRAWN_AT_A_TIME // logits_RV.shape[1])
        parts = [
            self._draw(logits_RV[i : i + size], uniform_R[i : i + size], prompts[i : i + size], written[i : i + size])
            for i in range(0, len(logits_RV), size)
        ]
        return Drawn(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _draw(
        self, logits_RV: Tensor, uniform_R: Tensor, prompts: Sequence[list[int]], written: Sequence[list[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        policy_RV = logits_RV if self._options.temperature == 1 else logits_RV / self._options.temperature
        scores_RV = policy_RV if self._plain else self._process(logits_RV, prompts, written)
        if not self._config.do_sample:
            tokens_R = scores_RV.argmax(-1)
            logps_R = _logps(policy_RV, tokens_R)
            return tokens_R, logps_R, torch.zeros_like(logps_R)
        shifted_RV = scores_RV - scores_RV.amax(-1, keepdim=True)
        mass_RV = shifted_RV.exp().cumsum(-1, dtype=torch.float64)
        total_R = mass_RV[:, -1]
        tokens_R = torch.searchsorted(mass_RV, (uniform_R * total_R)[:, None], right=True)[:, 0]
        tokens_R = tokens_R.clamp(max=mass_RV.shape[1] - 1)  # where logits are not finite
        drawn_logps_R = shifted_RV.gather(1, tokens_R[:, None])[:, 0].double() - total_R.log()
        logps_R = drawn_logps_R if self._plain else _logps(policy_RV, tokens_R)
        return tokens_R, logps_R, drawn_logps_R

    def _process(self, logits_RV: Tensor, prompts: Sequence[list[int]], written: Sequence[list[int]]) -> Tensor:
        """Logits after the processors. Those that read a row's tokens get rows of one length together, without padding."""
        if self._blind:
            unread_R1 = torch.zeros(len(logits_RV), 1, dtype=torch.long, device=logits_RV.device)
            return self._processors_of(1, logits_RV.device)(unread_R1, logits_RV)
        scores_RV = torch.empty_like(logits_RV)
        by_length: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, (prompt, ids) in enumerate(zip(prompts, written, strict=True)):
            by_length[len(prompt), len(ids)].append(row)
        for (prompt_length, _), rows in by_length.items():
            read = torch.tensor([prompts[row] + written[row] for row in rows], device=logits_RV.device)
            scores_RV[rows] = self._processors_of(prompt_length, logits_RV.device)(read, logits_RV[rows])
        return scores_RV

    def _processors_of(self, prompt_length: int, device: torch.device) -> Any:
        """For prompts of one length: where a completion begins and where it must end counts from the prompt's start."""
        key = prompt_length, device
        if key not in self._processors:
            if len(self._processors) == KEPT_PROCESSORS:
                self._processors.clear()
            self._processors[key] = self._make_processors(prompt_length, device)
        return self._processors[key]

    def _make_processors(self, prompt_length: int, device: torch.device) -> Any:
        config = copy.deepcopy(self._config)
        config.max_length = prompt_length + self._options.max_completion_length
        self._lm._prepare_special_tokens(config, device=device)
        return self._lm._get_logits_processor(config, input_ids_seq_length=prompt_length, device=device)


def _logps(logits_RV: Tensor, tokens_R: Tensor) -> Tensor:
    return logits_RV.gather(1, tokens_R[:, None])[:, 0].double() - logits_RV.logsumexp(-1).double()
