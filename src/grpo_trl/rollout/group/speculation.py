"""Speculative decoding within a group: what a row's next tokens may be is looked up in what its group has written.

Completions of one prompt repeat the prompt and one another. What followed the last n tokens where these occurred last is
computed together with the row's last token, as if it had been sampled. Then each token is sampled, with the noise of its
position, and counts as long as all guesses before it were right. Since a token follows from the noise and the tokens before
it alone, completions are the same with guesses and without, up to rounding.

Source: guesses by n-grams are prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding); a group's own
completions are looked up too.

Axes: R running rows, F places of all rows, those of a row one behind the other; T completion tokens.
"""

from collections import defaultdict
from dataclasses import dataclass, replace

from torch import Tensor

from .rows import GroupPrompt, Row, Unread
from .scheduler import Scheduler
from .step import Step


GUESSED = 3
"""Tokens that are guessed at a time."""


class NGrams:
    """What followed each sequence of `size` tokens where it occurred last."""

    def __init__(self, size: int):
        self.size = size
        self._next: dict[tuple[int, ...], int] = {}

    def learn(self, ids: list[int], start: int = 0) -> None:
        """Which tokens stand in `ids` from `start` on, and behind what."""
        for i in range(max(self.size, start), len(ids)):
            self._next[tuple(ids[i - self.size : i])] = ids[i]

    def guess(self, ids: list[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow `ids`."""
        last = tuple(ids[-self.size :])
        guessed: list[int] = []
        while len(guessed) < count and last in self._next:
            guessed.append(self._next[last])
            last = (*last[1:], guessed[-1])
        return guessed


@dataclass
class SpeculativeScheduler(Scheduler):
    """A scheduler whose steps check guesses wherever there are some. `lag` is 0, and the sampler reads no tokens.

    Args:
        ngrams: As many tokens must have occurred before for the next to be guessed.
    """

    ngrams: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._seen: dict[GroupPrompt, NGrams] = {}
        self._learned: dict[Row, int] = defaultdict(int)
        """Tokens of each row that its group has been told of."""

    def _step(self) -> None:
        rows = list(self._running)
        guesses = [self._guess(row) for row in rows]
        if not any(guesses):
            super()._step()
            return
        guesses = [guess + [0] * (GUESSED - len(guess)) for guess in guesses]
        step = self._checking(rows, guesses)
        logits_FV, computed = self.steps(step)
        self.computed += computed
        noise_F = self._state.noise_RT[step.row_R, self._bounded(step.lengths_R + 1)]
        values = Unread(rows, *self.sampler.sample(logits_FV, noise_F)).values()
        count = self._take(rows, guesses, values)
        self._state = replace(
            self._state,
            tokens_R=self._tensor([row.ids[-1] for row in rows]),
            positions_R=self._tensor([len(row.prompt.ids) + len(row.ids) - 1 for row in rows]),
            lengths_R=self._tensor([len(row.ids) - 1 for row in rows]),
        )
        self._groups = None  # rows have grown by different numbers of tokens
        over = [row for row in rows if self._is_over(row)]
        self._retire(over)
        self.on_tokens(count, len(over))

    def _guess(self, row: Row) -> list[int]:
        if row.prompt not in self._seen:
            self._seen[row.prompt] = NGrams(self.ngrams)
            self._seen[row.prompt].learn(row.prompt.ids)
        seen, ids = self._seen[row.prompt], row.prompt.ids[-self.ngrams :] + row.ids
        seen.learn(ids, len(ids) - len(row.ids) + self._learned[row])
        self._learned[row] = len(row.ids)
        return seen.guess(ids, GUESSED)

    def _checking(self, rows: list[Row], guesses: list[list[int]]) -> Step:
        """A step over the last token of each row and its guesses."""
        places = [row for row in rows for _ in range(1 + GUESSED)]
        lengths_F = self._tensor([len(row.ids) - 1 + i for row in rows for i in range(1 + GUESSED)])
        prompts_F = self._tensor([len(row.prompt.ids) for row in places])
        lengths_F = self._bounded(lengths_F)
        return Step(
            self._tensor([token for row, guess in zip(rows, guesses, strict=True) for token in (row.ids[-1], *guess)]),
            prompts_F + lengths_F,
            lengths_F,
            columns=min(max(len(row.ids) for row in rows) + GUESSED, self.options.max_completion_length),
            guessed=GUESSED,
            **self._make_groups(places),
        )

    def _bounded(self, places: Tensor) -> Tensor:
        """Guesses behind the longest possible completion stand in its last place; they never count."""
        return places.clamp(max=self.options.max_completion_length - 1)

    def _take(self, rows: list[Row], guesses: list[list[int]], values: list[list[float]]) -> int:
        """Give each row what was sampled for it up to the first wrong guess, or its end; how many tokens that are."""
        places, count, going = 1 + GUESSED, 0, rows
        for place in range(places):
            for row in going:
                row.append(*(each[row.slot * places + place] for each in values))
                row.sampled += 1
            for row, end in zip(going, self._ends(going), strict=True):
                row.ended = end
            count += len(going)
            going = [
                row
                for row in going
                if place < GUESSED and guesses[row.slot][place] == row.ids[-1] and not self._is_over(row)
            ]
        return count

    def _is_over(self, row: Row) -> bool:
        return row.ended or self._is_complete(row)
