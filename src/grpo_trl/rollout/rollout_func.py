"""A user's `rollout_func` as an engine."""

import copy
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..types import Completion
from .base import Rollout, RolloutRequest


REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
MASK = "env_mask"


class RolloutFuncEngine:
    """Calls `rollout_func(prompts, trainer)`, with TRL's meaning, and checks what it returns.

    The function gets every prompt `num_generations` times in a row and returns a dict with one entry per row in
    `"prompt_ids"`, `"completion_ids"` (lists of token ids) and `"logprobs"` (the sampler's, one per completion token, or
    None). `"env_mask"`, if there, has a 1 for each completion token that the model wrote and a 0 for each that something
    else inserted. A completion has ended if its last token is one of `eos_token_ids`. All further keys are columns for
    the reward functions; a value that is no list stands in each row. It is called inside `interruptible()`: a signal may
    end it at any point.
    """

    in_process = False
    splits_groups = False

    def __init__(
        self,
        rollout_func: Callable[[list[Any], Any], dict[str, Any]],
        trainer: Any,
        eos_token_ids: tuple[int, ...],
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
        num_tokens: int | None = None,
    ):
        self.rollout_func = rollout_func
        self.trainer = trainer
        self.eos_token_ids = eos_token_ids
        self.interruptible = interruptible
        self.num_tokens = num_tokens
        """That the model has an embedding for; None if it does not say."""

    def rollout(self, request: RolloutRequest) -> Rollout:
        """Call the function and check what it returns.

        Raises:
            ValueError: The function returned something else than documented.
            TypeError: It returned no dict.
        """
        group = request.num_generations
        prompts = [copy.deepcopy(prompt) for prompt in request.prompts for _ in range(group)]  # its own to change
        with self.interruptible():
            output = self.rollout_func(prompts, self.trainer)
        if not isinstance(output, Mapping):
            hint = "; a function that is async cannot be awaited here" if inspect.isawaitable(output) else ""
            raise TypeError(
                f"rollout_func returned {type(output).__name__}; it must return a dict of {', '.join(REQUIRED)}{hint}."
            )
        columns = _columns(output, len(prompts), group)
        completions = [self._completion(output, row) for row in range(len(prompts))]
        _check_groups(completions, group)
        return Rollout(completions, columns)

    def _completion(self, output: dict[str, Any], row: int) -> Completion:
        prompt_ids, ids = (self._ids(output, key, row) for key in ("prompt_ids", "completion_ids"))
        if not prompt_ids:
            raise ValueError(f"rollout_func returned empty prompt_ids in row {row}; a prompt needs at least one token.")
        logps = None if output["logprobs"] is None else output["logprobs"][row]
        mask = [True] * len(ids) if output.get(MASK) is None else [bool(m) for m in output[MASK][row]]
        for key, values in (("logprobs", logps), (MASK, mask)):
            if values is not None and len(values) != len(ids):
                raise ValueError(
                    f"rollout_func returned {len(values)} {key} for the {len(ids)} tokens of completion_ids in row {row}; "
                    "it must return one for each."
                )
        return Completion(
            prompt_ids,
            ids,
            mask,
            ended=bool(ids) and ids[-1] in self.eos_token_ids,
            sampler_logps=None if logps is None else _finite(logps, mask, row),
        )

    def _ids(self, output: dict[str, Any], key: str, row: int) -> list[int]:
        ids, limit = [], self.num_tokens or math.inf
        for token in output[key][row]:
            try:
                ids.append(operator.index(token))
            except TypeError:
                ids.append(-1)
            if not 0 <= ids[-1] < limit:
                raise ValueError(
                    f"rollout_func returned {key!r} with {token!r} in row {row}, which is no token; one of the model is an "
                    f"integer from 0 to {limit - 1}."
                )
        return ids


def _columns(output: dict[str, Any], rows: int, group: int) -> dict[str, list[Any]]:
    """Return the further columns; a value that is not a list is repeated in each row."""
    missing = [key for key in REQUIRED if key not in output]
    if missing:
        raise ValueError(f"rollout_func returned no {', '.join(missing)}; it must return {', '.join(REQUIRED)}.")
    columns = {}
    for key, value in output.items():
        is_column = key not in (*REQUIRED, MASK)
        is_scalar = isinstance(value, str) or not hasattr(value, "__len__")
        if is_column and is_scalar:
            columns[key] = [value] * rows
            continue
        if value is not None and (is_scalar or len(value) != rows):
            got = type(value).__name__ if is_scalar else f"{len(value)} entries"
            raise ValueError(
                f"rollout_func returned {key!r} with {got} for {rows} prompts; it gets every prompt "
                f"num_generations={group} times in a row and must return one entry for each."
            )
        if is_column:
            columns[key] = value
    return columns


def _finite(logps: Any, mask: list[bool], row: int) -> list[float]:
    values = [float(x) for x in logps]
    if not all(math.isfinite(value) for value, trained in zip(values, mask, strict=True) if trained):
        raise ValueError(f"rollout_func returned logprobs with {values} in row {row}; they must be finite, or None.")
    return values


def _check_groups(completions: list[Completion], group: int) -> None:
    for row in range(0, len(completions), group):
        if any(c.prompt_ids != completions[row].prompt_ids for c in completions[row : row + group]):
            raise ValueError(
                f"rollout_func returned different prompt_ids for the {group} completions of one prompt (rows {row} "
                f"to {row + group - 1}); a group shares its prompt. Put what differs into completion_ids and mark it "
                f"in {MASK!r}."
            )
