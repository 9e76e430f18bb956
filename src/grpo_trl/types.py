"""What travels between packages: prompts, completions, and the batches they are collected in. No logic.

Axes: B completions, T completion tokens, M trained tokens, R rows of S tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .attention.layout import Layout
from .objective import Counts


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
    drawn_logps: list[float] | None = None
    """Logprobs (nats) of the distribution that each token was drawn from, e.g. after top-p, NaN where the sampler does not
    know one; None for an engine that does not report them."""
    advantage: float | list[float] = 0.0
    """Of the completion, or one for each token."""
    old_logps: Tensor | None = None
    """Logprobs under the policy that sampled, computed by the trainer, of shape (len(ids),); None on policy."""
    ref_logps: Tensor | None = None
    """Logprobs under the reference, of shape (len(ids),); None without a reference."""
    mask_policy: list[bool] | None = None
    """True for tokens that the policy term is restricted to by `top_entropy_quantile`; None for all."""

    @property
    def has_signal(self) -> bool:
        """Whether some advantage is not 0."""
        return any(self.advantage) if isinstance(self.advantage, list) else bool(self.advantage)

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
    counts: Sequence[Counts]
    """What each mini-batch holds over all ranks."""
    tokens: int
    """Of the generation batch on all ranks, each prompt counted with each of its completions."""


@dataclass(frozen=True)
class MiniBatch:
    """This rank's completions of one optimizer step."""

    completions: Sequence[Completion]
    counts: Counts
    """What the mini-batch holds over all ranks."""


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
    uses_RS: Tensor
    """How many completions use each token: 1 for their own, all of the group for its prompt, 0 for padding; float32."""
    positions_M: Tensor
    """The positions, row after row, whose outputs predict the trained tokens."""
    targets_M: Tensor
    """The trained tokens, in the order of `mask_BT`."""
    mask_BT: Tensor
    """True for trained tokens."""
    advantages_BU: Tensor
    """Of shape (B, 1), or (B, T) where some completion has one for each token."""
    old_logps_BT: Tensor | None
    ref_logps_BT: Tensor | None
    sampler_logps_BT: Tensor | None
    drawn_logps_BT: Tensor | None
    mask_policy_BT: Tensor | None
    """True for tokens that the policy term is restricted to; None for all."""
    divisor: float
    """What the loss is divided by: the same number in every micro-batch of an optimizer step, on all ranks."""

    def __getitem__(self, name: Any) -> Any:
        """Refuse to be read as a dict, which a compute_loss that was written for TRL's trainer expects.

        Raises:
            TypeError: Always; it names the fields.
        """
        raise TypeError(f"inputs[{name!r}]: a micro-batch is no dict; it has the attributes {', '.join(vars(self))}.")


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
