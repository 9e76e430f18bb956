"""All reward functions of a run and the one reward that they add up to.

Axes: B completions, F reward functions.
"""

import asyncio
import itertools
import sys
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..logging import get_logger
from ..seeds import keeping_random_state
from .batch import RewardBatch, RewardLogs
from .call import FunctionReward
from .event_loop import EVENT_LOOP
from .failures import FailureReport, OnError, RewardCall, RewardCallTracker
from .models import ModelReward, check_reward_model, load_reward_model, reward_tokenizer
from .pool import Phase, RewardPool


logger = get_logger(__name__)


@dataclass(frozen=True)
class RewardTable:
    """Rewards of a batch of completions."""

    names: list[str]
    values_BF: Tensor
    """float64; NaN where a function returned None or failed."""
    total_B: Tensor
    """Weighted sum of the functions that apply, float64; NaN where none does, or where one that has a weight failed."""
    logs: RewardLogs
    failed_BF: Tensor
    """bool; True where the function failed on the completion."""
    watching: frozenset[str] = frozenset()
    """Functions whose weight is 0."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why each function that failed did, at first."""

    @property
    def failures(self) -> dict[str, int]:
        """Number of completions that each function failed on, without functions that only watch."""
        counts = dict(zip(self.names, self.failed_BF.sum(0).tolist(), strict=True))
        return {name: count for name, count in counts.items() if name not in self.watching}


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
        workers: Processes that call the functions that can be pickled; 0 to call all in this process.
        timeout: Time limit in seconds for a call in a worker or of an async function.
        retries: How often a failed call is retried before it is divided.
        memory_limit: Bytes of data per worker; None for no limit.
        on_error: "exclude" leaves the total of a completion undefined if a function failed on it; "raise" raises.

    Raises:
        ValueError: No reward function, or another number of weights or tokenizers than of reward functions.
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
        workers: int = 0,
        timeout: float | None = None,
        retries: int = 0,
        memory_limit: int | None = None,
        on_error: OnError = "exclude",
    ):
        funcs = _as_list(reward_funcs)
        if not funcs:
            raise ValueError("reward_funcs is empty; pass at least one reward function.")
        weights = [1.0] * len(funcs) if weights is None else _one_each("reward_weights", weights, funcs)
        tokenizers = _one_each("reward_processing_classes", _as_list(processing_classes) or [None] * len(funcs), funcs)
        self.weights_F = torch.tensor(weights, dtype=torch.float64)
        if not self.weights_F.any():
            logger.warning("reward_weights=%s are all 0: every reward is 0, and nothing is learned from it.", weights)
        make = partial(_reward, model_init_kwargs or {}, chat_template_kwargs or {}, batch_size)
        self.functions = list(map(make, funcs, tokenizers))
        self.names = _distinct([function.name for function in self.functions])
        if taken := sorted({"prompt", "completion", "advantage", "step"} & set(self.names)):
            raise ValueError(
                f"A reward function is named {taken[0]!r}, as a column of the table is; rename the function."
            )
        self.retries = retries
        self.timeout = timeout
        self._report = FailureReport(on_error)
        self._pool = RewardPool(workers, timeout, memory_limit) if workers else None

    def prepare_models(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        """Replace each reward model by `prepare(model)`, which places it on its device."""
        for function in self.functions:
            if isinstance(function, ModelReward):
                function.model = prepare(function.model)

    def check_columns(self, columns: Collection[str], dataset: str = "the dataset") -> None:
        """Refuse functions that cannot be called with these columns of `dataset`.

        Raises:
            ValueError: See `FunctionReward.check_columns`.
        """
        for function in self.functions:
            if isinstance(function, FunctionReward):
                function.check_columns(columns, dataset)

    @property
    def may_log_metrics(self) -> bool:
        """Whether some function is passed `log_metric`."""
        return any(isinstance(one, FunctionReward) and one.takes("log_metric") for one in self.functions)

    def close(self) -> None:
        """End the workers. A later call starts others."""
        if self._pool:
            self._pool.close()

    def __call__(self, batch: RewardBatch, phase: Phase = nullcontext) -> RewardTable:
        """Call every function on the batch: in the workers first, then the rest here, synchronous functions one by one
        and async ones concurrently.

        Args:
            batch: The completions.
            phase: Entered around each wait with the names of the functions that it waits for.

        Raises:
            ValueError: A function takes what nobody has, or a result of it is wrong as a whole.
            RewardError: A function failed on a completion, with `on_error="raise"`.
        """
        self.check_columns(batch.columns)
        trackers = self._trackers(batch)
        self._fill(trackers, phase)
        return self._table(trackers)

    def in_workers(self, batch: RewardBatch, phase: Phase = nullcontext) -> RewardTable | None:
        """Call every function in the workers; None, and nothing is called here, if one of them cannot be called there.

        Unlike `__call__`, it does not touch what belongs to this process, and may run in any thread, alone.

        Raises:
            ValueError, RewardError: See `__call__`.
        """
        trackers = self._trackers(batch)
        if self._pool is None or not all(map(self._pool.serves, trackers)) or self._pool.run(trackers, phase):
            return None
        return self._table(trackers)

    def _table(self, trackers: list[RewardCallTracker]) -> RewardTable:
        logs = RewardLogs()
        columns = []
        for tracker in trackers:
            values, own_logs = tracker.close()
            columns.append(values)
            logs.add(own_logs)
        values_BF = torch.tensor(columns, dtype=torch.float64).T.contiguous()
        failed_BF = torch.tensor([tracker.failed for tracker in trackers]).T.contiguous()
        watching = frozenset(tracker.name for tracker in trackers if tracker.watches)
        reasons = {tracker.name: tracker.reason for tracker in trackers if tracker.reason}
        total_B = self.total(values_BF, failed_BF)
        return RewardTable(self.names, values_BF, total_B, logs, failed_BF, watching, reasons)

    def of_nothing(self) -> RewardTable:
        """Return the rewards of no completion."""
        none_BF = torch.zeros(0, len(self.functions), dtype=torch.float64)
        return RewardTable(self.names, none_BF, none_BF.sum(1), RewardLogs(), none_BF.bool())

    def total(self, values_BF: Tensor, failed_BF: Tensor) -> Tensor:
        """Add up the weighted values of the functions that apply to a completion. Shape (B,), float64.

        NaN where no function applies, and where one failed: the sum of the others would not be comparable. Functions
        whose weight is 0 only watch, unless all do.
        """
        applies_F = (self.weights_F != 0) | (self.weights_F == 0).all()
        total_B = (values_BF * self.weights_F).nansum(1)
        mask_undefined_B = values_BF[:, applies_F].isnan().all(1) | (failed_BF & (self.weights_F != 0)).any(1)
        return total_B.masked_fill(mask_undefined_B, torch.nan)

    def _trackers(self, batch: RewardBatch) -> list[RewardCallTracker]:
        return [
            RewardCallTracker(
                name,
                function,
                batch,
                self.retries,
                self._report,
                watches=weight == 0,
                largest=sys.float_info.max / max(1.0, abs(weight)) / len(self.functions),
            )
            for name, function, weight in zip(self.names, self.functions, self.weights_F.tolist(), strict=True)
        ]

    def _fill(self, trackers: list[RewardCallTracker], phase: Phase) -> None:
        left = self._pool.run(trackers, phase) if self._pool else trackers
        for tracker in itertools.filterfalse(_is_async, left):
            with phase(tracker.name), keeping_random_state():
                _call_here(tracker)
        if waiting := list(filter(_is_async, left)):
            with phase(", ".join(tracker.name for tracker in waiting)), keeping_random_state():
                EVENT_LOOP.run([self._await(tracker, call) for tracker in waiting for call in tracker.calls()])

    async def _await(self, tracker: RewardCallTracker, call: RewardCall) -> None:
        """Make a call of an async function; if it fails, make the calls that replace it, all at the same time."""
        try:
            outcome = await asyncio.wait_for(tracker.function.call_async(tracker.batch.part(call.rows)), self.timeout)
        except Exception as error:
            outcome = error
        await asyncio.gather(*(self._await(tracker, further) for further in tracker.record(call, outcome)))


def _call_here(tracker: RewardCallTracker) -> None:
    """Make all calls of a synchronous function in this process."""
    queue = deque(tracker.calls())
    while queue:
        call = queue.popleft()
        try:
            outcome = tracker.function(tracker.batch.part(call.rows))
        except Exception as error:
            outcome = error
        queue.extend(tracker.record(call, outcome))


def _is_async(tracker: RewardCallTracker) -> bool:
    return isinstance(tracker.function, FunctionReward) and tracker.function.is_async


def _reward(
    init_kwargs: dict[str, Any], chat_template_kwargs: dict[str, Any], batch_size: int, func: Any, tokenizer: Any
) -> FunctionReward | ModelReward:
    """Return what calls `func`, with the reward model and its tokenizer loaded."""
    if isinstance(func, str):
        func = load_reward_model(func, init_kwargs)
    if isinstance(func, nn.Module):
        check_reward_model(func)
        tokenizer = reward_tokenizer(func, tokenizer, init_kwargs.get("trust_remote_code", False))
        return ModelReward(func, tokenizer, chat_template_kwargs, batch_size)
    if callable(func):
        return FunctionReward(func)
    raise TypeError(
        f"A reward function is {func!r} ({type(func).__name__}); it must be a callable, a sequence-classification model, "
        "or the path of one."
    )


def _one_each(name: str, values: Sequence[Any], funcs: list[Any]) -> list[Any]:
    if len(values) != len(funcs):
        raise ValueError(f"{name} has {len(values)} entries for {len(funcs)} reward_funcs; the numbers must match.")
    return list(values)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _distinct(names: list[str]) -> list[str]:
    """Number the names that occur twice: `["f", "g", "f"]` -> `["f", "g", "f_2"]`, so that no two share a metric."""
    distinct: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        distinct.append(next(c for c in candidates if c not in distinct and (c == name or c not in names)))
    return distinct
