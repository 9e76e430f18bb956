"""A generation batch being written: which rows are in flight, which wait, and one forward after the other.

Axes: R rows in flight, N prompts in flight, G most rows of a prompt, V vocabulary.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StopStringCriteria

from ...attention.layout import Layout
from ...seeds import uniforms
from ...types import Completion
from ..base import RolloutRequest, SamplingOptions
from ..sampling import Sampler
from .cache import GroupCache, Prefill, Step


PREFILL_TOKENS = 4096
"""Tokens that one prefill computes at most, if more than one prompt is in it."""


@dataclass(eq=False)
class _Prompt:
    ids: list[int]
    waiting: deque["_Row"] = field(default_factory=deque)
    in_flight: int = 0
    slot: int = -1
    logits_V: Tensor | None = None
    """Of the first token; held until the last row has drawn it."""


@dataclass(eq=False)
class _Row:
    prompt: _Prompt
    noise: np.ndarray
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    drawn_logps: list[float] = field(default_factory=list)
    ended: bool = False

    def completion(self) -> Completion:
        return Completion(
            self.prompt.ids,
            self.ids,
            [True] * len(self.ids),
            ended=self.ended,
            sampler_logps=self.logps,
            drawn_logps=self.drawn_logps,
        )


@dataclass
class Decoding:
    """Writes `num_generations` completions of each prompt of a request.

    Prompts are taken by length, the longest first, so that those in flight together are of similar length. A row that
    ends leaves at once, and the next one that waits takes its place. The order decides nothing but the time it takes.

    Args:
        model: Called with `group_cache`, inside `attending_by(model, cache.NAME)`.
        sampler: Draws the tokens.
        options: When completions end.
        stop: Ends completions besides the end tokens.
        request: What to write.
        cache: Empty; has room for the longest prompt and `max_completion_length - 1` tokens of a row.
        steps: Computes the logits of a step, of shape (R, V), and says how many rows it computed for them.
        on_tokens: Called after each step with the number of tokens written and of completions that ended with it.
    """

    model: Any
    sampler: Sampler
    options: SamplingOptions
    stop: StopStringCriteria | None
    request: RolloutRequest
    cache: GroupCache
    steps: Callable[[Step], tuple[Tensor, int]]
    on_tokens: Callable[[int, int], None]

    def __post_init__(self) -> None:
        length = self.options.max_completion_length
        self._device = self.model.device
        self._prompts = [_Prompt(ids) for ids in self.request.prompt_ids]
        self._rows = [
            _Row(prompt, uniforms(seed, g, length))
            for prompt, seed in zip(self._prompts, self.request.seeds, strict=True)
            for g in range(self.request.num_generations)
        ]
        for row in self._rows:
            row.prompt.waiting.append(row)
        self._waiting = deque(sorted(self._prompts, key=lambda prompt: len(prompt.ids), reverse=True))
        self._started: list[_Prompt] = []
        """Prompts in flight, by slot; the last ones may have rows that wait."""
        self._flying: list[_Row] = []
        """Rows in flight, by slot."""
        self.computed = 0
        """Tokens that forwards were computed for, rows that only fill up a step's shape included."""

    def run(self) -> list[Completion]:
        """All completions, group after group."""
        while True:
            self._admit()
            if not self._flying:
                return [row.completion() for row in self._rows]
            self._step()

    # ---- Starting rows ----
    def _admit(self) -> None:
        """Start waiting rows while there is room for them."""
        while room := self.cache.max_rows - len(self._flying):
            ready = [row for prompt in self._started for row in prompt.waiting][:room]
            if not ready and not self._prefill(-(-room // self.request.num_generations)):
                return
            if ready:
                self._start(ready)

    def _prefill(self, count: int) -> bool:
        """Compute the next prompts, `count` of them at most; whether there was one, and a slot for it."""
        chosen: list[_Prompt] = []
        tokens = 0
        while self._waiting and len(chosen) < min(count, self.cache.max_prompts - len(self._started)):
            tokens += len(self._waiting[0].ids)
            if chosen and tokens > PREFILL_TOKENS:
                break
            chosen.append(self._waiting.popleft())
        if not chosen:
            return False
        layout = Layout.of([(len(prompt.ids), []) for prompt in chosen])
        for slot, prompt in enumerate(chosen, start=len(self._started)):
            prompt.slot = slot
        self._started += chosen
        self.cache.now = Prefill(layout, [prompt.slot for prompt in chosen])
        logits_NV = self.model(
            input_ids=self._tensor([[token for prompt in chosen for token in prompt.ids]]),
            position_ids=self._tensor([layout.positions]),
            logits_to_keep=self._tensor([group.prompt.stop - 1 for group in layout.groups]),
            use_cache=False,
            group_cache=self.cache,
        ).logits[0]
        for prompt, logits_V in zip(chosen, logits_NV.unbind(), strict=True):
            prompt.logits_V = logits_V
        return True

    def _start(self, rows: list[_Row]) -> None:
        """Draw the first token of `rows`; those that do not end with it are in flight from now on."""
        logits_RV = torch.stack([row.prompt.logits_V for row in rows])  # type: ignore[misc]
        for row in rows:
            row.prompt.waiting.remove(row)
        self._draw(rows, logits_RV)
        self.computed += len(rows)
        for row in rows:
            if not self._is_done(row):
                row.prompt.in_flight += 1
                self._flying.append(row)
        for prompt in {id(row.prompt): row.prompt for row in rows}.values():
            if not prompt.waiting:
                prompt.logits_V = None
            self._release(prompt)

    # ---- Going on ----
    def _step(self) -> None:
        """The next token of every row in flight."""
        rows = self._flying
        logits_RV, computed = self.steps(self._next_step(rows))
        self.computed += computed
        self._draw(rows, logits_RV)
        for slot in range(len(rows) - 1, -1, -1):
            if self._is_done(rows[slot]):
                self._land(slot)

    def _next_step(self, rows: list[_Row]) -> Step:
        members: list[list[int]] = [[] for _ in self._started]
        places = []
        for slot, row in enumerate(rows):
            places.append(len(members[row.prompt.slot]))
            members[row.prompt.slot].append(slot)
        group = max(map(len, members))
        lengths = [len(row.ids) - 1 for row in rows]
        tokens_R, positions_R, lengths_R, prompt_R, place_R, row_R = self._tensor(
            [
                [row.ids[-1] for row in rows],
                [len(row.prompt.ids) + length for row, length in zip(rows, lengths, strict=True)],
                lengths,
                [row.prompt.slot for row in rows],
                places,
                list(range(len(rows))),
            ]
        )
        return Step(
            tokens_R,
            positions_R,
            lengths_R,
            rows_NG=self._tensor([slots + [0] * (group - len(slots)) for slots in members]),
            prompt_R=prompt_R,
            place_R=place_R,
            row_R=row_R,
            prompt_lengths_N=self._tensor([len(prompt.ids) for prompt in self._started]),
            prompt_columns=max(len(prompt.ids) for prompt in self._started),
            columns=max(lengths) + 1,
        )

    def _land(self, slot: int) -> None:
        """Take a row out of flight; the last one in flight moves to its slot."""
        row, last = self._flying[slot], self._flying.pop()
        if last is not row:
            self._flying[slot] = last
            self.cache.move_row(len(self._flying), slot, len(last.ids) - 1)
        row.prompt.in_flight -= 1
        self._release(row.prompt)

    def _release(self, prompt: _Prompt) -> None:
        """Free the slot of a prompt that no row needs any more; the last one in flight moves there."""
        if prompt.in_flight or prompt.waiting:
            return
        last = self._started.pop()
        if last is not prompt:
            self.cache.move_prompt(last.slot, prompt.slot, len(last.ids))
            self._started[prompt.slot] = last
            last.slot = prompt.slot

    # ---- Both ----
    def _draw(self, rows: list[_Row], logits_RV: Tensor) -> None:
        noise = [row.noise[len(row.ids)] for row in rows]
        drawn = self.sampler.draw(
            logits_RV,
            torch.tensor(noise, dtype=torch.float64, device=self._device),
            [row.prompt.ids for row in rows],
            [row.ids for row in rows],
        )
        values = torch.stack([drawn.tokens_R.double(), drawn.logps_R, drawn.drawn_logps_R]).cpu()  # one transfer
        if not values.isfinite().all():
            raise FloatingPointError(
                "The model's logits are not finite, so that no token can be drawn: its weights are broken (a learning "
                "rate that is too high?), or a logits processor forbids every token."
            )
        for row, token, logp, drawn_logp in zip(rows, *values.tolist(), strict=True):
            row.ids.append(int(token))
            row.logps.append(logp)
            row.drawn_logps.append(drawn_logp)
            row.ended = int(token) in self.options.eos_token_ids
        if self.stop is not None:
            for row, stops in zip(rows, self._stops(rows), strict=True):
                row.ended |= stops
        self.on_tokens(len(rows), sum(map(self._is_done, rows)))

    def _stops(self, rows: list[_Row]) -> list[bool]:
        """Whether each row has just written the end of a stop string."""
        assert self.stop is not None
        reach = self.stop.maximum_token_len
        tails = [(row.prompt.ids + row.ids)[-reach:] for row in rows]
        longest = max(map(len, tails))
        # a token beyond the vocabulary is part of no stop string
        padded = [[2**31 - 1] * (longest - len(tail)) + tail for tail in tails]
        return self.stop(self._tensor(padded), None).tolist()

    def _is_done(self, row: _Row) -> bool:
        return row.ended or len(row.ids) == self.options.max_completion_length

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self._device)
