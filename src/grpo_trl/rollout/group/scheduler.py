"""The scheduler of a rollout: which rows run, which wait, and one forward after the other.

What a step reads (tokens, positions, lengths, noise) stays on the device and advances there. On a GPU the host reads the
sampled tokens one step behind, so that no step waits for it; a row that has ended is then computed once too often.

Axes: R running rows, N prefilled prompts, G most running rows of a prompt, V vocabulary, T completion tokens, L tokens of
prompt and completion.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StopStringCriteria

from ...attention.layout import Layout
from ...plan import PREFILL_TOKENS
from ...seeds import uniforms
from ...types import Completion
from ..base import RolloutRequest, SamplingOptions
from ..processors import History
from ..sampling import Sampler
from .cache import GroupCache
from .rows import GroupPrompt, Row, State, Unread
from .step import Prefill, Step


LUMP = 4
"""Prompts whose rows are free before further prompts are prefilled, if a quarter of all rows is not free earlier."""


@dataclass
class Scheduler:
    """Generates the completions that a request asks for.

    Prompts are taken by length, the longest first, so that those prefilled together are of similar length. A row that
    ends leaves at once, and the next one that waits takes its place. The order decides nothing but the time it takes.

    Args:
        model: Called with `group_cache`, inside `attending_by(model, cache.NAME)`.
        sampler: Samples the tokens.
        options: When completions end.
        stop: Ends completions besides the end tokens.
        request: What to generate.
        cache: Empty; has room for the longest prompt and `max_completion_length - 1` tokens of a row.
        steps: Computes the logits of a step, of shape (R, V), and says how many rows it computed for them.
        on_tokens: Called after each step with the number of tokens sampled and of completions that ended with it.
        lag: Steps that the host reads behind the device; 0 where sampling or stopping needs the tokens.
    """

    model: Any
    sampler: Sampler
    options: SamplingOptions
    stop: StopStringCriteria | None
    request: RolloutRequest
    cache: GroupCache
    steps: Callable[[Step], tuple[Tensor, int]]
    on_tokens: Callable[[int, int], None]
    lag: int = 0

    def __post_init__(self) -> None:
        self._device = self.model.device
        self._prompts = [GroupPrompt(ids) for ids in self.request.prompt_ids]
        self._rows = [
            Row(prompt, uniforms(seed, g, self.options.max_completion_length))
            for prompt, seed, part in zip(self._prompts, self.request.seeds, self.request.parts, strict=True)
            for g in part
        ]
        for row in self._rows:
            row.prompt.waiting.append(row)
        self._waiting = deque(sorted(self._prompts, key=lambda prompt: len(prompt.ids), reverse=True))
        self._prefilled: list[GroupPrompt] = []
        """Prompts whose keys and values are held, by slot; the last ones may have rows that wait."""
        self._running: list[Row] = []
        """By slot."""
        self._unread: deque[Unread] = deque()
        self._history = 0
        if self.sampler.reads_tokens:
            self._history = max(map(len, self.request.prompt_ids)) + self.options.max_completion_length
        self._state = self._initial_state([])
        self._groups: dict[str, Any] | None = None
        self.computed = 0
        """Tokens that forwards were computed for, rows that only fill up a step's shape included."""

    def run(self) -> list[Completion]:
        """All completions, group after group."""
        while True:
            self._schedule()
            if self._running:
                self._step()
            elif not self._unread:
                return [row.completion(self.sampler.samples_from_policy) for row in self._rows]
            self._read(self.lag if self._running else 0)

    # ---- Starting rows ----
    def _schedule(self) -> None:
        """Start waiting rows while there is room for them."""
        while room := self.cache.max_rows - len(self._running):
            ready = [row for prompt in self._prefilled for row in prompt.waiting][:room]
            if ready:
                self._start(ready)
            elif not self._prefill(room):
                return

    def _prefill(self, room: int) -> bool:
        """Compute the next prompts; whether there were some, and slots and enough rows for them."""
        generations = self.request.num_generations
        lump = min(LUMP * generations, max(generations, self.cache.max_rows // 4), self.cache.max_rows)
        if self._running and room < min(lump, len(self._waiting) * generations):
            return False
        chosen = self._next_prompts(-(-room // generations))
        if not chosen:
            return False
        layout = Layout.of([(len(prompt.ids), []) for prompt in chosen])
        for slot, prompt in enumerate(chosen, start=len(self._prefilled)):
            prompt.slot = slot
        self._prefilled += chosen
        self.cache.now = Prefill([prompt.slot for prompt in chosen])
        logits_NV = self.model(
            input_ids=self._tensor([[token for prompt in chosen for token in prompt.ids]]),
            position_ids=self._tensor([layout.positions]),
            logits_to_keep=self._tensor([group.prompt.stop - 1 for group in layout.groups]),
            use_cache=False,
            group_cache=self.cache,
            shared_prefix=layout,
        ).logits[0]
        for prompt, logits_V in zip(chosen, logits_NV.unbind(), strict=True):
            prompt.logits_V = logits_V
        return True

    def _next_prompts(self, count: int) -> list[GroupPrompt]:
        """Of those that wait, `count` at most, and no more than fit into one prefill and the free slots."""
        chosen: list[GroupPrompt] = []
        tokens = 0
        while self._waiting and len(chosen) < min(count, self.cache.max_prompts - len(self._prefilled)):
            tokens += len(self._waiting[0].ids)
            if chosen and tokens > PREFILL_TOKENS.get(self._device.type, 4096):
                break
            chosen.append(self._waiting.popleft())
        return chosen

    def _start(self, rows: list[Row]) -> None:
        """Sample the first token of `rows`, which run from now on."""
        logits_RV = torch.stack([row.prompt.logits_V for row in rows])  # type: ignore[misc]
        for slot, row in enumerate(rows, start=len(self._running)):
            row.prompt.waiting.remove(row)
            row.prompt.running += 1
            row.slot = slot
            if not row.prompt.waiting:
                row.prompt.logits_V = None
        state = self._initial_state(rows)
        state = self._sample(rows, state, logits_RV)
        self._running += rows
        self._state = self._state.joined_by(state)
        self._groups = None
        self.computed += len(rows)
        self._retire([row for row in rows if self._is_complete(row)])
        self._read(self.lag)

    def _initial_state(self, rows: list[Row]) -> State:
        """Before the first token: the last one of the prompt is the last one of the row."""
        noise_RT = np.stack([row.noise for row in rows]) if rows else np.empty((0, self.options.max_completion_length))
        padded = [row.prompt.ids + row.prompt.ids[-1:] * (self._history - len(row.prompt.ids)) for row in rows]
        return State(
            tokens_R=self._tensor([row.prompt.ids[-1] for row in rows]).long(),
            positions_R=self._tensor([len(row.prompt.ids) - 1 for row in rows]).long(),
            lengths_R=self._tensor([-1] * len(rows)).long(),
            noise_RT=torch.from_numpy(noise_RT).to(self._device),
            history_RL=self._tensor([ids[: self._history] for ids in padded]).long().view(len(rows), self._history),
        )

    # ---- A step ----
    def _step(self) -> None:
        """The next token of every running row."""
        rows = list(self._running)
        logits_RV, computed = self.steps(self._next_step(rows))
        self.computed += computed
        self._state = self._sample(rows, self._state, logits_RV)
        self._retire([row for row in rows if self._is_complete(row)])

    def _next_step(self, rows: list[Row]) -> Step:
        if self._groups is None:
            self._groups = self._make_groups(rows)
        return Step(
            self._state.tokens_R,
            self._state.positions_R,
            self._state.lengths_R,
            columns=max(row.sampled for row in rows),
            **self._groups,
        )

    def _make_groups(self, rows: list[Row]) -> dict[str, Any]:
        """Who belongs to which prompt: it changes only where rows start or leave. A row may have several places."""
        members: list[list[int]] = [[] for _ in self._prefilled]
        places = []
        for place, row in enumerate(rows):
            places.append(len(members[row.prompt.slot]))
            members[row.prompt.slot].append(place)
        group = max(map(len, members))
        prompt_R, place_R, row_R = self._tensor([[row.prompt.slot for row in rows], places, [row.slot for row in rows]])
        return {
            "rows_NG": self._tensor([slots + [-1] * (group - len(slots)) for slots in members]),
            "prompt_R": prompt_R,
            "place_R": place_R,
            "row_R": row_R,
            "prompt_lengths_N": self._tensor([len(prompt.ids) for prompt in self._prefilled]),
            "prompt_columns": max(len(prompt.ids) for prompt in self._prefilled),
        }

    def _sample(self, rows: list[Row], state: State, logits_RV: Tensor) -> State:
        history = None
        if self._history:
            lengths = [len(row.prompt.ids) for row in rows], [row.sampled for row in rows]
            history = History(state.history_RL[:, : max(map(sum, zip(*lengths, strict=True)))], *lengths)
        tokens_R, *logps = self.sampler.sample(logits_RV, state.next_noise_R, history)
        for row in rows:
            row.sampled += 1
        self._unread.append(Unread(rows, tokens_R, *logps))
        return state.advanced(tokens_R)

    # ---- Reading, and ending rows ----
    def _read(self, lag: int) -> None:
        """Take notice of what was sampled, but for the last `lag` steps."""
        while len(self._unread) > lag:
            unread = self._unread.popleft()
            fresh = [row for row in unread.rows if not row.ended]  # others ended before the host knew
            for row, *values in zip(unread.rows, *unread.values(), strict=True):
                if not row.ended:
                    row.append(*values)
            ends = self._ends(fresh)
            for row, end in zip(fresh, ends, strict=True):
                row.ended = end
            over = [row for row in fresh if row.ended or self._limit_of(row) == len(row.ids)]
            self._retire([row for row in over if row.slot >= 0])
            self.on_tokens(len(fresh), len(over))

    def _ends(self, rows: list[Row]) -> list[bool]:
        """Whether each row's last token is an end token or ends a stop string."""
        ends = [row.ids[-1] in self.options.eos_token_ids for row in rows]
        if self.stop is None or not rows:
            return ends
        reach = self.stop.maximum_token_len
        tails = [(row.prompt.ids[-reach:] + row.ids[-reach:])[-reach:] for row in rows]
        longest = max(map(len, tails))
        # a token beyond the vocabulary is part of no stop string
        padded = [[2**31 - 1] * (longest - len(tail)) + tail for tail in tails]
        return [a or b for a, b in zip(ends, self.stop(self._tensor(padded), None).tolist(), strict=True)]

    def _limit_of(self, row: Row) -> int:
        return self.options.max_completion_length

    def _is_complete(self, row: Row) -> bool:
        return row.sampled == self._limit_of(row)

    def _retire(self, rows: Sequence[Row]) -> None:
        """Free the slots of rows that need no further token."""
        if not rows:
            return
        order = list(range(len(self._running)))
        for row in sorted(rows, key=lambda row: row.slot, reverse=True):
            self._close_up(row.slot, order)
            row.slot = -1
            row.prompt.running -= 1
            self._release(row.prompt)
        self._state = self._state.of_slots(order)
        self._groups = None

    def _close_up(self, free: int, order: list[int]) -> None:
        """Fill a slot with the last row."""
        last = len(self._running) - 1
        if last != free:
            row = self._running[last]
            self.cache.move_row(last, free, row.sampled - 1)
            self._running[free], order[free], row.slot = row, order[last], free
        self._running.pop()
        order.pop()

    def _release(self, prompt: GroupPrompt) -> None:
        """Free the slot of a prompt that no row needs any more; the last prefilled one moves there."""
        if prompt.running or prompt.waiting:
            return
        last = self._prefilled.pop()
        if last is not prompt:
            self.cache.move_prompt(last.slot, prompt.slot, len(last.ids))
            self._prefilled[prompt.slot] = last
            last.slot = prompt.slot

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self._device)
