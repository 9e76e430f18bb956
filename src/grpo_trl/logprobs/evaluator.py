"""How a run scores its completions: which of them, packed or padded, in which micro-batches."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..attention.compatibility import incompatibility
from ..logging import EVERY_RANK, get_logger
from ..model_utils import ran_out_of_memory
from ..types import Completion, MicroBatch, Ranks
from .compute import compute_completion_entropies, compute_completion_logprobs, compute_router_load
from .packing import Packer
from .verify import packed_mismatch


logger = get_logger(__name__)

Result = TypeVar("Result")

RETRY_STEPS = 100
"""Optimizer steps in smaller micro-batches before the size that memory ran out under is tried again."""


class DoesNotFit(torch.OutOfMemoryError):
    """A micro-batch that cannot be made smaller does not fit into memory; the message says what would help."""


class LogprobEvaluator:
    """Cuts optimizer steps into micro-batches, and evaluates the old and the reference policy.

    Completions are packed where the model can be served: its configuration decides at first, and once there are
    completions a comparison of both ways. Ranks decide together.

    Args:
        model: The policy, not wrapped yet.
        packer: How micro-batches are made where nothing speaks against it.
        shared_prefix: The option: `"auto"`, True or False.
        temperature: The sampling temperature.
        mixed_precision: Whether the policy computes in half precision, whatever its weights are.
        needs_all: Whether completions without an advantage have a gradient too, from a KL term or an entropy bonus.
        ranks: Decide together.
        recovers: Whether this rank may make other micro-batches than it began with when memory runs out. It may not
            where other ranks wait for it in a forward.

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
        ranks: Ranks,
        recovers: bool = True,
    ):
        self.packer = replace(packer, shared_prefix=shared_prefix is not False)
        self.temperature = temperature
        self._mixed_precision = mixed_precision
        self._required = shared_prefix is True
        self._needs_all = needs_all
        self._ranks = ranks
        self._recovers = recovers
        self._compared = False
        self._option = packer.max_tokens
        """What the option says, before memory has run out."""
        self._larger: list[int | None] = []
        """The limits that memory ran out under, largest first."""
        self._steps, self._patience = 0, RETRY_STEPS
        """Optimizer steps since the limit was last changed; as many are waited for before a larger one is tried."""
        if self.packer.shared_prefix:
            reasons = ranks.gather([incompatibility(model)])
            self._pad_for(next(filter(None, reasons), None))

    def fit(self, max_tokens: int | None, by_count: bool) -> None:
        """Cut into micro-batches of at most `max_tokens` from now on, and of so many completions only if `by_count`."""
        self.packer = replace(
            self.packer, max_tokens=max_tokens, batch_size=self.packer.batch_size if by_count else None
        )

    def compare(self, model: nn.Module, completions: Sequence[Completion]) -> None:
        """At the first call, pad from now on if packed log-probabilities of some `completions` are not the padded ones.

        Where they differ on some rank, all ranks compare once more, more of them and against the model's own noise.

        Raises:
            ValueError: They are not, and `shared_prefix=True`.
            DoesNotFit: Memory runs out.
            RuntimeError: Another rank has met an error.
        """
        if self.packer.shared_prefix and not self._compared:
            reason = self._mismatch(model, completions, thorough=False)
            if reason is not None:
                self._pad_for(self._mismatch(model, completions, thorough=True))
        self._compared = True

    def _mismatch(self, model: nn.Module, completions: Sequence[Completion], thorough: bool) -> str | None:
        """Compare on every rank; return some rank's reason to pad. Each rank gathers, whatever happens on one of them."""
        reason, error = None, None
        try:
            reason = packed_mismatch(model, completions, self.packer, self.temperature, self._mixed_precision, thorough)
        except Exception as met:
            error = met
        reports = self._ranks.gather([(reason, None if error is None else repr(error))])
        if error is not None and ran_out_of_memory(error):
            raise DoesNotFit(
                f"Memory ran out in a forward of a few completions ({_first_line(error)}). Lower "
                "max_completion_length or the length of prompts, or use ZeRO-3 or LoRA."
            ) from error
        if error is not None:
            raise error
        if failures := [text for _, text in reports if text is not None]:
            raise RuntimeError(f"Another rank failed when it compared packed and padded logprobs: {failures[0]}")
        return next((reason for reason, _ in reports if reason is not None), None)

    def with_gradient(self, completions: Sequence[Completion]) -> list[Completion]:
        """Those that have a gradient."""
        return [c for c in completions if self.has_gradient(c)]

    def with_logps(self, model: nn.Module, completions: Sequence[Completion], name: str) -> list[Completion]:
        """`completions`, the ones with a gradient with their log-probabilities under `model` in the field `name`."""
        trained = self.with_gradient(completions)
        logps = iter(self._evaluate(compute_completion_logprobs, model, trained))
        return [
            replace(c, **cast("dict[str, Any]", {name: next(logps)})) if self.has_gradient(c) else c
            for c in completions
        ]

    def logps(self, model: nn.Module, completions: Sequence[Completion], alone: bool = False) -> list[Tensor]:
        """Return the logprobs of each completion's tokens under `model`, without dropout; `alone`: each in a padded row."""
        if not alone:
            return self._evaluate(compute_completion_logprobs, model, completions)
        packer = replace(self.packer, batch_size=1, shared_prefix=False)
        return compute_completion_logprobs(model, completions, packer, self.temperature)

    def entropies(self, model: nn.Module, completions: Sequence[Completion]) -> list[Tensor]:
        """Return the entropies (nats) of each completion's tokens under `model`, whether it has a gradient or not."""
        return self._evaluate(compute_completion_entropies, model, completions)

    def router_load(self, model: nn.Module, completions: Sequence[Completion]) -> Tensor:
        """Add up the load of a mixture's experts over the completions of this rank that have a gradient."""
        trained = self.with_gradient(completions)
        return self._in_memory(trained, lambda: compute_router_load(model, trained, self.packer, self.temperature))

    def _evaluate(
        self, function: Callable[..., list[Tensor]], model: nn.Module, completions: Sequence[Completion]
    ) -> list[Tensor]:
        return self._in_memory(completions, lambda: function(model, completions, self.packer, self.temperature))

    def in_micro_batches(
        self,
        completions: Sequence[Completion],
        divisor: float,
        work: Callable[[list[MicroBatch]], Result],
        undo: Callable[[], None],
    ) -> Result:
        """`work` on the ones with a gradient of this rank's `completions` of an optimizer step.

        `divisor` is what the loss of the whole step on all ranks is divided by. Where memory runs out, `undo` is called,
        and `work` runs again on smaller micro-batches.

        Raises:
            DoesNotFit: Memory runs out, and micro-batches cannot be smaller.
        """
        trained = self.with_gradient(completions)
        self._try_larger()
        return self._in_memory(trained, lambda: work(self.packer.micro_batches(trained, divisor)), undo)

    def _try_larger(self) -> None:
        """Return to the limit that memory ran out under when enough steps have fit; each failure doubles the wait."""
        self._steps += 1
        if self._larger and self._steps > self._patience:
            self.packer = replace(self.packer, max_tokens=self._larger.pop())
            self._steps, self._patience = 0, 2 * self._patience

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to make the same micro-batches."""
        return {
            "compared": self._compared,
            "shared_prefix": self.packer.shared_prefix,
            "max_tokens": self.packer.max_tokens,
            "by_count": self.packer.batch_size is not None,
            "option": self._option,
            "larger": self._larger,
            "steps": self._steps,
            "patience": self._patience,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._compared = state["compared"]
        shared_prefix = self.packer.shared_prefix and state["shared_prefix"]
        self.packer = replace(self.packer, shared_prefix=shared_prefix)
        if state["option"] == self._option:  # else memory ran out under another option
            self.fit(state["max_tokens"], state["by_count"])
            self._larger, self._steps, self._patience = list(state["larger"]), state["steps"], state["patience"]

    def _in_memory(
        self, completions: Sequence[Completion], work: Callable[[], Result], undo: Callable[[], None] = lambda: None
    ) -> Result:
        while True:
            try:
                return work()
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
                message = _first_line(error)
            # out of the handler, whose traceback holds what the micro-batches have allocated; so do cycles of its frames
            undo()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._shrink(completions, message)

    def _shrink(self, completions: Sequence[Completion], message: str) -> None:
        """Cut into micro-batches of half the tokens from now on.

        Raises:
            DoesNotFit: That is not possible.
        """
        size = self.packer.largest(completions)
        smaller = replace(self.packer, max_tokens=size // 2)
        if not self._recovers:
            raise DoesNotFit(
                f"Memory ran out in a micro-batch of {size} tokens ({message}), while other ranks wait for this "
                "one. Resume with "
                f"max_tokens_per_micro_batch={size // 2}: it changes nothing in the gradient."
            )
        if smaller.largest(completions) == size:
            raise DoesNotFit(
                f"Memory ran out in a micro-batch of {size} tokens, a single completion ({message}). Lower "
                "max_completion_length or the length of prompts, set gradient_checkpointing=True, or use ZeRO or LoRA."
            )
        logger.warning(
            "Memory ran out in a micro-batch of %d tokens; the optimizer step, and the next %d, are made in micro-batches "
            "of %d tokens at most, with the same gradient. max_tokens_per_micro_batch=%d avoids this. (%s)",
            size,
            self._patience,
            size // 2,
            size // 2,
            message,
            extra=EVERY_RANK,
        )
        self._larger.append(self.packer.max_tokens)
        self._steps = 0
        self.packer = smaller

    def has_gradient(self, completion: Completion) -> bool:
        """Whether it has a gradient."""
        return any(completion.mask) and (completion.has_signal or self._needs_all)

    def _pad_for(self, reason: str | None) -> None:
        """Pad from now on if there is a reason to, the same on all ranks."""
        if reason is None:
            return
        if self._required:
            raise ValueError(f"shared_prefix=True cannot work: {reason}; 'auto' and False pad instead.")
        logger.warning("Prompts are not shared between the completions of a group: %s.", reason)
        self.packer = replace(self.packer, shared_prefix=False)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
