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

from ...model_utils import ran_out_of_memory
from .cache import GroupCache
from .step import Step


logger = logging.getLogger(__name__)

LEAST_COLUMNS = 256
"""Columns are rounded up to the next power of two from this on; the kernels want a multiple of 16 at least."""
Call = Callable[[], Tensor]


@dataclass
class EagerSteps:
    """Calls the model."""

    model: Any
    cache: GroupCache

    def __call__(self, step: Step) -> tuple[Tensor, int]:
        """Logits of shape (R, V), and how many rows were computed for them."""
        rows = len(step.tokens_R)
        self.cache.now = step
        output = self.model(
            input_ids=step.tokens_R[:, None],
            position_ids=step.positions_R[:, None],
            use_cache=False,
            group_cache=self.cache,
        )
        return output.logits[:, 0], rows


class CudaRecorder:
    """Records what a call launches; the result launches it again, and returns the same memory.

    All recordings share one pool of memory: they never run at the same time, and what one leaves is read before the next.
    They share one stream too, since each stream that multiplies matrices holds a workspace of its own.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, call: Call) -> Call:
        """Raises:
        RuntimeError: The call cannot be recorded.
        """
        own = torch.cuda.current_stream()
        self._rehearse(call, own)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as those that watch collectives, may use the device meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = call()
        finally:
            torch.cuda.set_stream(own)  # where a failed recording would leave its own

        def launch() -> Tensor:
            graph.replay()
            return output

        return launch

    def _rehearse(self, call: Call, own: torch.cuda.Stream) -> None:
        """Call once without recording.

        What is made at the first call, such as autocast's copies, must not be recorded. A call that waits for the device
        cannot be: it fails here, where that costs nothing, since a recording that fails keeps its memory.
        """
        mode = torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(own)
        try:
            torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(self._stream):
                call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            own.wait_stream(self._stream)


@dataclass
class RecordedSteps:
    """Records steps and repeats them; once one cannot be recorded, it is `refused`, and steps are called one by one."""

    eager: EagerSteps
    record: Callable[[Call], Call]
    refused: bool = False
    _recorded: dict[tuple[int, ...], tuple[Step, Call]] = field(default_factory=dict)
    _group: int = 1
    """Most rows of a prompt so far: as rows end, further recordings would gain nothing."""
    _logits: Tensor | None = None
    """Where every recording leaves its logits, of shape (slots, V)."""

    def __call__(self, step: Step) -> tuple[Tensor, int]:
        """As `EagerSteps`. Steps with guesses are not recorded."""
        if step.guessed:
            return self.eager(step)
        padded = self._padded(step)
        rows, computed = len(step.tokens_R), len(padded.tokens_R)
        if self.refused or self._logits is None:
            logits, _ = self.eager(padded)
            self._logits = logits.new_empty(self.eager.cache.max_rows, logits.shape[1])
            return logits[:rows], computed
        key = (*padded.rows_NG.shape, computed, padded.prompt_columns, padded.columns)
        if key not in self._recorded:
            try:
                self._recorded[key] = padded, self.record(lambda: self._leave_logits(padded))
            except RuntimeError as error:
                if ran_out_of_memory(error):
                    raise
                logger.warning(
                    "Decoding steps cannot be recorded as CUDA graphs; they are launched one by one: %s", error
                )
                self.refused = True
                return self(step)
        static, launch = self._recorded[key]
        for tensor in fields(Step):
            if isinstance(new := getattr(padded, tensor.name), Tensor):
                getattr(static, tensor.name).copy_(new)
        return launch()[:rows], computed

    def _leave_logits(self, step: Step) -> Tensor:
        assert self._logits is not None
        logits, rows = self.eager(replace(step))  # with masks of its own
        return self._logits[:rows].copy_(logits)

    def _padded(self, step: Step) -> Step:
        """Rows, prompts and columns rounded up; further rows write into slots that no row is in.

        Where kernels read no more than what is there, one recording serves all prompts and columns.
        """
        cache = self.eager.cache
        rows = min(_rounded(len(step.tokens_R)), cache.max_rows)
        prompts, group = step.rows_NG.shape
        prompts = cache.max_prompts if cache.reads_by_length else min(_rounded(prompts), cache.max_prompts)
        columns = (
            cache.max_completion_tokens if cache.reads_by_length else max(LEAST_COLUMNS, _power_of_two(step.columns))
        )
        self._group = max(self._group, _rounded(group))

        missing = (0, self._group - group, 0, prompts - len(step.rows_NG))

        def pad(values: Tensor, size: int) -> Tensor:
            return torch.nn.functional.pad(values, (0, size - len(values)))

        return replace(
            step,
            tokens_R=pad(step.tokens_R, rows),
            positions_R=pad(step.positions_R, rows),
            lengths_R=pad(step.lengths_R, rows),
            rows_NG=torch.nn.functional.pad(step.rows_NG, missing, value=-1),
            prompt_R=pad(step.prompt_R, rows),
            place_R=pad(step.place_R, rows),
            row_R=torch.arange(rows, device=step.row_R.device),  # a further row writes where no row is
            prompt_lengths_N=pad(step.prompt_lengths_N, prompts),
            prompt_columns=cache.max_prompt_tokens,
            columns=min(columns, cache.max_completion_tokens),
        )


def _rounded(count: int) -> int:
    """The next power of two, or multiple of 64."""
    return _power_of_two(count) if count <= 64 else -(-count // 64) * 64


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
