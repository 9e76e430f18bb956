"""Calling one reward function or reward model, and checking what it returns."""

import asyncio
import functools
import inspect
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@dataclass
class RewardNotes:
    """What reward functions log: columns of the completions table, and values that are averaged into metrics."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column to the completions table; one value per completion of the call."""
        self.columns[column].extend(values)

    def log_metric(self, name: str, value: float) -> None:
        """Log a number; it is averaged over calls and ranks until the next log."""
        self.metrics[name].append(float(value))


@dataclass(frozen=True)
class RewardBatch:
    """What reward functions see, one entry per completion: prompts and completions as text (or lists of messages), token
    ids, and the dataset's other columns."""

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    trainer_state: Any = None

    def arguments(self, notes: RewardNotes) -> dict[str, Any]:
        """Keyword arguments of a reward function. A column never hides one of the trainer's own names."""
        return self.columns | {
            "prompts": self.prompts,
            "completions": self.completions,
            "completion_ids": self.completion_ids,
            "trainer_state": self.trainer_state,
            "log_extra": notes.log_extra,
            "log_metric": notes.log_metric,
        }


class FunctionReward:
    """A callable, sync or async, that takes what it names of `RewardBatch.arguments` (all of it with `**kwargs`)."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.name = _callable_name(function)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - an object whose __call__ is a coroutine function
        )

    def __call__(self, batch: RewardBatch, notes: RewardNotes) -> list[float]:
        """Rewards in the order of the batch; NaN where the function returned None."""
        returned = self.function(**self._select(batch.arguments(notes)))
        return self._checked(returned, len(batch.prompts))

    async def call_async(self, batch: RewardBatch, notes: RewardNotes) -> list[float]:
        returned = await self.function(**self._select(batch.arguments(notes)))
        return self._checked(returned, len(batch.prompts))

    def _select(self, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            parameters = inspect.signature(self.function).parameters
        except ValueError:  # some built-in callables have no signature
            return arguments
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return arguments
        required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
        missing = [name for name in required if name not in arguments]
        if missing:
            raise ValueError(
                f"The reward function {self.name!r} takes {', '.join(missing)}, which neither the dataset nor the trainer "
                f"has; it may take {', '.join(sorted(arguments))}, or **kwargs."
            )
        return {name: value for name, value in arguments.items() if name in parameters}

    def _checked(self, returned: Any, count: int) -> list[float]:
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, (list, tuple)):
            raise ValueError(
                f"The reward function {self.name!r} returned {type(returned).__name__}; it must return a list with one "
                "number, or None, per completion."
            )
        if len(values) != count:
            raise ValueError(
                f"The reward function {self.name!r} returned {len(values)} values for {count} completions; it must return "
                "one number, or None, per completion."
            )
        return [self._number(value, row) for row, value in enumerate(values)]

    def _number(self, value: Any, row: int) -> float:
        if value is None:
            return math.nan
        if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
            value = value.item()
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(
                f"The reward function {self.name!r} returned {value!r} ({type(value).__name__}) for completion {row}; it "
                "must return a finite number, or None where it does not apply."
            )
        return float(value)


class ModelReward:
    """A sequence-classification model with one label; its logit is the reward.

    Args:
        model: The reward model.
        tokenizer: Its tokenizer, with a pad token.
        chat_template_kwargs: Passed to the tokenizer's `apply_chat_template` for conversational prompts.
        batch_size: Completions per forward.
    """

    is_async = False

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: dict[str, Any],
        batch_size: int,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs
        self.batch_size = batch_size
        self.name = model.config._name_or_path.rstrip("/").split("/")[-1] or type(model).__name__

    @torch.no_grad()
    def __call__(self, batch: RewardBatch, notes: RewardNotes) -> list[float]:
        texts = [self._text(p, c) for p, c in zip(batch.prompts, batch.completions, strict=True)]
        device = next(self.model.parameters()).device
        rewards: list[float] = []
        self.model.eval()
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                texts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            ).to(device)
            rewards += self.model(**inputs).logits[:, 0].double().tolist()
        return rewards

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        return str(self.tokenizer.apply_chat_template(prompt + completion, tokenize=False, **self.chat_template_kwargs))


class EventLoop:
    """An event loop in a thread of its own, started at the first use, for reward functions that are coroutines.

    It outlives a call, so that clients which a function keeps open stay usable, and does not collide with a notebook's.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutines: Sequence[Coroutine[Any, Any, list[float]]]) -> list[list[float]]:
        """Await all at the same time; their results in the order given."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="grpo_trl-rewards", daemon=True).start()

        async def gather() -> list[list[float]]:
            return await asyncio.gather(*coroutines)

        return asyncio.run_coroutine_threadsafe(gather(), self._loop).result()


def _callable_name(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        return _callable_name(function.func)
    return getattr(function, "__name__", type(function).__name__)
