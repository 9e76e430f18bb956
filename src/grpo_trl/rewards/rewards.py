"""All reward functions of a run and the one reward that they add up to.

Axes: B completions, F reward functions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from .call import EventLoop, FunctionReward, ModelReward, RewardBatch, RewardNotes


@dataclass(frozen=True)
class RewardTable:
    """What a batch of completions earned."""

    names: list[str]
    values_BF: Tensor
    """float64; NaN where a function returned None."""
    total_B: Tensor
    """Weighted sum of the functions that apply, float64; NaN where none does."""
    notes: RewardNotes


class Rewards:
    """Several reward functions with their weights.

    Args:
        reward_funcs: One or several of: a callable, sync or async; a sequence-classification model; the path or hub name
            of one.
        weights: One number per reward function; all 1 if None.
        processing_classes: The tokenizers of reward models, in the order of `reward_funcs`; None is loaded from the
            model's own path.
        model_init_kwargs: Passed to `from_pretrained` of reward models given as paths.
        chat_template_kwargs: Passed to `apply_chat_template` of reward models.
        batch_size: Completions per forward of a reward model.

    Raises:
        ValueError: No reward function, another number of weights or tokenizers than of reward functions, or a weight that
            is not finite.
        TypeError: A reward function that is none of the above.
    """

    def __init__(
        self,
        reward_funcs: Any,
        weights: Sequence[float] | None = None,
        processing_classes: Any = None,
        *,
        model_init_kwargs: dict[str, Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        batch_size: int = 8,
    ):
        funcs = _as_list(reward_funcs)
        if not funcs:
            raise ValueError("reward_funcs is empty; pass at least one reward function.")
        tokenizers = _as_list(processing_classes) or [None] * len(funcs)
        weights = [1.0] * len(funcs) if weights is None else list(weights)
        for name, values in (("reward_weights", weights), ("reward_processing_classes", tokenizers)):
            if len(values) != len(funcs):
                raise ValueError(f"{name} has {len(values)} entries for {len(funcs)} reward_funcs; give one for each.")
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"reward_weights={weights} must be finite numbers, e.g. {[1.0] * len(funcs)}.")
        self.weights_F = torch.tensor(weights, dtype=torch.float64)
        self.functions: list[FunctionReward | ModelReward] = []
        for func, tokenizer in zip(funcs, tokenizers, strict=True):
            if isinstance(func, str):
                func = AutoModelForSequenceClassification.from_pretrained(
                    func, num_labels=1, **(model_init_kwargs or {})
                )
            if isinstance(func, nn.Module):
                tokenizer = _reward_tokenizer(
                    func, tokenizer, (model_init_kwargs or {}).get("trust_remote_code", False)
                )
                self.functions.append(ModelReward(func, tokenizer, chat_template_kwargs or {}, batch_size))
            elif callable(func):
                self.functions.append(FunctionReward(func))
            else:
                raise TypeError(
                    f"A reward function is {func!r} ({type(func).__name__}); it must be a callable, a "
                    "sequence-classification model, or the path of one."
                )
        self.names = _distinct([function.name for function in self.functions])
        if taken := sorted({"prompt", "completion", "advantage", "step"} & set(self.names)):
            raise ValueError(
                f"A reward function is named {taken[0]!r}, as a column of the table is; rename the function."
            )
        self._event_loop = EventLoop()

    def prepare_models(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        """Replace each reward model by `prepare(model)`, which places it on its device."""
        for function in self.functions:
            if isinstance(function, ModelReward):
                function.model = prepare(function.model)

    def __call__(self, batch: RewardBatch) -> RewardTable:
        """Call every function on the batch: synchronous ones in turn, async ones at the same time.

        Raises:
            ValueError: A function returned the wrong number or type of values, or takes what nobody has.
        """
        notes = RewardNotes()
        values_BF = torch.full((len(batch.prompts), len(self.functions)), torch.nan, dtype=torch.float64)
        waiting = [(f, x) for f, x in enumerate(self.functions) if isinstance(x, FunctionReward) and x.is_async]
        for f, function in enumerate(self.functions):
            if not function.is_async:
                values_BF[:, f] = torch.tensor(function(batch, notes), dtype=torch.float64)
        if waiting:
            results = self._event_loop.run([function.call_async(batch, notes) for _, function in waiting])
            for (f, _), values in zip(waiting, results, strict=True):
                values_BF[:, f] = torch.tensor(values, dtype=torch.float64)
        return RewardTable(self.names, values_BF, self.total(values_BF), notes)

    def total(self, values_BF: Tensor) -> Tensor:
        """Weighted sum over the functions that apply to a completion; NaN where none does. Shape (B,), float64."""
        total_B = (values_BF * self.weights_F).nansum(1)
        return total_B.masked_fill(values_BF.isnan().all(1), torch.nan)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _distinct(names: list[str]) -> list[str]:
    """`["f", "g", "f"]` -> `["f", "g", "f_2"]`: two functions of one name must not share a metric."""
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts, strict=True)]


def _reward_tokenizer(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A classification head reads the last token that is not padding, which it finds by this id.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer
