"""The options of entropy in the training loop: which tokens the policy term acts on, and the weight of the bonus."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..logprobs.evaluator import LogprobEvaluator
from ..objective import EntropyCoefficient, ObjectiveOptions, entropy_threshold
from ..types import Completion, MiniBatch, Ranks


class EntropyControl:
    """Prepares each mini-batch before its first backward, and takes in its entropy after its last.

    Args:
        options: Of the objective.
        evaluator: Computes entropies for `top_entropy_quantile`.
        ranks: Of the run; a mini-batch is prepared and finished by all of them together.
    """

    def __init__(self, options: ObjectiveOptions, evaluator: LogprobEvaluator, ranks: Ranks):
        self.has_bonus = options.has_entropy_bonus
        self.weight = 0.0
        """Of a token's entropy in the sum that is divided by the mini-batch's divisor."""
        self._options = options
        self._evaluator = evaluator
        self._ranks = ranks
        self._coefficient = EntropyCoefficient(options)
        self._tokens = 0

    @property
    def coefficient(self) -> float:
        """`entropy_coef` as it is now."""
        return self._coefficient.coef

    def prepare(self, model: nn.Module, mini_batch: MiniBatch, divisor: float) -> Sequence[Completion]:
        """Return the completions of `mini_batch`, restricted to the tokens of highest entropy if that is asked for."""
        completions, self._tokens = mini_batch.completions, mini_batch.counts.tokens
        if self._options.top_entropy_quantile < 1:
            completions = self._restricted(model, completions)
        self.weight = self._coefficient.applied * divisor / max(self._tokens, 1)
        return completions

    def finish(self, entropy: Tensor) -> None:
        """Take in the entropies (nats) of this rank's tokens, as `LossOutput.entropy` adds them up."""
        if self._options.use_adaptive_entropy:
            self._coefficient.update(sum(self._ranks.gather([entropy.item()])) / max(self._tokens, 1))

    def state_dict(self) -> dict[str, float]:
        return self._coefficient.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._coefficient.load_state_dict(state)

    def _restricted(self, model: nn.Module, completions: Sequence[Completion]) -> list[Completion]:
        """Evaluate all completions once more, and mask the tokens below the quantile of the mini-batch on all ranks."""
        trained = [completion for completion in completions if any(completion.mask)]
        entropies = self._evaluator.entropies(model, trained)
        counted = [entropy_T[torch.tensor(c.mask)] for entropy_T, c in zip(entropies, trained, strict=True)]
        batch_N = torch.cat([torch.zeros(0), *self._ranks.gather(counted)])
        threshold = entropy_threshold(batch_N, self._options.top_entropy_quantile)
        self._tokens = int((batch_N >= threshold).sum())
        return [
            replace(c, mask_policy=(entropy_T >= threshold).tolist())
            for c, entropy_T in zip(trained, entropies, strict=True)
        ]
