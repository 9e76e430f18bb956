"""How the next token is sampled: from which distribution, with which noise, and when a completion ends.

What the options of sampling mean is transformers' business: its logits processors (`processors`) and its stop criterion are
called here. The noise is ours. A token takes one number in [0, 1), which follows from the seed of its prompt, the index
of its completion and its position and from nothing else, and finds the token by inverting the cumulative distribution
(`inverse_cdf`). So a completion depends neither on the rows beside it nor on how many there are.

Axes: R rows, V vocabulary, T completion tokens.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StopStringCriteria

from ..model_utils import causal_lm
from .base import SamplingOptions
from .inverse_cdf import logsumexp, sample_tokens, widened
from .processors import History, Processors


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

ELEMENTS_AT_A_TIME = {"cpu": 2**17, "cuda": 2**26}
"""Logits sampled from at a time: on a CPU they stay in its cache with their weights, on a GPU they bound the memory."""


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


class Sampler:
    """Samples tokens.

    Args:
        model: Its transformers.GenerationMixin says which logits processors the options mean.
        options: How tokens are sampled. All of `generation_kwargs` are among `SERVED_KWARGS`.
    """

    def __init__(self, model: Any, options: SamplingOptions):
        self._temperature = options.temperature
        config = generation_config(options)
        self._greedy = not config.do_sample
        self._processors = Processors(causal_lm(model), config, options.max_completion_length)

    @property
    def reads_tokens(self) -> bool:
        """Whether `sample` needs the rows' history."""
        return self._processors.reads_tokens

    @property
    def samples_from_policy(self) -> bool:
        """Whether tokens are sampled from the model's distribution at the sampling temperature, unchanged."""
        return self._processors.only_temperature and not self._processors.narrowing.narrows and not self._greedy

    def sample(
        self, logits_RV: Tensor, noise_R: Tensor, history: History | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token per row.

        Args:
            logits_RV: The model's.
            noise_R: Noise in [0, 1), float64; see `seeds.uniforms`.
            history: The rows' tokens so far; not needed where none are read.

        Returns:
            The tokens, their logprobs (nats, float64) under the model at the sampling temperature, and those of the
            distribution that they were sampled from.
        """
        size = max(1, ELEMENTS_AT_A_TIME.get(logits_RV.device.type, 2**24) // logits_RV.shape[1])
        parts = [
            self._sample(logits_RV[rows], noise_R[rows], history and history[rows])
            for rows in (slice(start, start + size) for start in range(0, len(logits_RV), size))
        ]
        tokens, logps, drawn_logps = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(logps), torch.cat(drawn_logps)

    def _sample(self, logits_RV: Tensor, noise_R: Tensor, history: History | None) -> tuple[Tensor, Tensor, Tensor]:
        as_they_are = self._processors.only_temperature
        if not as_they_are or self._temperature != 1:  # `sample_tokens` reads half precision as it is
            logits_RV = widened(logits_RV)
        policy_RV = logits_RV if self._temperature == 1 else logits_RV / self._temperature
        scores_RV = policy_RV if as_they_are else self._processors(logits_RV, history)
        if self._greedy:
            tokens_R = scores_RV.argmax(-1)
            lse_R = logsumexp(policy_RV)
            drawn_logps_R = torch.zeros_like(lse_R)
        else:
            tokens_R, lse_R, narrowed_lse_R = sample_tokens(scores_RV, noise_R, self._processors.narrowing)
            drawn_logps_R = _of(scores_RV, tokens_R) - narrowed_lse_R
            if not as_they_are:
                lse_R = torch.where(lse_R.isfinite(), logsumexp(policy_RV), lse_R)
        return tokens_R, _of(policy_RV, tokens_R) - lse_R, drawn_logps_R


def _of(scores_RV: Tensor, tokens_R: Tensor) -> Tensor:
    return scores_RV.gather(1, tokens_R[:, None])[:, 0].double()
