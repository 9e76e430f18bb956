"""How a run scores its completions: which of them, packed or padded, in which pieces."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from .policy import Completion, Packer, Piece, disagreement, score_completions, unservable


logger = logging.getLogger(__name__)


class Scorer:
    """Cuts optimizer steps into pieces, and evaluates the old and the reference policy.

    Completions are packed where the model can be served: its configuration decides at first, and once there are
    completions a comparison of both ways. Ranks decide together.

    Args:
        model: The policy, not wrapped yet.
        packer: How pieces are made where nothing speaks against it.
        shared_prefix: The option: `"auto"`, True or False.
        temperature: The sampling temperature.
        mixed_precision: Whether the policy computes in half precision, whatever its weights are.
        needs_all: Whether completions without an advantage have a gradient too, as the KL term gives them.
        gather: From a list of objects on this rank to the concatenated lists of all ranks.

    Raises:
        ValueError: `shared_prefix=True`, and the model cannot be served.
    """

    def __init__(
        self,
        model: nn.Module,
        packer: Packer,
        *,
        shared_prefix: str | bool,
        temperature: float,
        mixed_precision: bool,
        needs_all: bool,
        gather: Callable[[list[Any]], list[Any]],
    ):
        self.packer = replace(packer, shared_prefix=shared_prefix is not False)
        self.temperature = temperature
        self._mixed_precision = mixed_precision
        self._required = shared_prefix is True
        self._needs_all = needs_all
        self._gather = gather
        self._compared = False
        if self.packer.shared_prefix:
            self._pad_if(unservable(model))

    def compare(self, model: nn.Module, completions: Sequence[Completion]) -> None:
        """At the first call, pad from now on if packed log-probabilities of some `completions` are not the padded ones.

        Raises:
            ValueError: They are not, and `shared_prefix=True`.
        """
        if self.packer.shared_prefix and not self._compared:
            self._pad_if(disagreement(model, completions, self.packer, self.temperature, self._mixed_precision))
        self._compared = True

    def informative(self, completions: Sequence[Completion]) -> list[Completion]:
        """Those that have a gradient."""
        return [c for c in completions if self._is_informative(c)]

    def with_logps(self, model: nn.Module, completions: Sequence[Completion], name: str) -> list[Completion]:
        """`completions`, the informative ones with their log-probabilities under `model` in the field `name`."""
        logps = iter(score_completions(model, self.informative(completions), self.packer, self.temperature))
        return [
            replace(c, **cast("dict[str, Any]", {name: next(logps)})) if self._is_informative(c) else c
            for c in completions
        ]

    def pieces(self, completions: Sequence[Completion], world_size: int) -> list[Piece]:
        """The informative completions of an optimizer step, all of whose `completions` on this rank count."""
        return self.packer.pieces(self.informative(completions), num_completions=len(completions) * world_size)

    def _is_informative(self, completion: Completion) -> bool:
        return any(completion.mask) and bool(completion.advantage or self._needs_all)

    def _pad_if(self, reason: str | None) -> None:
        """Pad from now on if some rank has a reason to."""
        reason = next(filter(None, self._gather([reason])), None)
        if reason is None:
            return
        if self._required:
            raise ValueError(f"shared_prefix=True cannot work: {reason}; 'auto' and False pad instead.")
        logger.warning("Prompts are not shared between the completions of a group: %s.", reason)
        self.packer = replace(self.packer, shared_prefix=False)
