"""Fits the update into the memory that is free before the first optimizer step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from peft import PeftModel

from ..config import GRPOConfig
from ..free_memory import free_memory, return_freed_blocks
from ..logging import get_logger
from ..logprobs.evaluator import LogprobEvaluator
from ..model_utils import causal_lm
from ..models import checkpointing_fault
from ..plan import GPU_TOKENS, Setup, activations, choose, fragments, room_for_activations
from ..types import Ranks


logger = get_logger(__name__)

WHERE = ("every_n_layers", "offload")
"""Of `gradient_checkpointing_kwargs`, what is not meant for `torch.utils.checkpoint`."""


class MemoryBudget:
    """Chooses the tokens of a micro-batch and whether activations are recomputed, where the options leave that open.

    All ranks choose alike, for the one with the least free memory. A resumed run keeps what its checkpoint has chosen.

    Args:
        args: The options.
        model: The policy, not wrapped.
        evaluator: Cuts optimizer steps into micro-batches.
        ranks: Of the run.
        setup: Describes the run to the plan; raises ValueError where it cannot.
    """

    def __init__(
        self, args: GRPOConfig, model: Any, evaluator: LogprobEvaluator, ranks: Ranks, setup: Callable[[], Setup]
    ):
        self.args = args
        self.model = model
        self._evaluator = evaluator
        self._ranks = ranks
        self._setup = setup
        self._max_tokens: int | None = None
        """What was chosen; 0: no limit, since the run cannot be planned; None: nothing yet, or an option says it."""
        self._recomputed: bool | None = None
        """What was chosen; None: nothing yet, or an option says it."""
        self._exact: bool | None = None
        """Whether freed memory is given back at once, since what malloc may keep of it would not fit; None: not known."""

    def state_dict(self) -> dict[str, Any]:
        return {"max_tokens": self._max_tokens, "recomputed": self._recomputed, "exact": self._exact}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.args.max_tokens_per_micro_batch is None:
            self._max_tokens = state["max_tokens"]  # the evaluator has loaded the limit, which may be smaller by now
        if self.args.gradient_checkpointing is None and state["recomputed"] is not None:
            self._set_recomputed(state["recomputed"])
        self._set_exact(state["exact"])

    def choose(self) -> None:
        """Choose what is still open. A collective where something is; ranks agree on that."""
        tokens_open = self.args.max_tokens_per_micro_batch is None and self._max_tokens is None
        checkpointing_open = self.args.gradient_checkpointing is None and self._recomputed is None
        chooses = tokens_open or checkpointing_open
        if self._exact is not None and not chooses:
            return
        recomputed, fits = self._planned(chooses)
        if checkpointing_open:
            self._set_recomputed(recomputed)
        if tokens_open:
            self._max_tokens = fits
            if fits:
                on_cpu = self.args.device.type == "cpu"
                self._evaluator.fit(fits if on_cpu else min(fits, GPU_TOKENS), by_count=on_cpu)

    def _planned(self, chooses: bool) -> tuple[bool, int]:
        """Return whether activations are recomputed and how many tokens fit then; 0 where the run cannot be planned.

        The log gets a line if that is a choice.
        """
        self._exact = False
        impossible = checkpointing_fault(self.model) is not None
        try:
            setup = self._setup()
        except ValueError as error:
            effect = "" if impossible else "; unless an option says no, activations are recomputed"
            if chooses:
                logger.warning("Memory is not planned%s: %s", effect, error)
            return not impossible, 0
        if impossible:
            setup = replace(setup, checkpointing=False)
        elif setup.checkpointing is None:
            setup = replace(setup, checkpointing=self._recomputed)
        free = min(self._ranks.gather([free_memory(self.args.device)]))
        room = room_for_activations(setup, free)
        recomputed, fits = choose(setup, room)
        self._set_exact(self.args.device.type == "cpu" and not _fits_in_pieces(setup, recomputed, room))
        if chooses and (setup.checkpointing is None or fits < setup.micro_batch_tokens):
            logger.warning(
                "The update has %.2f GiB: activations are %s, and micro-batches of up to %d tokens fit; one has up to %d. "
                "Set gradient_checkpointing or max_tokens_per_micro_batch to choose otherwise.",
                free / 2**30,
                "recomputed" if recomputed else "kept",
                fits,
                setup.micro_batch_tokens,
            )
        return recomputed, max(1, fits)

    def _set_exact(self, exact: bool) -> None:
        self._exact = exact
        if exact:
            return_freed_blocks()

    def _set_recomputed(self, recomputed: bool) -> None:
        self._recomputed = recomputed
        if not recomputed:
            return
        model = causal_lm(self.model)
        kwargs = dict(cast("dict[str, Any]", self.args.gradient_checkpointing_kwargs or {}))
        where = {name: kwargs.pop(name) for name in WHERE if name in kwargs}
        # transformers renames it
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable(kwargs or None, **where)
        if isinstance(self.model, PeftModel):
            self.model.enable_input_require_grads()


def _fits_in_pieces(setup: Setup, recomputed: bool, room: float) -> bool:
    """Whether the largest micro-batch fits with all that malloc may keep of it in pieces."""
    tokens = min(setup.micro_batch_tokens, setup.step_tokens)
    held = activations(setup.shape, tokens, setup.precision, recomputed)
    return held + fragments(setup.shape, tokens, setup.precision, recomputed) <= room
