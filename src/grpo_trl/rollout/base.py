"""What every rollout engine takes and gives.

Rows come group after group: with G completions per prompt, rows 0..G-1 belong to the first prompt. Ranks may share a group:
each then asks for some of its completions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..plan import ROWS_IN_FLIGHT
from ..types import Completion


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is sampled. Names and meanings are those of `transformers.GenerationConfig`.

    `eos_token_ids` all end a completion; the one that did belongs to it.
    """

    max_completion_length: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def samples_from_policy(self) -> bool:
        """Whether tokens are sampled from the model's distribution at the temperature, unchanged.

        False where one of `generation_kwargs` might change it.
        """
        changed = set(self.generation_kwargs) - {"stop_strings"}
        return not changed and (self.top_p, self.top_k, self.repetition_penalty) == (1, 0, 1) and not self.min_p


@dataclass(frozen=True)
class RolloutRequest:
    """What an engine is asked for: `num_generations` completions of each prompt, or those at `places` of its group.

    `prompts` are the dataset's (strings or lists of messages), `prompt_ids` their tokens; `seeds` fix the noise, one for
    each prompt.
    """

    prompts: list[Any]
    prompt_ids: list[list[int]]
    num_generations: int
    seeds: list[int]
    places: Sequence[range] | None = None
    """For each prompt; None: whole groups."""

    @property
    def parts(self) -> Sequence[range]:
        """Which completions of its group are asked for, for each prompt."""
        return [range(self.num_generations)] * len(self.prompt_ids) if self.places is None else self.places

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.parts))


@dataclass(frozen=True)
class Rollout:
    """The completions that were asked for, group after group."""

    completions: list[Completion]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """Further columns for the reward functions, with one value per row."""
    computed_tokens: int | None = None
    """Tokens of completions that forwards computed, with those of rows that had ended and of rows that only fill up a
    batch; None if not known."""


class RolloutEngine(Protocol):
    """Anything that samples completions. It leaves the model, its mode and the global random state as they were."""

    in_process: bool
    """Whether it samples with the trainer's own model and bounds its own memory, however many prompts it is given."""
    splits_groups: bool
    """Whether it can be asked for a part of a group."""

    def rollout(self, request: RolloutRequest) -> Rollout: ...


class SyncedEngine(RolloutEngine, Protocol):
    """An engine with weights of its own."""

    def sync_weights(self) -> None:
        """Give it the policy's weights. A collective where they are sharded."""
        ...

    def probe(self, request: RolloutRequest) -> list[Completion]:
        """Sample a little for some prompts, so that `sampler_logps` can be compared; nothing where that is not due."""
        ...


def most_rows_in_flight(option: int | None, device: torch.device) -> int:
    """Completions that are decoded at a time: what the option says, or as many as are worth it on the device."""
    return option or ROWS_IN_FLIGHT["cpu" if device.type == "cpu" else "cuda"]
