"""What travels between the rooms: prompts, completions, and the batches they are collected in. No logic.

Axes: B completions, T completion tokens, M trained tokens, R rows of S tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .attention.layout import Layout


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset as a prompt."""

    example: dict[str, Any]
    """The row."""
    ids: list[int]
    row: int
    """Its index in the dataset, from which its noise is derived."""


@dataclass(frozen=True)
class Completion:
    """One completion and what is known of it, e.g. `Completion([1, 5], [7, 2], mask=[True, True])`."""

    prompt_ids: list[int]
    ids: list[int]
    mask: list[bool]
    """True for tokens that the model generated and is trained on; False for what an environment inserted."""
    ended: bool = True
    """Whether an end token or a stop string ended it; False if it was cut off at the maximum length."""
    sampler_logps: list[float] | None = None
    """Logprobs (nats) of the model at the sampling temperature as the sampler computed them, one per token. They
    describe the sampler, not the old policy."""
    advantage: float = 0.0
    old_logps: Tensor | None = None
    """Logprobs under the policy that sampled, computed by the trainer, of shape (len(ids),); None on policy."""
    ref_logps: Tensor | None = None
    """Logprobs under the reference, of shape (len(ids),); None without a reference."""

    @property
    def inputs(self) -> list[int]:
        """The tokens the model reads to predict the trained ones: all before the last trained one."""
        last = next((i for i in range(len(self.mask) - 1, -1, -1) if self.mask[i]), 0)
        return self.ids[:last]


@dataclass(frozen=True)
class GenerationBatch:
    """This rank's part of the generation batch in use."""

    index: int
    """Counted from the start of the run."""
    mini_batches: Sequence[Sequence[Completion]]
    """The completions of each optimizer step that the generation batch lasts."""
    table: dict[str, list[Any]]
    """What `log_completions` shows of the completions sampled on this rank, by column."""
    tokens: int
    """Of the generation batch on all ranks, each prompt counted with each of its completions."""


@dataclass(frozen=True)
class MiniBatch:
    """This rank's completions of one optimizer step."""

    completions: Sequence[Completion]
    num_completions: int
    """Of the whole optimizer step on all ranks."""


@dataclass(frozen=True)
class MicroBatch:
    """Some completions of a mini-batch as tensors: what one forward and backward sees.

    Packed, it is one row in which each prompt stands once, before its completions. Padded, a row is prompt, completion,
    padding: under causal attention padding on the right changes nothing on its left, so neither an attention mask nor
    positions are needed.
    """

    input_ids_RS: Tensor
    position_ids_RS: Tensor | None
    """None: each row counts from 0."""
    layout: Layout | None
    """Which tokens attend to which in a packed row; None where rows are padded."""
    positions_M: Tensor
    """The positions, row after row, whose outputs predict the trained tokens."""
    targets_M: Tensor
    """The trained tokens, in the order of `mask_BT`."""
    mask_BT: Tensor
    """True for trained tokens."""
    advantages_B: Tensor
    old_logps_BT: Tensor | None
    ref_logps_BT: Tensor | None
    sampler_logps_BT: Tensor | None
    num_completions: int
    """Completions of the whole optimizer step on all ranks: what the loss is divided by."""


def _only_this_rank(values: list[Any]) -> list[Any]:
    return values


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run; by default the only one.

    >>> Ranks().gather([1, 2])
    [1, 2]
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[list[Any]], list[Any]] = _only_this_rank
    """Concatenates the lists of all ranks, in the order of ranks. A collective: every rank calls it equally often."""
