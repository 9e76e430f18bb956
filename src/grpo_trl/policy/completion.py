"""A completion: what sampling writes, rewards judge, and training reads."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Completion:
    """One completion and what is known of it, e.g. `Completion([1, 5], [7, 2], mask=[True, True])`."""

    prompt_ids: list[int]
    ids: list[int]
    mask: list[bool]
    """True for the tokens that the model wrote and is trained on; False for what an environment inserted."""
    ended: bool = True
    """Whether it came to its end: an end token, a stop string. False for what the length cut off."""
    sampler_logps: list[float] | None = None
    """Log-probabilities (nats) of the model at the sampling temperature as the sampler computed them, one per token. They
    describe the sampler, not the old policy."""
    drawn_logps: list[float] | None = None
    """Log-probabilities (nats) of the distribution that each token was drawn from, e.g. after top-p; None if not known."""
    advantage: float = 0.0
    old_logps: Tensor | None = None
    """Log-probabilities under the policy that sampled, evaluated by the trainer, of shape (len(ids),); None on policy."""
    ref_logps: Tensor | None = None
    """Log-probabilities under the reference, of shape (len(ids),); None without a reference."""

    @property
    def inputs(self) -> list[int]:
        """The tokens that the model reads to predict the trained ones: all before the last of these."""
        last = next((i for i in range(len(self.mask) - 1, -1, -1) if self.mask[i]), 0)
        return self.ids[:last]
