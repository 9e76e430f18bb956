"""What is known of prompts and rows while they are decoded: on the host, on the device, and on its way between them.

Axes: R running rows, V vocabulary, T completion tokens, L tokens of prompt and completion.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...types import Completion


@dataclass(eq=False)
class GroupPrompt:
    ids: list[int]
    waiting: deque["Row"] = field(default_factory=deque)
    running: int = 0
    slot: int = -1
    logits_V: Tensor | None = None
    """Of the first token; held until the last row has sampled it."""


@dataclass(eq=False)
class Row:
    prompt: GroupPrompt
    noise: np.ndarray
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    drawn_logps: list[float] = field(default_factory=list)
    sampled: int = 0
    """Tokens so far, those included that the host has not read yet."""
    ended: bool = False
    slot: int = -1

    def append(self, token: float, logp: float, drawn_logp: float) -> None:
        self.ids.append(int(token))
        self.logps.append(logp)
        self.drawn_logps.append(drawn_logp)

    def completion(self, from_policy: bool) -> Completion:
        return Completion(
            self.prompt.ids,
            self.ids,
            [True] * len(self.ids),
            ended=self.ended,
            sampler_logps=self.logps,
            drawn_logps=None if from_policy else self.drawn_logps,
        )


@dataclass(frozen=True)
class State:
    """What the device knows of running rows, by slot."""

    tokens_R: Tensor
    """The last one of each, which no forward has seen."""
    positions_R: Tensor
    """Of that token in prompt and completion together."""
    lengths_R: Tensor
    """Tokens of the completion before it."""
    noise_RT: Tensor
    history_RL: Tensor
    """Prompt and completion; of no columns if nothing reads it."""

    def advanced(self, tokens_R: Tensor) -> "State":
        if self.history_RL.shape[1]:
            self.history_RL.scatter_(1, self.positions_R[:, None] + 1, tokens_R[:, None])
        return State(tokens_R, self.positions_R + 1, self.lengths_R + 1, self.noise_RT, self.history_RL)

    @property
    def next_noise_R(self) -> Tensor:
        return self.noise_RT.gather(1, self.lengths_R[:, None] + 1)[:, 0]

    def of_slots(self, slots: list[int]) -> "State":
        index = torch.tensor(slots, dtype=torch.long, device=self.tokens_R.device)
        return State(*(x.index_select(0, index) for x in vars(self).values()))

    def joined_by(self, other: "State") -> "State":
        return State(*map(torch.cat, zip(vars(self).values(), vars(other).values(), strict=True)))


class Unread:
    """Tokens and log-probabilities on their way to the host."""

    def __init__(self, rows: list[Row], tokens_R: Tensor, logps_R: Tensor, drawn_logps_R: Tensor):
        self.rows = rows
        on_gpu = tokens_R.device.type == "cuda"
        values_3R = torch.stack([tokens_R.double(), logps_R, drawn_logps_R])
        self._values = values_3R.to("cpu", non_blocking=on_gpu)  # one transfer
        self._copied = torch.cuda.Event() if on_gpu else None
        if self._copied is not None:
            self._copied.record()

    def values(self) -> list[list[float]]:
        """Tokens, their logprobs, and those of the distribution they were sampled from.

        Raises:
            FloatingPointError: A log-probability is not finite.
        """
        if self._copied is not None:
            self._copied.synchronize()
        if not self._values.isfinite().all():
            raise FloatingPointError(
                "The model's logits are not finite, so that no token can be sampled: its weights are broken (a learning "
                "rate that is too high?), or a logits processor forbids every token."
            )
        values: list[list[float]] = self._values.tolist()
        return values
