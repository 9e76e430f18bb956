"""The load-balancing loss of a mixture of experts, over the whole mini-batch.

Axes: E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..logprobs.evaluator import LogprobEvaluator
from ..model_utils import causal_lm
from ..types import Completion, Ranks


class RouterBalance:
    """Adds the load-balancing loss, whose first factor must be known before the first backward.

        E sum_e f_e p_e,    f_e = share of tokens that choose e,    p_e = mean probability of e,    over layers and tokens

    A prompt counts once for each of its completions, and completions with their last tokens, as in TRL.
    Source: Switch Transformer, arXiv 2101.03961, Eq. (4) to (6).

    Args:
        coefficient: Weight of the loss; 0 for none, which costs nothing.
        evaluator: Computes the load.
        ranks: Of the run; a mini-batch is prepared by all of them together.
    """

    def __init__(self, coefficient: float, evaluator: LogprobEvaluator, ranks: Ranks):
        self.active = coefficient != 0
        self.value = 0.0
        """Of the last mini-batch, before its update."""
        self._coefficient = coefficient
        self._evaluator = evaluator
        self._ranks = ranks
        self._slope_E = torch.zeros(0)

    def prepare(self, model: nn.Module, completions: Sequence[Completion]) -> None:
        """Count what the experts are chosen for in the mini-batch, over all ranks."""
        if not self.active:
            return
        load_2E = torch.stack(self._ranks.gather([self._evaluator.router_load(model, completions)])).sum(0)
        chosen_E, probs_E = load_2E
        tokens = probs_E.sum().clamp(min=1)  # over layers: a token's probabilities add up to 1
        slope_E = len(probs_E) * chosen_E / tokens**2
        self.value = float(slope_E @ probs_E)
        self._slope_E = self._coefficient * slope_E

    def loss(self, load_2E: Tensor | None) -> Tensor | float:
        """Return the micro-batch's share of the loss, given its load."""
        if load_2E is None:
            return 0.0
        probs_E = load_2E[1]
        return (self._slope_E.to(probs_E) * probs_E).sum()


def router_coefficient(option: float | None, model: Any) -> float:
    """Return `router_aux_loss_coef`, or what the model's configuration says.

    Raises:
        ValueError: It is set, and the model has no router whose load could be balanced.
    """
    config = causal_lm(model).config.get_text_config()
    if option and not hasattr(config, "output_router_logits"):
        raise ValueError(
            f"router_aux_loss_coef={option} needs a mixture of experts that returns its router logits, which "
            f"{type(causal_lm(model)).__name__} is not; set it to 0.0."
        )
    return option if option is not None else getattr(config, "router_aux_loss_coef", 0.0)
