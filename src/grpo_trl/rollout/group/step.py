"""What one forward of a rollout computes: prompts, or one token of each running row.

Nothing that changes between two decoding steps is a Python number on a GPU: `Step` brings it as tensors, so that the
launches of a step can be recorded once and repeated.

Axes: R rows in flight, N prompts in flight, X slots of rows or prompts, G most rows of a slot, D head size, S prompt
tokens, T completion tokens.
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prefill:
    """A forward over prompts, one behind the other in one row, and the slots that their keys and values go to."""

    slots: list[int]


class Reach(NamedTuple):
    """Which of a slot's keys each row sees: those from `first_R` up to, not including, `stop_R`. All in int32."""

    rows_XG: Tensor
    """The rows of each slot; -1 where it has fewer than G."""
    first_R: Tensor
    stop_R: Tensor

    @classmethod
    def of(cls, *parts: Tensor) -> "Reach":
        return cls(*(part.to(torch.int32).contiguous() for part in parts))


@dataclass
class LayerMemory:
    """One attention layer's memory, and how it attends. A token's keys of all heads, then its values, stand in one line."""

    prompts: Tensor  # (slots, S, K*D + K*D of the values)
    own: Tensor  # (rows, T, K*D + K*D of the values)
    key_heads: int
    key_size: int
    scaling: float
    window: int | None
    softcap: float | None
    cpu_struct: Any = None
    """What `cpu_kernels` reads of it."""

    @property
    def value_size(self) -> int:
        return self.own.shape[2] // self.key_heads - self.key_size

    @functools.cached_property
    def own_heads(self) -> tuple[Tensor, Tensor]:
        """Keys and values of shape (rows, K, T, D)."""
        return self._split(self.own)

    @functools.cached_property
    def prompt_heads(self) -> tuple[Tensor, Tensor]:
        """Keys and values of shape (slots, K, S, D)."""
        return self._split(self.prompts)

    def _split(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = memory.tensor_split((self.key_heads * self.key_size,), dim=-1)
        key, value = (x.unflatten(-1, (self.key_heads, -1)).transpose(1, 2) for x in (keys, values))
        return key, value


@dataclass(frozen=True)
class Step:
    """A forward over the last token of each row, and over guesses at the tokens after it.

    With guesses each row has 1 + `guessed` places, one behind the other, in whatever has an axis R.
    """

    tokens_R: Tensor
    positions_R: Tensor
    """Of the token in prompt and completion together."""
    lengths_R: Tensor
    """How many tokens of the completion are held already: the column that this one goes to."""
    rows_NG: Tensor
    """The rows of each prompt in flight; -1 where it has fewer than G."""
    prompt_R: Tensor
    """The prompt of each row, and its place in that prompt's line of `rows_NG`."""
    place_R: Tensor
    row_R: Tensor
    """The slot of each row."""
    prompt_lengths_N: Tensor
    prompt_columns: int
    """S, at least the longest prompt in flight."""
    columns: int
    """T, above the largest of `lengths_R`."""
    guessed: int = 0
    _shared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """What layers that are alike have in common."""

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, which is called once for each key."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def masks(self, window: int | None, dtype: torch.dtype, queries_per_row: int) -> tuple[Tensor, Tensor]:
        """What is added to products: of shape (R, 1, 1, T) for own keys, (N, 1, 1 or G*Q, S) for those of prompts.

        With guesses that of own keys is of shape (rows, 1, (1 + guessed)*Q, T).
        """
        if window is not None and window >= self.prompt_columns + self.columns:
            window = None

        def make() -> tuple[Tensor, Tensor]:
            own, prompt = self._own_mask(window, queries_per_row), self._prompt_mask(window, queries_per_row)
            return _additive(own, dtype), _additive(prompt, dtype)

        masks: tuple[Tensor, Tensor] = self.shared((window, dtype, queries_per_row), make)
        return masks

    def reaches(self, window: int | None) -> tuple[Reach, Reach]:
        """What each row sees of its own keys, and of those of its prompt."""
        reaches: tuple[Reach, Reach] = self.shared(("reaches", window), lambda: self._reaches(window))
        return reaches

    def lines(self, columns: int) -> Tensor:
        """Where keys and values of this step go to, in a memory of `columns` tokens for each row."""
        lines_R: Tensor = self.shared(("lines", columns), lambda: self.row_R * columns + self.lengths_R)
        return lines_R

    def rotation(self, cos_R1D: Tensor, sin_R1D: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines, and the sines for components whose halves have changed places, of which the first is negated."""

        def make() -> tuple[Tensor, Tensor]:
            first, second = sin_R1D.chunk(2, dim=-1)
            return cos_R1D.contiguous(), torch.cat([-first, second], dim=-1)

        rotation: tuple[Tensor, Tensor] = self.shared((id(cos_R1D), id(sin_R1D)), make)
        return rotation

    def routes(self, key_heads: int) -> tuple[Tensor, Tensor]:
        """From queries (R*K, ...) to those of prompts (N*K*G, ...), and from their outputs (N*G, ...) to rows (R, ...)."""

        def make() -> tuple[Tensor, Tensor]:
            head_K1 = torch.arange(key_heads, device=self.rows_NG.device)[:, None]
            there = (self._some_row_NG[:, None] * key_heads + head_K1).flatten()
            return there, self.prompt_R * self.rows_NG.shape[1] + self.place_R

        routes: tuple[Tensor, Tensor] = self.shared(("routes", key_heads), make)
        return routes

    def places(self, key_heads: int) -> Tensor | None:
        """From queries (R*K, ...) to those of one row's places behind each other for each head; None without guesses."""
        if not self.guessed:
            return None

        def make() -> Tensor:
            index = torch.arange(len(self.tokens_R) * key_heads, device=self.tokens_R.device)
            return index.view(-1, 1 + self.guessed, key_heads).transpose(1, 2).flatten()

        places: Tensor = self.shared(("places", key_heads), make)
        return places

    @property
    def _some_row_NG(self) -> Tensor:
        """The rows of each prompt, and any row where it has fewer than G."""
        return self.rows_NG.clamp(min=0)

    def _reaches(self, window: int | None) -> tuple[Reach, Reach]:
        row_R = torch.arange(len(self.tokens_R), device=self.tokens_R.device)
        first = [
            torch.zeros_like(last) if window is None else last - window + 1
            for last in (self.lengths_R, self.positions_R)
        ]
        return (
            Reach.of(row_R.view(-1, 1 + self.guessed), first[0], self.lengths_R + 1),
            Reach.of(self.rows_NG, first[1], self.prompt_lengths_N[self.prompt_R]),
        )

    def _own_mask(self, window: int | None, queries_per_row: int) -> Tensor:
        column_T = torch.arange(self.columns, device=self.tokens_R.device)
        own_RT = column_T <= self.lengths_R[:, None]
        if window is not None:
            own_RT &= self.lengths_R[:, None] - column_T < window
        if self.guessed:
            own_RT = own_RT.unflatten(0, (-1, 1 + self.guessed)).repeat_interleave(queries_per_row, dim=1)
            return own_RT[:, None]
        return own_RT[:, None, None]

    def _prompt_mask(self, window: int | None, queries_per_row: int) -> Tensor:
        column_S = torch.arange(self.prompt_columns, device=self.tokens_R.device)
        prompt_NGS = (column_S < self.prompt_lengths_N[:, None])[:, None]
        if window is not None:
            distance_NGS = self.positions_R[self._some_row_NG][:, :, None] - column_S
            prompt_NGS = (prompt_NGS & (distance_NGS < window)).repeat_interleave(queries_per_row, dim=1)
        return prompt_NGS[:, None]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, hidden(dtype))


def hidden(dtype: torch.dtype) -> float:
    """What is added to the product of a query with a key that it does not see.

    Not -inf: a row that sees nothing must have a log-sum-exp that makes it weightless. Nor the least number: CUDA's kernel
    multiplies by log2(e) in float32, which would make -inf of it, and gives such a row the log-sum-exp 0.
    """
    return max(torch.finfo(dtype).min, -1e30)
