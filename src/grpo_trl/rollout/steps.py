"""One decoding step as a call: of the model, or of its launches recorded as a CUDA graph.

A step of a small batch is a thousand kernels that each take less time than their launch. A graph launches them at once; it
has fixed shapes and fixed memory, so rows, prompts and columns are rounded up, and a graph is recorded for each
combination of these when it first occurs.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .cache import GroupCache, Step


logger = logging.getLogger(__name__)

COLUMNS = 256
"""Columns are rounded up to a multiple of this; the kernels want a multiple of 16 at least."""


@dataclass
class EagerSteps:
    """Calls the model."""

    model: Any
    cache: GroupCache

    def __call__(self, step: Step) -> tuple[Tensor, int]:
        """Logits of shape (R, V), and how many rows were computed for them."""
        self.cache.now = step
        output = self.model(
            input_ids=step.tokens_R[:, None],
            position_ids=step.positions_R[:, None],
            use_cache=False,
            group_cache=self.cache,
        )
        return output.logits[:, 0], len(step.tokens_R)


def _record_cuda(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record what `call` launches; the result launches it again, and returns the same memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made at the first call, such as autocast's copies, must not be recorded
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def launch() -> Tensor:
        graph.replay()
        return output

    return launch


@dataclass
class RecordedSteps:
    """Records steps and repeats them; goes on with `eager` once something cannot be recorded."""

    eager: EagerSteps
    record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] = _record_cuda
    _recorded: dict[tuple[int, ...], tuple[Step, Callable[[], Tensor]]] = field(default_factory=dict)
    _refused: bool = False

    def __call__(self, step: Step) -> tuple[Tensor, int]:
        """As `EagerSteps`."""
        if self._refused:
            return self.eager(step)
        padded = self._padded(step)
        key = (*padded.rows_NG.shape, len(padded.tokens_R), padded.prompt_columns, padded.columns)
        if key not in self._recorded:
            try:
                self._recorded[key] = padded, self.record(lambda: self.eager(replace(padded, _masks={}))[0])
            except RuntimeError as error:
                logger.warning(
                    "Decoding steps cannot be recorded as CUDA graphs and are launched one by one: %s", error
                )
                self._refused = True
                return self.eager(step)
        static, launch = self._recorded[key]
        for tensor in fields(Step):
            if isinstance(new := getattr(padded, tensor.name), Tensor):
                getattr(static, tensor.name).copy_(new)
        return launch()[: len(step.tokens_R)], len(padded.tokens_R)

    def _padded(self, step: Step) -> Step:
        """Rows, prompts and columns rounded up; further rows write into slots that no row is in."""
        cache = self.eager.cache
        rows = min(_rounded(len(step.tokens_R)), cache.max_rows)
        prompts, group = step.rows_NG.shape
        prompts, group_rounded = min(_rounded(prompts), cache.max_prompts), _rounded(group)
        prompt = step.place_R // group

        def pad(values: Tensor, size: int) -> Tensor:
            return torch.nn.functional.pad(values, (0, size - len(values)))

        return replace(
            step,
            tokens_R=pad(step.tokens_R, rows),
            positions_R=pad(step.positions_R, rows),
            lengths_R=pad(step.lengths_R, rows),
            rows_NG=torch.nn.functional.pad(step.rows_NG, (0, group_rounded - group, 0, prompts - len(step.rows_NG))),
            place_R=pad(prompt * group_rounded + step.place_R % group, rows),
            prompt_lengths_N=pad(step.prompt_lengths_N, prompts),
            prompt_columns=cache.max_prompt_tokens,
            columns=min(-(-step.columns // COLUMNS) * COLUMNS, cache.max_completion_tokens),
            _masks={},
        )


def _rounded(count: int) -> int:
    """The next power of two, or multiple of 64."""
    return 1 << (count - 1).bit_length() if count <= 64 else -(-count // 64) * 64
